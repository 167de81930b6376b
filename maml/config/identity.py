"""What a run is known by: a hash of the settings on which its numbers depend."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from typing import Any

from pydantic import PydanticUserError, TypeAdapter

from maml.config.names import locate, stable_name
from maml.config.schema import TRAINING_PARTS, Settings, argument_types

# Keys that say where things are, not what they are.
_LOCATION_KEYS = {"data_dir", "cache_dir"}
# The keys of the root on which trained numbers depend.
_TRAINING_KEYS = ("seed", "num_iterations", "meta_batch_size", "precision")


def training_config(settings: Settings) -> dict[str, Any]:
    """Returns what trained numbers depend on, as dotted keys; keys at their default are left out.

    So an option added later, at its default, leaves the id of every earlier run as it is.
    """
    flat: dict[str, Any] = {}
    for part in TRAINING_PARTS:
        flat |= _differences_from_defaults(part, getattr(settings, part))
    flat["algorithm._target_"] = _trained_as(settings) or stable_name(settings.algorithm["_target_"])
    defaults = inspect.signature(Settings).parameters
    return flat | {
        key: getattr(settings, key) for key in _TRAINING_KEYS if getattr(settings, key) != defaults[key].default
    }


def evaluation_config(settings: Settings) -> dict[str, Any]:
    """Returns what an evaluation of given parameters depends on, as `training_config` does."""
    flat = _differences_from_defaults("evaluation", settings.evaluation)
    return flat | ({"algorithm._target_": stable_name(settings.algorithm["_target_"])} if _trained_as(settings) else {})


def _trained_as(settings: Settings) -> str | None:
    """Returns the algorithm that this one is in training; None unless they part in meta-test only."""
    return getattr(locate(settings.algorithm["_target_"]), "trained_as", None)  # a user's may be no `Algorithm`


def _differences_from_defaults(path: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """Flattens a part to dotted keys, without those at the constructor's own default."""
    target = locate(value["_target_"])
    parameters, hints = inspect.signature(target).parameters, argument_types(target)
    flat: dict[str, Any] = {}
    for name, item in value.items():
        if name == "_target_":
            flat[f"{path}._target_"] = stable_name(item)
            continue
        default = parameters[name].default if name in parameters else inspect.Parameter.empty
        if name in hints and not (isinstance(item, Mapping) and "_target_" in item):
            item = _cast_to_annotation(item, hints[name])
        if name in _LOCATION_KEYS or (default is not inspect.Parameter.empty and item == default):
            continue
        if isinstance(item, Mapping) and "_target_" in item:
            flat |= _differences_from_defaults(f"{path}.{name}", item)
        else:
            flat[f"{path}.{name}"] = json.loads(json.dumps(item))  # as it will be read back: lists, and names as keys
    return flat


def _cast_to_annotation(value: Any, annotation: Any) -> Any:
    """Returns a checked value in the type of its argument, so that 1 and 1.0 are one step size."""
    try:
        return TypeAdapter(annotation).validate_json(json.dumps(value))
    except PydanticUserError:
        return value  # a user's annotation that says nothing about configs


def digest(settings: Mapping[str, Any]) -> str:
    """Returns a short name for settings: equal settings, equal name."""
    canonical = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def differences(mine: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Returns one line per key in which two settings differ: ``key: this run's value, not the other's``."""
    lines = [
        f"  {key}: {mine.get(key, 'its default')!s} here, {other.get(key, 'its default')!s} there"
        for key in sorted(mine.keys() | other.keys())
        if mine.get(key) != other.get(key)
    ]
    return "\n".join(lines)
