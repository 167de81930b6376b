"""One meta-iteration: it depends on its number only, and the CPU never waits for the device."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maml.algorithm.base import Parts
from maml.config.compose import compose
from maml.config.schema import build
from maml.hardware.base import Execution
from maml.seeding import Stream
from maml.training.iteration import Iteration

EXPERIMENTS = [
    "sinusoid_10shot",
    "sinusoid_oracle",
    "sinusoid_reptile",
    "sinusoid_sequence",
    "omniglot_5way_1shot",
    "omniglot_5way_1shot_context_vector",
    "omniglot_5way_1shot_non_conv",
    "omniglot_5way_reptile",
    "mini_imagenet_5way_1shot",
    "mini_imagenet_5way_1shot_finetune",
]
ELSEWHERE = torch.device("meta")  # tensors without values: any code that reads a value fails


def iteration(
    experiment: str, meta_batch_size: int, cache_dir: Path, device: torch.device, seeds: Iterable[int] = (0,)
) -> Iteration:
    overrides = [f"+experiment={experiment}", f"cache_dir={cache_dir}", "hardware=cpu"]
    config, _ = compose(overrides)
    domain = build(config.domain)
    domain.to(device)
    streams = [Stream(seed, device) for seed in seeds]
    algorithms = []
    for stream in streams:
        parts = Parts(
            domain,
            lambda in_shape, out_dim: build(config.model, in_shape=in_shape, out_dim=out_dim),
            build(config.inner),
            build(config.outer),
            stream.child("init"),
        )
        algorithms.append(build(config.algorithm, parts=parts))
    return Iteration(algorithms, streams, meta_batch_size, Execution(1, None, False))


class NothingFromTheHost(TorchDispatchMode):
    """Refuses CPU tensors, except 0-dim ones: they would be copied to the device, and the CPU would wait."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tree_leaves((args, kwargs))
        on_host = [value.shape for value in given if isinstance(value, Tensor) and value.device.type == "cpu"]
        assert all(shape == () for shape in on_host), f"{func} takes {on_host} from the host"
        return func(*args, **(kwargs or {}))


def _refuse(*args: Any, **kwargs: Any) -> Tensor:
    raise AssertionError("a tensor made of Python numbers is copied to the device, and waited for")


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_iteration_makes_the_host_wait_for_nothing(
    experiment: str, seeds: tuple[int, ...], cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if len(seeds) > 1 and experiment.endswith("finetune"):
        return  # several seeds are not trained at once here
    iterate = iteration(experiment, 4, cache_dir, ELSEWHERE, seeds)
    number = torch.ones((), dtype=torch.int64, device=ELSEWHERE)
    monkeypatch.setattr(torch, "tensor", _refuse)
    with NothingFromTheHost():
        metrics = iterate(number)
    assert len(metrics) == len(seeds)
    assert all(value.device == ELSEWHERE and value.shape == () for its in metrics for value in its.values())


def test_what_waits_for_the_device_is_found_by_the_test_above() -> None:
    value = torch.ones(3, device=ELSEWHERE)
    for wait in (lambda: value.sum().item(), lambda: bool(value.any()), lambda: value.nonzero().tolist()):
        with pytest.raises((RuntimeError, NotImplementedError)):
            wait()
    with pytest.raises(AssertionError, match="from the host"), NothingFromTheHost():
        torch.arange(3).to(ELSEWHERE)


@pytest.mark.parametrize("experiment", ["sinusoid_10shot", "omniglot_5way_1shot", "sinusoid_reptile"])
def test_iteration_of_a_number_on_the_device_is_that_of_the_number(experiment: str, cache_dir: Path) -> None:
    first, second = (iteration(experiment, 3, cache_dir, torch.device("cpu")) for _ in range(2))
    for number in (1, 7, 60_000):
        mine, theirs = first.sample_tasks(number), second.sample_tasks(torch.tensor(number))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
