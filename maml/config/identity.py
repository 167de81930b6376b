"""The identity of a run: a hash of the settings on which its numbers depend."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

from pydantic import PydanticUserError, TypeAdapter

from maml.config.names import locate, locate_callable, stable_name
from maml.config.schema import TRAINING_PARTS, Settings, argument_types

# Keys that say where data is stored. Results do not depend on them.
_LOCATION_KEYS = {"data_dir", "cache_dir"}
# The root keys on which trained numbers depend.
TRAINING_KEYS = ("seed", "num_iterations", "meta_batch_size", "precision", "validate_every")


def training_config(settings: Settings) -> dict[str, Any]:
    """Returns the settings on which trained numbers depend, by dotted key, without those at their default.

    Because defaults are left out, an option that is added later does not change the ids of earlier runs.
    """
    flat: dict[str, Any] = {}
    for part in TRAINING_PARTS:
        flat |= _differences_from_defaults(part, getattr(settings, part))
    flat["algorithm._target_"] = _trained_as(settings) or stable_name(settings.algorithm["_target_"])
    defaults = inspect.signature(Settings).parameters
    return flat | {
        key: getattr(settings, key) for key in TRAINING_KEYS if getattr(settings, key) != defaults[key].default
    }


def without_keys(training: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """Returns the result of `training_config` without some keys, such as ``seed``, in which similar runs may differ."""
    return {key: value for key, value in training.items() if key not in keys}


def with_own_defaults(training: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Adds what `training_config` leaves out of a user's own classes: their arguments at the default.

    They are read from the run's config, because a look at the constructor would import a module that may come from
    anybody. An argument that the config omits stays unknown.

    Args:
        training: the recorded settings.
        config: the config of the same run, with the keys of the yaml files.
    """
    added: dict[str, Any] = {}
    for path in own_parts(training):
        part: Any = config
        for name in path.split("."):
            part = part.get(name) if isinstance(part, Mapping) else None
        if isinstance(part, Mapping) and part.get("_target_") == training[f"{path}._target_"]:
            arguments = {name: value for name, value in part.items() if name not in _LOCATION_KEYS}
            added |= {f"{path}.{name}": value for name, value in arguments.items() if not _is_part(value)}
    return {**added, **training}


def own_parts(training: Mapping[str, Any]) -> list[str]:
    """Returns the dotted paths of the parts in recorded settings whose class is outside this package."""
    targets = {key.removesuffix("._target_"): value for key, value in training.items() if key.endswith("._target_")}
    return [path for path, target in targets.items() if not str(target).startswith("maml.")]


def evaluation_config(settings: Settings) -> dict[str, Any]:
    """Returns the settings on which an evaluation of trained parameters depends, in the form of `training_config`."""
    flat = _differences_from_defaults("evaluation", settings.evaluation)
    flat.pop("evaluation.per_class", None)  # adds files, and changes no number
    return flat | ({"algorithm._target_": stable_name(settings.algorithm["_target_"])} if _trained_as(settings) else {})


def _trained_as(settings: Settings) -> str | None:
    """Returns the algorithm that trains identically and differs in meta-test only; None if there is none.

    With ``validate_every``, training keeps what is best in the algorithm's own meta-test.
    """
    if settings.validate_every:
        return None
    algorithm: Any = locate(settings.algorithm["_target_"])
    trained_as: str | None = vars(algorithm).get("trained_as")  # a subclass may train in another way
    return trained_as


def _differences_from_defaults(path: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """Flattens a part to dotted keys, without those that equal the constructor's default."""
    target = locate_callable(value["_target_"])
    parameters, hints = inspect.signature(target).parameters, argument_types(target)
    flat: dict[str, Any] = {}
    for name, item in value.items():
        if name == "_target_":
            flat[f"{path}._target_"] = stable_name(item)
            continue
        default = parameters[name].default if name in parameters else inspect.Parameter.empty
        if name in hints and not _is_part(item):
            item = _cast_to_annotation(item, hints[name])
        if name in _LOCATION_KEYS or (default is not inspect.Parameter.empty and item == default):
            continue
        if _is_part(item):
            flat |= _differences_from_defaults(f"{path}.{name}", item)
        else:
            # Through JSON, so that it equals what is read back: tuples become lists, mapping keys become strings.
            flat[f"{path}.{name}"] = json.loads(json.dumps(item))
    return flat


def _is_part(value: Any) -> bool:
    return isinstance(value, Mapping) and "_target_" in value


def _cast_to_annotation(value: Any, annotation: Any) -> Any:
    """Converts a checked value to its argument's type, so that step sizes 1 and 1.0 are equal."""
    try:
        return TypeAdapter(annotation).validate_json(json.dumps(value))
    except PydanticUserError:
        return value  # a user's annotation that pydantic cannot check


def differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> str:
    """Returns one line for each key in which two settings differ: ``key: VALUE here, VALUE there``."""
    lines = [
        f"  {key}: {here.get(key, 'its default')!s} here, {there.get(key, 'its default')!s} there"
        for key in sorted(here.keys() | there.keys())
        if here.get(key) != there.get(key)
    ]
    return "\n".join(lines)
