"""From a composed config to objects: the schema of every part is its constructor, and every mistake is named at once.

A part (domain, model, inner, ...) is a mapping with a ``_target_``; its keys are the arguments of that constructor,
whose annotations give types and ranges. What the project supplies while it builds (shapes, streams) is not a key.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.metadata
import inspect
import json
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_type_hints

from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from maml.errors import MamlError
from maml.precision import Precision
from maml.types import Count, NonNegativeInt

# What the project itself passes to a part's constructor.
_SUPPLIED = {
    "model": {"in_shape", "out_dim"},
    "algorithm": {"parts"},
}
# The parts on which trained numbers depend, in the order in which messages list them.
_TRAINING_PARTS = ("domain", "model", "inner", "outer", "algorithm")
_OTHER_PARTS = ("evaluation", "hardware", "logger")
# Keys that say where things are, not what they are.
_PLACES = {"data_dir", "cache_dir"}


class Root:
    """The schema of the root of the config; the parts beside it are checked against their own constructors.

    Args:
        seed: of initial parameters and of everything drawn in training.
        seeds: how many seeds, from ``seed`` on, are computed side by side; each is a run of its own.
        num_iterations: meta-updates.
        meta_batch_size: B, tasks per meta-update.
        precision: of the numbers that it computes with.
        mode: ``train`` trains (or resumes) and evaluates; ``eval`` evaluates what has been trained so far.
        checkpoint: a checkpoint file to evaluate instead of the run folder's own.
        run_dir: the run's folder; None is ``runs_dir/<experiment>/<run id>``.
        runs_dir: where run folders are made.
        data_dir: where data sets are.
        cache_dir: where tensors built from them are kept.
        log_every: iterations between two lines of metrics.
        checkpoint_every: iterations between two checkpoints.
    """

    def __init__(
        self,
        num_iterations: NonNegativeInt,
        meta_batch_size: Count,
        log_every: Count,
        checkpoint_every: Count,
        runs_dir: str,
        data_dir: str,
        cache_dir: str,
        seed: NonNegativeInt = 0,
        seeds: Count = 1,
        precision: Precision = "float32",
        mode: Literal["train", "eval"] = "train",
        checkpoint: str | None = None,
        run_dir: str | None = None,
    ) -> None: ...


# The keys of the root on which trained numbers depend.
_TRAINING_KEYS = ("seed", "num_iterations", "meta_batch_size", "precision")


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Returns a config as resolved, plain containers.

    Raises:
        MamlError: if an interpolation cannot be resolved or a mandatory value is missing.
    """
    try:
        container = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise MamlError(f"the config cannot be resolved: {error}") from error
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def check(config: Mapping[str, Any]) -> None:
    """Checks every key of a plain config against the constructors.

    Raises:
        MamlError: listing every unknown, missing or ill-typed key, with the near misses.
    """
    parts = (*_TRAINING_PARTS, *_OTHER_PARTS)
    problems = [f"{part} is missing" for part in parts if part not in config]
    root = {key: value for key, value in config.items() if key not in parts}
    problems += _check_arguments("", Root, root, supplied=set(), also=parts)
    for part in parts:
        if part in config:
            problems += _check_part(part, config[part])
    if problems:
        raise MamlError("the config is not usable:\n  " + "\n  ".join(problems))


def _check_part(path: str, value: Any) -> list[str]:
    if not isinstance(value, Mapping) or "_target_" not in value:
        return [f"{path} has no _target_; choose one of the files in conf/{path}/"]
    try:
        target = get_class(value["_target_"])
    except Exception as error:
        return [f"{path}._target_={value['_target_']}: no such class ({error})"]
    arguments = {key: item for key, item in value.items() if key not in ("_target_", "_partial_")}
    return _check_arguments(path, target, arguments, supplied=_SUPPLIED.get(path, set()))


def _check_arguments(
    path: str, target: type, arguments: Mapping[str, Any], supplied: set[str], also: Iterable[str] = ()
) -> list[str]:
    """Compares arguments with the signature and annotations of a constructor."""
    prefix = f"{path}." if path else ""
    parameters = inspect.signature(target).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return []  # a user's class that takes anything
    allowed = {name: parameter for name, parameter in parameters.items() if name not in supplied}
    hints = _annotations(target)
    problems = []
    for name, value in arguments.items():
        if name not in allowed:
            problems.append(f"{prefix}{name} is not a key{near_miss(name, [*allowed, *also], prefix)}")
        elif isinstance(value, Mapping) and "_target_" in value:
            problems += _check_part(f"{prefix}{name}", value)
        elif name in hints:
            problems += _check_value(f"{prefix}{name}", value, hints[name])
    for name, parameter in allowed.items():
        if parameter.default is parameter.empty and name not in arguments:
            problems.append(f"{prefix}{name} is missing")
    return problems


def _annotations(target: type) -> dict[str, Any]:
    try:
        return get_type_hints(target.__init__, include_extras=True)  # type: ignore[misc]
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


def near_miss(name: str, allowed: Sequence[str], prefix: str = "") -> str:
    """Returns a hint behind an unknown name: what was probably meant, and what there is."""
    close = difflib.get_close_matches(name, allowed, n=1)
    meant = f": did you mean {prefix}{close[0]}?" if close else ";"
    return f"{meant} allowed: {', '.join(allowed)}"


def build(part: Mapping[str, Any], **supplied: Any) -> Any:
    """Makes a part: ``_target_`` called with its keys and with what the project supplies."""
    # Partial first: what is supplied must reach the constructor as it is, not by way of a config.
    return instantiate({**part, "_partial_": True}, _convert_="all")(**supplied)


