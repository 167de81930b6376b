"""The reference of all config keys: type, range, default and meaning, read from constructors and yaml files.

`reference` is the source of `maml describe` and of the documentation's reference pages.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import AfterValidator

from maml.config import files
from maml.config.files import Entry
from maml.config.names import locate
from maml.config.paths import CONF
from maml.config.schema import PARTS, SUPPLIED, Settings, argument_types


@dataclass(frozen=True)
class Key:
    """One key of an option, or of the root.

    Attributes:
        name: name on the command line: ``inner.step_size``, ``num_iterations``.
        type: type in words: ``number or null``, ``relu, softplus or tanh``, ``list of integers``.
        range: allowed range of its numbers: ``> 0``, ``>= 0 and < 1``; empty if unlimited.
        default: the constructor's default, as yaml; None if there is none.
        value: the value in the option's yaml file; None if the file does not set the key.
        meaning: one or more sentences.
    """

    name: str
    type: str
    range: str
    default: str | None
    value: str | None
    meaning: str

    @property
    def initial(self) -> str:
        """The value if the command line does not set the key; ``???`` if the command line must set it."""
        return next((text for text in (self.value, self.default) if text is not None), "???")


@dataclass(frozen=True)
class Setting:
    """A key of another group that an option sets, such as ``inner.order`` of ``algorithm=fomaml``.

    Attributes:
        name: name of the key, or of the config group whose option is chosen.
        value: the value, as yaml.
        comment: the comment on its line in the file; empty if there is none.
    """

    name: str
    value: str
    comment: str


@dataclass(frozen=True)
class Option:
    """One yaml file of a config group.

    Attributes:
        group: name of its config group; empty for the root.
        name: name of the option, such as ``sgd`` in ``inner=sgd``.
        file: path below ``conf/``, with forward slashes.
        header: the comment at the top of the file.
        summary: the first sentence of the header.
        target: address of the class whose constructor has the keys; empty if the option only has settings.
        keys: the constructor's arguments; for the root, the attributes of `Settings`.
        settings: all other values that the file sets.
    """

    group: str
    name: str
    file: str
    header: str
    summary: str
    target: str
    keys: tuple[Key, ...]
    settings: tuple[Setting, ...]


@dataclass(frozen=True)
class Group:
    """A config group, ``conf/<name>/``. The root is a group with an empty name and one option, ``config``.

    Attributes:
        name: name of the folder; empty for the root.
        meaning: one sentence on what its options decide.
        default: name of the option that is used if the command line chooses none; None if there is none.
        options: the options, sorted by name.
    """

    name: str
    meaning: str
    default: str | None
    options: tuple[Option, ...]


# Meanings of the groups that are not attributes of `Settings`.
_MEANINGS = {
    "": "Keys that every run has.",
    "experiment": "All settings of one experiment: +experiment=NAME.",
    "debug": "Shrinks any experiment: +debug=NAME, after +experiment=.",
    "launcher": "Where the jobs of a sweep (-m) run.",
    "sweeper": "How a sweep (-m) chooses its jobs.",
}


@cache
def reference(conf: Path = CONF, own: tuple[Path, ...] = ()) -> tuple[Group, ...]:
    """Returns the root, then every config group, with all options and their keys.

    Args:
        conf: folder of the yaml files.
        own: further folders, with a user's options.
    """
    chosen = files.read(conf / "config.yaml").choices
    meanings = _meanings(Settings) | _MEANINGS
    names = ["", *PARTS, *sorted(path.name for path in conf.iterdir() if path.is_dir() and path.name not in PARTS)]
    return tuple(
        Group(
            name,
            _as_sentence(meanings.get(name, "")),
            chosen.get(name),
            tuple(_option(path, name) for folder in (conf, *own) for path in _files(folder, name)),
        )
        for name in names
    )


def _files(conf: Path, group: str) -> list[Path]:
    return sorted((conf / group).glob("*.yaml") if group else conf.glob("config.yaml"))


def _option(path: Path, group: str) -> Option:
    file = files.read(path)
    at = "" if file.is_global or not group else f"{group}."
    entries = {f"{at}{name}": entry for name, entry in file.entries.items()}
    keys: list[Key] = []
    target = ""
    if not group:
        for key in _keys(Settings, "", entries, set()):
            if key.name in PARTS:
                key = replace(key, type=f"one of conf/{key.name}/", range="", value=file.choices.get(key.name))
            keys.append(key)
    elif group in PARTS and f"{group}._target_" in entries:
        target = entries[f"{group}._target_"].value
        keys = list(_keys(locate(target), f"{group}.", entries, SUPPLIED.get(group, set())))
    known = {key.name for key in keys} | {f"{group}._target_"}
    settings = [Setting(name, choice, "") for name, choice in file.choices.items() if group]
    settings += [
        Setting(name, entry.value, entry.comment)
        for name, entry in entries.items()
        if not any(name == key or name.startswith(f"{key}.") for key in known)
    ]
    name = f"{path.parent.name}/{path.name}" if group else path.name
    return Option(group, path.stem, name, file.header, file.summary, target, tuple(keys), tuple(settings))


def _keys(target: Any, prefix: str, entries: Mapping[str, Entry], supplied: set[str]) -> Iterator[Key]:
    """Yields the keys of a constructor. An argument that is a documented class is followed by that class's keys."""
    types_, meanings = argument_types(target), _meanings(target)
    for name, parameter in inspect.signature(target).parameters.items():
        if name in supplied or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        annotation, entry = types_.get(name, Any), entries.get(f"{prefix}{name}")
        words, ranges = _type_in_words(annotation), list(dict.fromkeys(_ranges(annotation)))
        default = None if parameter.default is parameter.empty else _as_yaml(parameter.default)
        meaning = meanings.get(name) or (entry.comment if entry else "")
        yield Key(
            f"{prefix}{name}", words, "; ".join(ranges), default, entry.value if entry else None, _as_sentence(meaning)
        )
        for nested in _classes(annotation):
            yield from _keys(nested, f"{prefix}{name}.", entries, set())


