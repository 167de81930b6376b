"""The schema of the config: a part's keys are its constructor's arguments, their types its annotations."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from maml.algorithm.base import Algorithm
from maml.config.hints import near_miss
from maml.config.names import check_allowed, locate, locate_callable, named_modules
from maml.domain.base import Domain, without_data
from maml.errors import MamlError, UnknownKeys
from maml.evaluation import Evaluation
from maml.hardware.base import Hardware
from maml.hardware.precision import Precision
from maml.inner.base import Inner
from maml.logger.base import Logger
from maml.model.base import Model
from maml.outer.base import Outer
from maml.types import Count, FilePath, NonNegativeInt, Seed

# Arguments that the project itself passes to a part's constructor.
SUPPLIED = {
    "model": {"in_shape", "out_dim"},
    "algorithm": {"parts"},
}
# Arguments that the project passes if the config does not set them.
_SUPPLIED_IF_MISSING = {"model.module": {"in_shape", "out_dim"}}
# Keys to which Hydra gives a meaning that is not used here.
_HYDRA_KEYS = {"_args_", "_convert_", "_recursive_"}
_SCALARS = {bool, bytes, float, int, str, type(None)}
_ANYTHING = {Any, object, type, list, dict, tuple, Callable, Mapping, Sequence}
_TOO_LARGE = 2**63  # tensors hold integers below this
_LARGEST_FLOAT = 3.4e38
_SMALLEST_FLOAT = 1.2e-38  # below it, float32 loses digits, or is 0
_LONGEST_SHOWN = 100  # characters of a wrong value that a message shows
# The parts on which trained numbers depend, in the order of error messages.
TRAINING_PARTS = ("domain", "model", "inner", "outer", "algorithm")
PARTS = (*TRAINING_PARTS, "evaluation", "hardware", "logger")
# The class from which the class of a part inherits.
_BASES = dict(zip(PARTS, (Domain, Model, Inner, Outer, Algorithm, Evaluation, Hardware, Logger), strict=True))

Part = Mapping[str, Any]
"""``_target_``, the address of a class (with ``_partial_``, or of a function), and its arguments."""


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
        changed_sources: what happens if the data set, or the code of a class outside this project, has changed since
            the run was trained: ``refuse`` stops before anything is written; ``accept`` uses the run as it is.
        run_dir: folder of this run; null is ``runs_dir/<experiment>/<run id>``.
        runs_dir: folder in which run folders are made.
        data_dir: folder of the data sets.
        cache_dir: folder in which tensors built from data sets are cached.
        validate_every: number of iterations between two measurements on validation tasks, by which the best theta is
            kept; null keeps none.
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

    seed: Seed = 0
    seeds: Count = 1
    num_iterations: NonNegativeInt
    meta_batch_size: Count
    precision: Precision = "float32"
    mode: Literal["train", "eval"] = "train"
    checkpoint: FilePath | None = None
    changed_sources: Literal["refuse", "accept"] = "refuse"
    run_dir: FilePath | None = None
    runs_dir: FilePath
    data_dir: FilePath
    cache_dir: FilePath
    validate_every: Count | None = None
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


def check(config: Mapping[str, Any], allow: Sequence[str] | None = None) -> Settings:
    """Checks every key of a plain config against the constructors' signatures and annotations.

    Args:
        config: plain dicts, lists and scalars.
        allow: None for the user's own config, whose classes may come from any package. For a file that may come from
            somebody else: the modules outside this package that may be imported. All addresses are checked before
            anything is imported.

    Raises:
        UnknownKeys: if a key does not exist; it lists all that is wrong.
        MamlError: lists every missing or ill-typed key; or names a class that the file may not use.
    """
    if allow is not None:
        for key, value, module in named_modules(config):
            check_allowed(module, f"{key}={value}", allow)
    problems = [f"{part} is missing" for part in PARTS if part not in config]
    root = {key: value for key, value in config.items() if key not in PARTS}
    problems += _check_arguments("", Settings, root, set(PARTS), allow, more_keys=PARTS)
    for part in PARTS:
        if part in config:
            problems += _check_part(part, config[part], _BASES[part], allow)
    if problems:
        text = "the config is not valid:\n  " + "\n  ".join(problems)
        unknown = [problem.key for problem in problems if isinstance(problem, _UnknownKey)]
        raise UnknownKeys(text, unknown) if unknown else MamlError(text)
    return Settings(**config)


class _UnknownKey(str):
    """A problem of a config: a key that does not exist."""

    def __new__(cls, key: str, hint: str) -> _UnknownKey:
        problem = super().__new__(cls, f"{key} is not a key{hint}")
        problem.key = key
        return problem

    key: str


def _check_part(path: str, value: Any, annotation: Any, allow: Sequence[str] | None = None) -> list[str]:
    """Checks a part: its class against the annotation of the argument that takes it, its keys against the class."""
    if not isinstance(value, Mapping) or "_target_" not in value:
        return [f"{path} has no _target_; choose one of the files in conf/{path}/"]
    named, is_partial = f"{path}._target_={value['_target_']}", value.get("_partial_", False)
    try:
        # With _partial_, the target may be a function that makes the object.
        target = (locate_callable if is_partial else locate)(value["_target_"], allow)
    except MamlError as error:
        return [f"{path}: {error}"]
    except Exception as error:
        return [f"{named}: no such class ({error}){_where_to_put(value['_target_'], error)}"]
    accepted = list(_accepted(annotation))
    bases = [base for base, takes_callable in accepted if takes_callable in (is_partial, None)]
    if not accepted:
        return [f"{path} is a plain value, not a part; remove its _target_"]
    if not bases:
        wanted = "true, because it takes a callable" if accepted[0][1] else "left out, because it takes no callable"
        return [f"{path}._partial_={is_partial} has to be {wanted}"]
    names = " or ".join(f"{base.__module__}.{base.__qualname__}" for base in bases)
    if not isinstance(target, type):
        if reason := _unfit_function(target, bases, names, allow):
            return [f"{named}: no such class (it is a {type(target).__name__}, not a class){reason}"]
    elif not any(_inherits(target, base) for base in bases):
        return [f"{named}: the class has to inherit from {names}"]
    if lacking := getattr(target, "__abstractmethods__", None):
        return [f"{named}: the class lacks {', '.join(sorted(lacking))}, which its base class asks for"]
    arguments = {key: item for key, item in value.items() if key not in ("_target_", "_partial_")}
    return _check_arguments(path, target, arguments, SUPPLIED.get(path, set()), allow)


def _where_to_put(target: Any, error: Exception) -> str:
    """Returns what makes Python find the module of a user's class; empty if something else is wrong."""
    top, _, rest = str(target).partition(".")
    if not isinstance(error, ModuleNotFoundError) or error.name != top:
        return ""
    module = f"{top}/" if "." in rest else f"{top}.py"
    return f"; put the folder that holds {module} on PYTHONPATH, or start `maml train` there"


