"""Refuses runs that cannot fit into the machine's memory, before anything is drawn or written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from maml.algorithm.base import Algorithm
from maml.config.schema import Settings
from maml.domain.base import Domain
from maml.errors import TooLarge
from maml.evaluation import Evaluation
from maml.hardware.base import Hardware
from maml.hardware.memory import check_memory
from maml.seeding import Stream

_BYTES = 4  # least size of a number
# Words in torch's errors about an allocation that is refused, or a size that overflows.
_MEMORY_WORDS = ("allocate", "Storage size", "multiplication overflow", "out of memory")


def check_tasks_fit(settings: Settings, domain: Domain[Any], evaluation: Evaluation) -> None:
    """Refuses a run whose tasks cannot fit into memory, before they are drawn.

    Raises:
        TooLarge: if they cannot.
    """
    if settings.mode == "train" and settings.num_iterations:
        with naming_the_largest_setting(settings, "domain"):
            elements = domain.least_elements(domain.num_shots, domain.num_query or domain.num_shots)
            check_memory(elements * settings.meta_batch_size * settings.seeds * _BYTES, "a meta-batch")
            check_memory(domain.num_shots * math.prod(domain.in_shape) * _BYTES, "the support data of one task")
    with naming_the_largest_setting(settings, "domain", "evaluation"):
        for num_shots in evaluation.num_shots or [domain.num_shots]:
            elements = domain.least_elements(num_shots, evaluation.num_query or num_shots) + evaluation.num_steps
            count = max(evaluation.num_tasks, evaluation.search.num_tasks if evaluation.search else 0)
            check_memory(elements * count * _BYTES, "the frozen bank of test tasks")


def check_training_fits(settings: Settings, algorithm: Algorithm, hardware: Hardware) -> None:
    """Refuses a run whose parameters or meta-batches cannot fit into memory; it draws one meta-batch.

    Raises:
        TooLarge: if they cannot.
        MamlError: if there is too little data for a meta-batch.
    """
    size = sum(value.numel() for value in algorithm.theta.values()) * _BYTES
    check_memory(size * settings.seeds, f"theta of seeds={settings.seeds}")
    if algorithm.differentiates_adaptation and not hardware.recompute:
        check_memory(size * algorithm.inner.num_steps, f"a graph of inner.num_steps={algorithm.inner.num_steps}")
    if settings.mode == "train" and settings.num_iterations:
        algorithm.sample_tasks(settings.meta_batch_size, Stream(settings.seed, hardware.device).child(1))


@contextmanager
def naming_the_largest_setting(settings: Settings, *parts: str) -> Iterator[None]:
    """Names the largest number of some parts, or of the root, in an error about too little memory."""
    try:
        yield
    except (MemoryError, OverflowError, RuntimeError, TooLarge) as error:
        is_about_memory = not isinstance(error, RuntimeError) or any(word in str(error) for word in _MEMORY_WORDS)
        if not is_about_memory:
            raise
        found = {key: getattr(settings, key) for key in ("meta_batch_size", "seeds")}
        for part in parts:
            found |= _numbers(part, getattr(settings, part))
        key = max(found, key=found.__getitem__)
        reason = str(error).splitlines()[0] if str(error) else "memory does not suffice"
        if isinstance(error, torch.OutOfMemoryError):  # other programs may have filled the GPU
            raise TooLarge(
                f"the free memory of the GPU does not suffice: {reason}; choose another GPU (CUDA_VISIBLE_DEVICES), "
                f"hardware=cpu, or less than {key}={found[key]}"
            ) from error
        raise TooLarge(f"{key}={found[key]} is too large: {reason}; lower it") from error


def _numbers(path: str, value: Any) -> dict[str, int]:
    """Returns the integers in a part's settings by dotted key; of those in a list, the largest."""
    if isinstance(value, Mapping):
        return {key: number for name, item in value.items() for key, number in _numbers(f"{path}.{name}", item).items()}
    numbers = [item for item in (value if isinstance(value, list) else [value]) if type(item) is int]
    return {path: max(numbers)} if numbers and not path.endswith("seed") else {}