def _differences_from_defaults(path: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """Flattens a part to dotted keys, without those at the constructor's own default."""
    target = get_class(value["_target_"])
    parameters, hints = inspect.signature(target).parameters, _annotations(target)
    flat: dict[str, Any] = {}
    for name, item in value.items():
        default = parameters[name].default if name in parameters else inspect.Parameter.empty
        if name in hints and not (isinstance(item, Mapping) and "_target_" in item):
            item = _typed(item, hints[name])
        if name in _PLACES or (default is not inspect.Parameter.empty and item == default):
            continue
        if isinstance(item, Mapping) and "_target_" in item:
            flat |= _differences_from_defaults(f"{path}.{name}", item)
        else:
            flat[f"{path}.{name}"] = json.loads(json.dumps(item))  # as it will be read back: lists, and names as keys
    return flat


def _typed(value: Any, annotation: Any) -> Any:
    """Returns a checked value in the type of its argument, so that 1 and 1.0 are one step size."""
    try:
        return TypeAdapter(annotation).validate_json(json.dumps(value))
    except PydanticUserError:
        return value  # a user's annotation that says nothing about configs


def training_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what trained numbers depend on, as dotted keys; keys at their default are left out.

    So an option added later, at its default, leaves the id of every earlier run as it is.
    """
    flat: dict[str, Any] = {}
    for part in _TRAINING_PARTS:
        flat |= _differences_from_defaults(part, config[part])
    flat["algorithm._target_"] = _trained_as(config) or config["algorithm"]["_target_"]
    defaults = inspect.signature(Root).parameters
    return flat | {key: config[key] for key in _TRAINING_KEYS if config[key] != defaults[key].default}


def evaluation_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what an evaluation of given parameters depends on, as `training_config` does."""
    flat = _differences_from_defaults("evaluation", config["evaluation"])
    return flat | ({"algorithm._target_": config["algorithm"]["_target_"]} if _trained_as(config) else {})


def _trained_as(config: Mapping[str, Any]) -> str | None:
    """Returns the algorithm that this one is in training; None unless they part in meta-test only."""
    return getattr(get_class(config["algorithm"]["_target_"]), "trained_as", None)  # a user's may be no `Algorithm`


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


def check_order(overrides: Sequence[str]) -> None:
    """Refuses a ``+debug=`` in front of ``+experiment=``: the experiment would undo it and run in full.

    Raises:
        MamlError: if the order is wrong.
    """
    names = [override.partition("=")[0] for override in overrides]
    if "+debug" in names and "+experiment" in names and names.index("+debug") < names.index("+experiment"):
        raise MamlError("+debug= must stand behind +experiment=, which would otherwise undo it; swap the two")


def compose(overrides: Sequence[str], config_dir: Path) -> tuple[dict[str, Any], str]:
    """Composes and checks a config as ``train.py`` does; returns it with the experiment's name."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    check_order(overrides)
    running = GlobalHydra.instance().hydra  # of train.py, which composes another config when it judges its numbers
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir.resolve()), version_base="1.3"):
            cfg = hydra_compose("config", list(overrides), return_hydra_config=True)
    finally:
        GlobalHydra.instance().hydra = running
    experiment = experiment_name(cfg.hydra.runtime.choices)
    config = plain(OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"]))
    check(config)
    return config, experiment


def experiment_name(choices: Mapping[str, str]) -> str:
    """Returns the name of the experiment chosen on the command line, or ``custom``."""
    return choices.get("experiment") or "custom"


def _explain_missing_plugin(option: Path) -> None:
    """Says what to install, if the plugin of Hydra that a launcher or sweeper overrides is missing."""
    (plugin,) = OmegaConf.load(option).defaults[0].values()
    extra, group = plugin.partition("_")[0], option.parent.name
    try:
        importlib.metadata.version(f"hydra-{extra}-{group}")
    except importlib.metadata.PackageNotFoundError:
        print(
            f"{group}={option.stem} needs hydra-{extra}-{group}, which is not installed: pip install -e '.[{extra}]'",
            file=sys.stderr,
        )


def explain_override_error(arguments: Sequence[str]) -> None:
    """Adds what Hydra's own message lacks when an override names no key or no file: what was probably meant."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException

    conf = Path(__file__).resolve().parents[1] / "conf"
    overrides = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
    chosen = [override for override in overrides if (conf / override.partition("=")[0].lstrip("+")).is_dir()]
    try:
        with initialize_config_dir(str(conf), version_base="1.3"):
            known = hydra_compose("config", chosen)
    except HydraException:
        known = None
    for override in overrides:
        name, _, value = override.partition("=")
        group = conf / name.lstrip("+")
        if group.is_dir():
            options = sorted(path.stem for path in group.glob("*.yaml"))
            if value not in options and "," not in value:
                print(f"{override}: no such file in conf/{group.name}/{near_miss(value, options)}", file=sys.stderr)
            elif group.name in ("launcher", "sweeper") and value in options:
                _explain_missing_plugin(group / f"{value}.yaml")
                if value == "slurm" and shutil.which("srun") is None:
                    print("launcher=slurm: no SLURM here (no srun); launcher=slurm_local does without", file=sys.stderr)
        elif known is not None and not name.startswith(("+", "~", "hydra")):
            *parents, last = name.split(".")
            if last.startswith("_"):
                continue
            node = OmegaConf.select(known, ".".join(parents)) if parents else known
            if isinstance(node, DictConfig) and last not in list(node):  # `in` denies what has no value yet
                keys = [str(key) for key in node if not str(key).startswith("_")]
                print(f"{name} is not a key{near_miss(last, keys, ''.join(p + '.' for p in parents))}", file=sys.stderr)