def _unfit_function(target: Callable[..., Any], bases: Sequence[type], names: str, allow: Sequence[str] | None) -> str:
    """Returns why a function cannot take the place of a class; empty if it can.

    Args:
        target: the function.
        bases: what it may return.
        names: the names of these classes.
        allow: as in `check`. A function of a file from somebody else has to say what it returns, so that such a file
            cannot call just any function of an allowed module.
    """
    annotation = argument_types(target).get("return")
    returned = get_origin(annotation) or annotation
    if isinstance(returned, type) and returned is not Any:
        fits = any(_inherits(returned, base) for base in bases)
        return "" if fits else f"; it returns {returned.__name__}, not {names}"
    if allow is not None:
        return f"; to be called from a file, its annotation has to say that it returns {names}"
    return ""


def _check_arguments(
    path: str,
    target: Callable[..., Any],
    arguments: Mapping[str, Any],
    supplied: set[str],
    allow: Sequence[str] | None,
    more_keys: Iterable[str] = (),
) -> list[str]:
    """Compares arguments with the signature and annotations of a constructor."""
    prefix = f"{path}." if path else ""
    try:
        parameters = inspect.signature(target).parameters
    except ValueError:  # a class written in C
        return []
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    allowed = {
        name: parameter
        for name, parameter in parameters.items()
        if name not in supplied and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    hints = argument_types(target)
    problems: list[str] = []
    for name, value in arguments.items():
        if name in _HYDRA_KEYS or not (name in allowed or takes_any):
            hint = near_miss(name, [*allowed, *more_keys], prefix)
            problems.append(_UnknownKey(f"{prefix}{name}", hint))
        elif parts := list(_outermost_parts(f"{prefix}{name}", value)):
            annotation = hints.get(name, Any)
            problems += [line for inner, part in parts for line in _check_part(inner, part, annotation, allow)]
        elif name in hints and not takes_any:
            problems += _check_value(f"{prefix}{name}", value, hints[name])
    for name, parameter in allowed.items():
        present = arguments.keys() | _SUPPLIED_IF_MISSING.get(path, set())
        if parameter.default is parameter.empty and name not in present and not takes_any:
            problems.append(f"{prefix}{name} is missing")
    return problems


def _outermost_parts(path: str, value: Any) -> Iterator[tuple[str, Part]]:
    """Yields the parts in an argument: itself, or those in its lists and mappings."""
    if isinstance(value, Mapping) and "_target_" in value:
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _outermost_parts(f"{path}.{key}", item)
    elif isinstance(value, list):
        for position, item in enumerate(value):
            yield from _outermost_parts(f"{path}.{position}", item)


def _accepted(annotation: Any) -> Iterator[tuple[type, bool | None]]:
    """Yields the base classes of the parts that an argument's annotation accepts; numbers and texts are no parts.

    Yields:
        The base class (`object` if anything goes), and whether the argument takes a callable that makes such an
        object (``_partial_``); None if the annotation does not say.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _accepted(arguments[0])
    elif origin in (Callable, type) and arguments:
        yield from ((base, True) for base, _ in _accepted(arguments[-1]))
    elif origin in (Union, UnionType) or (isinstance(origin, type) and issubclass(origin, Collection)):
        for argument in arguments:
            if argument is not Ellipsis:
                yield from _accepted(argument)
    elif isinstance(cls := origin or annotation, type) and cls not in _ANYTHING:
        if cls not in _SCALARS:
            yield cls, False
    elif origin is not Literal:  # Any, a type variable, a list of anything
        yield object, None


def _inherits(cls: type, base: type) -> bool:
    try:
        return issubclass(cls, base)
    except TypeError:  # a user's protocol, which cannot be checked
        return True


def argument_types(target: Callable[..., Any]) -> dict[str, Any]:
    """Returns the types of the arguments of a constructor or function by name; empty if they cannot be resolved."""
    # A dataclass resolves inherited fields in the modules that declare them.
    annotated = target.__init__ if isinstance(target, type) and not is_dataclass(target) else target  # type: ignore[misc]
    try:
        return get_type_hints(annotated, include_extras=True)
    except (NameError, TypeError):  # annotations imported under TYPE_CHECKING only; a callable object
        return {}


def _check_value(path: str, value: Any, annotation: Any) -> list[str]:
    shown = _shortened(repr(value))
    for number in _numbers(value):
        if isinstance(number, int) and abs(number) >= _TOO_LARGE:
            return [f"{path}={shown}: an integer is below 2^63"]
        if _LARGEST_FLOAT < abs(number) < math.inf:
            return [f"{path}={shown}: a number is at most {_LARGEST_FLOAT:.1e}, the largest of float32"]
        if 0 < abs(number) < _SMALLEST_FLOAT:
            return [f"{path}={shown}: a number is 0 or at least {_SMALLEST_FLOAT:.1e}, the smallest of float32"]
    try:
        config = ConfigDict(allow_inf_nan=False, arbitrary_types_allowed=True)
        adapter: TypeAdapter[Any] = TypeAdapter(annotation, config=config)
        # Through JSON, so that a list is accepted for a tuple, but "3" or true is not accepted for 3.
        checked = adapter.validate_json(json.dumps(value), strict=True)
    except (PydanticUserError, TypeError):
        return []  # a user's annotation that pydantic cannot check
    except ValidationError as error:
        reasons = dict.fromkeys(_reason(detail, annotation) for detail in error.errors())
        return [f"{path}={shown}: {'; or '.join(reasons)}"]
    if _has_lost_boolean(value, checked):  # Literal[1, 2] accepts true, which equals 1
        return [f"{path}={shown}: input should be a number, not true or false"]
    return []


def _reason(detail: Mapping[str, Any], annotation: Any) -> str:
    """Returns the reason for which pydantic refuses a value, in words that fit a yaml file."""
    if detail["type"] == "needs_python_object":  # the annotation asks for an object of a class
        names = " or ".join(f"{cls.__module__}.{cls.__qualname__}" for cls, _ in _accepted(annotation))
        return f"input should be a part, a mapping with a _target_ that is {names} or inherits from it"
    message = detail["msg"].removeprefix("Value error, ").replace("a valid array", "a list, such as [a, b]")
    for words in ("a valid dictionary", "a valid mapping", "an object"):
        message = message.replace(words, "a mapping, such as {a: 1}")
    return message[:1].lower() + message[1:]


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def _numbers(value: Any) -> Iterator[int | float]:
    """Yields the numbers in a value of a config."""
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _numbers(item)


def _has_lost_boolean(value: Any, checked: Any) -> bool:
    """Returns whether a boolean in a value was taken for something else."""
    if isinstance(value, bool):
        return not isinstance(checked, bool)
    if isinstance(value, Mapping) and isinstance(checked, Mapping):
        return any(map(_has_lost_boolean, value.values(), checked.values()))
    if isinstance(value, list) and isinstance(checked, list | tuple):
        return any(map(_has_lost_boolean, value, checked))
    return False


def build(part: Part, **supplied: Any) -> Any:
    """Builds a part: calls its ``_target_`` with its keys and with the arguments that the project supplies."""
    return locate(part["_target_"])(**_arguments(part), **supplied)


def build_without_data(domain: Part) -> Domain[Any]:
    """Builds a domain, and domains among its arguments, within `maml.domain.base.without_data`: no data set is read."""
    with without_data():
        built: Domain[Any] = build(domain)
    return built


def _arguments(part: Part) -> dict[str, Any]:
    return {key: _built(value) for key, value in part.items() if key not in ("_target_", "_partial_")}


def _built(value: Any) -> Any:
    """Copies a value of a config, and builds the parts in it. Texts stay as they are: no interpolation is resolved."""
    if isinstance(value, Mapping):
        if "_target_" not in value:
            return _arguments(value)
        if value.get("_partial_"):
            return partial(locate_callable(value["_target_"]), **_arguments(value))
        return build(value)
    return [_built(item) for item in value] if isinstance(value, list | tuple) else value
