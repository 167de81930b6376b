"""The schema of the config: constructors say which keys a part has, annotations what they may be."""

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
# Arguments that the project passes where the config leaves them open.
_SUPPLIED_IF_MISSING = {"model.module": {"in_shape", "out_dim"}}
# The parts on which trained numbers depend, in the order in which messages list them.
TRAINING_PARTS = ("domain", "model", "inner", "outer", "algorithm")
PARTS = (*TRAINING_PARTS, "evaluation", "hardware", "logger")

Part = Mapping[str, Any]
"""``_target_`` and the arguments of that constructor."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of a run. Each part is checked against its own constructor.

    Attributes:
        seed: of the initial parameters and of everything drawn in training.
        seeds: number of consecutive seeds, trained as one batched computation; each is a run of its own.
        num_iterations: meta-updates.
        meta_batch_size: B, tasks per meta-update.
        precision: of the arithmetic; it is part of the run's id.
        mode: ``train`` trains (or resumes) and evaluates; ``eval`` evaluates what has been trained so far.
        checkpoint: with ``mode=eval``, a checkpoint file to evaluate instead of the run folder's own.
        run_dir: the run's folder; null is ``runs_dir/<experiment>/<run id>``.
        runs_dir: where run folders are made.
        data_dir: where data sets are.
        cache_dir: where tensors built from data sets are kept.
        log_every: iterations between two lines of metrics.
        checkpoint_every: iterations between two checkpoints.
        domain: what a task is.
        model: the network f_theta.
        inner: adaptation to a task.
        outer: the meta-update.
        evaluation: meta-test.
        algorithm: how theta is learnt.
        hardware: where the run computes.
        logger: where metrics are sent, besides the run folder.
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
        """Returns the settings by key, as yaml files hold them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def for_seed(self, seed: int) -> Settings:
        """Returns the settings of one of the run's seeds, trained alone."""
        return replace(self, seed=seed, seeds=1)


def check(config: Mapping[str, Any]) -> Settings:
    """Checks every key of a plain config against the constructors.

    Raises:
        MamlError: listing every unknown, missing or ill-typed key, with the near misses.
    """
    problems = [f"{part} is missing" for part in PARTS if part not in config]
    root = {key: value for key, value in config.items() if key not in PARTS}
    problems += _check_arguments("", Settings, root, supplied=set(PARTS), more_keys=PARTS)
    for part in PARTS:
        if part in config:
            problems += _check_part(part, config[part])
    if problems:
        raise MamlError("the config is not usable:\n  " + "\n  ".join(problems))
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
        return []  # a user's class that takes anything
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
    """Returns the types of a constructor's arguments by name; none where they cannot be resolved."""
    try:
        # A dataclass resolves inherited fields in the modules that declare them.
        return get_type_hints(target if is_dataclass(target) else target.__init__, include_extras=True)  # type: ignore[misc]
    except NameError:  # a user's class with names that only its type checker imports
        return {}


def _check_value(path: str, value: Any, annotation: Any) -> list[str]:
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False))
        # Through JSON, so that a list may stand for a tuple while "3" or true may not stand for 3.
        adapter.validate_json(json.dumps(value), strict=True)
    except PydanticUserError:
        return []  # a user's annotation that says nothing about configs
    except ValidationError as error:
        reasons = dict.fromkeys(detail["msg"][0].lower() + detail["msg"][1:] for detail in error.errors())
        return [f"{path}={value!r}: {'; or '.join(reasons)}"]
    return []


def build(part: Mapping[str, Any], **supplied: Any) -> Any:
    """Makes a part: ``_target_`` called with its keys and with what the project supplies."""
    # Partial first: what is supplied must reach the constructor as it is, not by way of a config.
    target = current_address(part["_target_"])
    return instantiate({**part, "_target_": target, "_partial_": True}, _convert_="all")(**supplied)


def without_data(domain: Part) -> Part:
    """Returns the part that builds the same domain with no data set read (`Domain.without_data`)."""
    return {**domain, "_target_": f"{current_address(domain['_target_'])}.without_data"}
