"""The schema of the config: a part's keys are its constructor's arguments, their types its annotations."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal, get_type_hints

from hydra.utils import instantiate
from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from maml.config.hints import near_miss
from maml.config.names import current_address, locate
from maml.errors import MamlError
from maml.hardware.precision import Precision
from maml.types import Count, NonNegativeInt

# Arguments that the project itself passes to a part's constructor.
SUPPLIED = {
    "model": {"in_shape", "out_dim"},
    "algorithm": {"parts"},
}
# Arguments that the project passes if the config does not set them.
_SUPPLIED_IF_MISSING = {"model.module": {"in_shape", "out_dim"}}
# The parts on which trained numbers depend, in the order of error messages.
TRAINING_PARTS = ("domain", "model", "inner", "outer", "algorithm")
PARTS = (*TRAINING_PARTS, "evaluation", "hardware", "logger")

Part = Mapping[str, Any]
"""``_target_``, the address of a class, and the arguments of its constructor."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of a run. Each part is checked against its own constructor.

    Attributes:
        seed: random seed of the initial parameters and of all sampling in training.
        seeds: number of consecutive seeds, trained as one batched computation; each seed has its own run folder.
        num_iterations: number of meta-updates.
        meta_batch_size: number of tasks per meta-update, B.
        precision: floating-point precision of training and evaluation; it is part of the run's id.
        mode: ``train`` trains (or resumes) and then evaluates; ``eval`` evaluates the newest checkpoint.
        checkpoint: with ``mode=eval``, the checkpoint file to evaluate; null is the run folder's newest checkpoint.
        run_dir: folder of this run; null is ``runs_dir/<experiment>/<run id>``.
        runs_dir: folder in which run folders are made.
        data_dir: folder of the data sets.
        cache_dir: folder in which tensors built from data sets are cached.
        log_every: number of iterations between two lines of metrics.
        checkpoint_every: number of iterations between two checkpoints.
        domain: the distribution of tasks.
        model: the network f_theta.
        inner: the inner loop, adaptation to one task.
        outer: the outer loop's optimizer, which makes the meta-updates.
        evaluation: the meta-test.
        algorithm: the method that learns theta.
        hardware: the device, the number of threads, and the use of memory.
        logger: service to which metrics are sent, besides the run folder.
    """

    seed: NonNegativeInt = 0
    seeds: Count = 1
    num_iterations: NonNegativeInt
    meta_batch_size: Count
    precision: Precision = "float32"
    mode: Literal["train", "eval"] = "train"
    checkpoint: str | None = None
    run_dir: str | None = None
    runs_dir: str
    data_dir: str
    cache_dir: str
    log_every: Count
    checkpoint_every: Count
    domain: Part
    model: Part
    inner: Part
    outer: Part
    evaluation: Part
    algorithm: Part
    hardware: Part
    logger: Part

    def as_dict(self) -> dict[str, Any]:
        """Returns the settings as a dict with the keys of the yaml files."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def for_seed(self, seed: int) -> Settings:
        """Returns the settings with which one of the run's seeds would be trained alone."""
        return replace(self, seed=seed, seeds=1)


def check(config: Mapping[str, Any]) -> Settings:
    """Checks every key of a plain config against the constructors' signatures and annotations.

    Raises:
        MamlError: lists every unknown, missing or ill-typed key, and suggests similar names.
    """
    problems = [f"{part} is missing" for part in PARTS if part not in config]
    root = {key: value for key, value in config.items() if key not in PARTS}
    problems += _check_arguments("", Settings, root, supplied=set(PARTS), more_keys=PARTS)
    for part in PARTS:
        if part in config:
            problems += _check_part(part, config[part])
    if problems:
        raise MamlError("the config is not valid:\n  " + "\n  ".join(problems))
    return Settings(**config)


def _check_part(path: str, value: Any) -> list[str]:
    if not isinstance(value, Mapping) or "_target_" not in value:
        return [f"{path} has no _target_; choose one of the files in conf/{path}/"]
    try:
        target = locate(value["_target_"])
    except Exception as error:
        return [f"{path}._target_={value['_target_']}: no such class ({error})"]
    arguments = {key: item for key, item in value.items() if key not in ("_target_", "_partial_")}
    return _check_arguments(path, target, arguments, supplied=SUPPLIED.get(path, set()))


def _check_arguments(
    path: str, target: type, arguments: Mapping[str, Any], supplied: set[str], more_keys: Iterable[str] = ()
) -> list[str]:
    """Compares arguments with the signature and annotations of a constructor."""
    prefix = f"{path}." if path else ""
    parameters = inspect.signature(target).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return []  # a user's class that accepts any argument
    allowed = {name: parameter for name, parameter in parameters.items() if name not in supplied}
    hints = argument_types(target)
    problems = []
    for name, value in arguments.items():
        if name not in allowed:
            problems.append(f"{prefix}{name} is not a key{near_miss(name, [*allowed, *more_keys], prefix)}")
        elif isinstance(value, Mapping) and "_target_" in value:
            problems += _check_part(f"{prefix}{name}", value)
        elif name in hints:
            problems += _check_value(f"{prefix}{name}", value, hints[name])
    for name, parameter in allowed.items():
        present = arguments.keys() | _SUPPLIED_IF_MISSING.get(path, set())
        if parameter.default is parameter.empty and name not in present:
            problems.append(f"{prefix}{name} is missing")
    return problems


def argument_types(target: type) -> dict[str, Any]:
    """Returns the types of a constructor's arguments by name; empty if they cannot be resolved."""
    try:
        # A dataclass resolves inherited fields in the modules that declare them.
        return get_type_hints(target if is_dataclass(target) else target.__init__, include_extras=True)  # type: ignore[misc]
    except NameError:  # a user's class whose annotations are imported under TYPE_CHECKING only
        return {}


def _check_value(path: str, value: Any, annotation: Any) -> list[str]:
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False))
        # Through JSON, so that a list is accepted for a tuple, but "3" or true is not accepted for 3.
        adapter.validate_json(json.dumps(value), strict=True)
    except PydanticUserError:
        return []  # a user's annotation that pydantic cannot check
    except ValidationError as error:
        messages = [detail["msg"].replace("a valid array", "a list, such as [a, b]") for detail in error.errors()]
        reasons = dict.fromkeys(message[0].lower() + message[1:] for message in messages)
        return [f"{path}={value!r}: {'; or '.join(reasons)}"]
    return []


def build(part: Mapping[str, Any], **supplied: Any) -> Any:
    """Builds a part: calls its ``_target_`` with its keys and with the arguments that the project supplies."""
    # As a partial: Hydra would convert the supplied objects to config nodes if they were passed to `instantiate`.
    target = current_address(part["_target_"])
    return instantiate({**part, "_target_": target, "_partial_": True}, _convert_="all")(**supplied)


def without_data(domain: Part) -> Part:
    """Returns the part that builds the same domain without reading its data set (`Domain.without_data`)."""
    return {**domain, "_target_": f"{current_address(domain['_target_'])}.without_data"}