def _as_yaml(value: Any) -> str:
    if isinstance(value, float) and value == int(value):
        return f"{value:.1f}"
    if isinstance(value, float):
        return str(value)
    text: str = yaml.safe_dump(list(value) if isinstance(value, tuple) else value, default_flow_style=True)
    return text.removesuffix("\n").removesuffix("\n...")


_YAML = {"None": "null", "True": "true", "False": "false"}


def _as_sentence(text: str) -> str:
    """Returns a meaning as a sentence, with yaml's words for None, True and False.

    The first letter becomes a capital, unless the text starts with a formula such as ``theta'``.
    """
    if not text:
        return ""
    for name, value in _YAML.items():
        text = re.sub(rf"\b{name}\b", value, text)
    first = re.match(r"[a-z]+(?:-[a-z]+)*(?=[ ,;:.]|$)", text)
    opened = text[0].upper() + text[1:] if first and len(first[0]) > 1 else text
    return opened if opened.endswith((".", "!", "?")) else f"{opened}."


# --- annotations in words ---


def _union(annotation: Any) -> tuple[Any, ...]:
    """Returns the members of a union, or the annotation itself if it is not a union."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


_PLAIN = {
    int: ("integer", "integers"),
    float: ("number", "numbers"),
    str: ("text", "texts"),
    bool: ("true or false", "booleans"),
    Any: ("anything", "anything"),
}
_COUNTS = {1: "one", 2: "two", 3: "three", 4: "four"}


def _type_in_words(annotation: Any) -> str:
    """Returns the type that an annotation allows, in words: ``integer, auto or all``."""
    words: list[str] = []
    ends_with_null = False
    for member in _union(annotation):
        if member is type(None):
            ends_with_null = True
        elif get_origin(member) is Literal:
            words += [_as_yaml(value) for value in get_args(member)]
        elif _without_metadata(member) is bool:
            words += ["true", "false"]
        else:
            words.append(_member_in_words(member, plural=False))
    words += ["null"] * ends_with_null
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _without_metadata(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _member_in_words(annotation: Any, plural: bool) -> str:
    annotation = _without_metadata(annotation)
    if len(members := _union(annotation)) > 1:
        *first, last = (_member_in_words(member, plural) for member in members)
        return f"{', '.join(first)} or {last}"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in _PLAIN:
        return _PLAIN[annotation][plural]
    if origin is Literal:
        return " or ".join(_as_yaml(value) for value in arguments)
    if origin is tuple and Ellipsis not in arguments:
        return (
            f"{_COUNTS.get(len(arguments), len(arguments))} {_member_in_words(arguments[0], plural=len(arguments) > 1)}"
        )
    if origin in (list, tuple, Sequence) or (isinstance(origin, type) and issubclass(origin, Sequence)):
        return f"list{'s' * plural} of {_member_in_words(arguments[0], plural=True)}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        key, value = arguments
        return (
            f"mapping{'s' * plural} of {_member_in_words(key, plural=True)} to {_member_in_words(value, plural=True)}"
        )
    if origin is not None and isinstance(origin, type) and issubclass(origin, Callable):  # type: ignore[arg-type]
        return "class (_target_) and its arguments"
    if isinstance(annotation, type):
        return f"{annotation.__module__}.{annotation.__qualname__} (_target_)"
    return str(annotation)


def _ranges(annotation: Any) -> Iterator[str]:
    """Yields the bounds on an annotation's numbers and on the lengths of its lists."""
    for member in _union(annotation):
        if get_origin(member) is Annotated:
            bare, *metadata = get_args(member)
            bounds = [_bound(one) for one in metadata]
            if text := " and ".join(bound for bound in bounds if bound):
                yield text
            yield from _ranges(bare)
        elif get_origin(member) is not Literal:
            for argument in get_args(member):
                if argument is not Ellipsis and not isinstance(argument, list):  # list: a callable's argument types
                    yield from _ranges(argument)


def _bound(metadata: Any) -> str:
    match metadata:
        case Gt(gt):
            return f"> {gt}"
        case Ge(ge):
            return f">= {ge}"
        case Lt(lt):
            return f"< {lt}"
        case Le(le):
            return f"<= {le}"
        case MinLen(length):
            return f"at least {length} {'entry' if length == 1 else 'entries'}"
        case AfterValidator():
            return (inspect.getdoc(metadata.func) or "").partition("\n")[0].rstrip(".").lower()
    return ""


def _classes(annotation: Any) -> Iterator[type]:
    """Yields the classes of an annotation whose constructors document their arguments."""
    for member in _union(annotation):
        bare = _without_metadata(member)
        if inspect.isclass(bare) and get_origin(bare) is None and bare.__module__ != "builtins" and _meanings(bare):
            yield bare


# --- docstrings ---


def _meanings(target: Any) -> dict[str, str]:
    """Returns the documented meaning of each constructor argument, from a class and its base classes."""
    meanings: dict[str, str] = {}
    for cls in inspect.getmro(target):
        doc = cls.__dict__.get("__doc__")
        if doc and cls.__module__ != "builtins":
            for section in ("Args", *(["Attributes"] if is_dataclass(cls) else [])):
                meanings = _section(inspect.cleandoc(doc), section) | meanings
    return meanings


def _section(doc: str, name: str) -> dict[str, str]:
    """Returns the entries of one section of a Google-style docstring, by name."""
    match = re.search(rf"^{name}:\n((?:[ \t]+.*\n?|\n)+)", doc, flags=re.MULTILINE)
    if match is None:
        return {}
    entries = re.findall(r"^ {4}(\w[\w, ]*?):\s+(.*(?:\n {5,}.*)*)", match[1], flags=re.MULTILINE)
    return {one.strip(): " ".join(text.split()) for names, text in entries for one in names.split(",")}
