"""The output of ``maml list`` and ``maml describe``."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from maml.config import files
from maml.config.hints import near_miss
from maml.config.paths import CONF
from maml.errors import MamlError

if TYPE_CHECKING:
    from maml.config.reference import Group, Key, Option


def experiments(text: str = "", own: tuple[Path, ...] = ()) -> str:
    """Returns one line per experiment: its name, and the first sentence of its file.

    Args:
        own: folders with a user's experiments, which are listed too.
        text: only experiments whose name or sentence contains this text are listed; upper case does not matter.

    Raises:
        MamlError: if no experiment contains the text.
    """
    rows = [(path.stem, files.read(path).summary) for folder in (CONF, *own) for path in _experiments(folder)]
    matches = [row for row in rows if text.lower() in " ".join(row).lower()]
    if not matches:
        words = sorted({word for name, _ in rows for word in name.split("_")})
        raise MamlError(f"no experiment has {text!r} in its name or description{near_miss(text, words)}")
    return _columns(matches)


def _experiments(folder: Path) -> list[Path]:
    return sorted((folder / "experiment").glob("*.yaml"))


def description(name: str = "", own: tuple[Path, ...] = ()) -> str:
    """Describes a key, a config group, an option or an experiment; without a name, all groups and keys of the root.

    Args:
        name: the key, group, option or experiment.
        own: folders with a user's options, which are described too.

    Raises:
        MamlError: if the name is unknown; the message suggests a similar one.
    """
    from maml.config.reference import reference  # imported here because it imports the whole framework

    root, *groups = reference(own=own)
    name = name.lstrip("+")
    if not name:
        return "\n\n".join((_group_list(groups), _option(root.options[0])))
    choice, is_option, value = name.partition("=")
    group = next((group for group in groups if group.name == choice), None)
    if group is not None:
        return _find_option(group, value) if is_option and value else _group(group)
    pairs = [(option, key) for group in (root, *groups) for option in group.options for key in option.keys]
    if matches := [(option, key) for option, key in pairs if key.name == choice]:
        return _key(choice, matches)
    (of_experiments,) = (group.options for group in groups if group.name == "experiment")
    if known := [option for option in of_experiments if option.name == name]:
        return _option(known[-1])
    raise _unknown_name_error(choice, [root, *groups])


def _unknown_name_error(name: str, groups: Sequence[Group]) -> MamlError:
    keys = list(dict.fromkeys(key.name for group in groups for option in group.options for key in option.keys))
    parent, _, last = name.rpartition(".")
    siblings = [key for key in keys if key.rpartition(".")[0] == parent]
    elsewhere = [key for key in keys if key.rpartition(".")[2] == last]
    if elsewhere:
        return MamlError(f"{name} is not a key: did you mean {' or '.join(elsewhere)}?")
    if parent and siblings:
        hint = near_miss(last, [key.rpartition(".")[2] for key in siblings], f"{parent}.")
        return MamlError(f"{name} is not a key{hint}")
    names = [group.name for group in groups if group.name] + [key for key in keys if "." not in key]
    return MamlError(f"{name} is neither a key nor a config group{near_miss(name, list(dict.fromkeys(names)))}")


def _group_list(groups: Iterable[Group]) -> str:
    return "Config groups (maml describe GROUP):\n" + _columns(
        (f"{group.name}={group.default}" if group.default else group.name, group.meaning) for group in groups
    )


def _group(group: Group) -> str:
    default = f" Default: {group.default}." if group.default else ""
    lines = _columns((f"{group.name}={option.name}", option.summary) for option in group.options)
    return f"{group.name}: {group.meaning}{default}\n{lines}"


def _find_option(group: Group, name: str) -> str:
    for option in group.options:
        if option.name == name:
            return _option(option)
    hint = near_miss(name, [option.name for option in group.options], f"{group.name}=")
    raise MamlError(f"{group.name}={name}: no such file in conf/{group.name}/{hint}")


def _option(option: Option) -> str:
    title = f"{option.group}={option.name}: " if option.group else ""
    lines = [_wrap(f"{title}{option.header}", "", "")]
    lines.append(f"  conf/{option.file}{f', {option.target}' if option.target else ''}")
    if option.keys:
        lines += ["", _columns((f"{key.name}={key.initial}", _meaning(key)) for key in option.keys)]
    if option.settings and option.group:
        rows = [(f"{setting.name}={setting.value}", setting.comment) for setting in option.settings]
        lines += ["", "It also sets:" if option.keys else "It sets:", _columns(rows)]
    return "\n".join(lines)


def _meaning(key: Key) -> str:
    allowed = key.type + (f", {key.range}" if key.range else "")
    return _single_backticks(f"{key.meaning} [{allowed}]")


def _key(name: str, matches: Sequence[tuple[Option, Key]]) -> str:
    """Describes a key of several options; options in which the key has the same meaning share one block."""
    groups: dict[tuple[str, str, str], list[tuple[Option, Key]]] = {}
    for option, key in matches:
        groups.setdefault((key.type, key.range, key.meaning), []).append((option, key))
    blocks = []
    for (type_, range_, meaning), members in groups.items():
        rows = [("meaning", _single_backticks(meaning)), ("type", type_)]
        rows += [("range", range_)] if range_ else []
        values: dict[str, list[str]] = {}
        for option, key in members:
            values.setdefault(key.initial, []).append(f"{option.group}={option.name}" if option.group else "")
        for value, options in values.items():
            where = f"  ({', '.join(options)})" if any(options) else ""
            shown = "none: you must set it" if value == "???" else value
            rows.append(("default", f"{shown}{where}"))
        blocks.append(_columns(rows))
    return f"{name}\n" + "\n\n".join(blocks)


def _single_backticks(text: str) -> str:
    return text.replace("``", "`")


def _columns(rows: Iterable[tuple[str, str]]) -> str:
    """Returns two aligned columns. On a terminal the second is wrapped; elsewhere each row is one line, for grep."""
    rows = list(rows)
    width = min(max(len(left) for left, _ in rows), 46)
    lines = []
    for left, right in rows:
        opening = f"  {left.ljust(width)}  "
        lines.append(_wrap(right, opening, " " * (width + 4)) if right else opening.rstrip())
    return "\n".join(lines)


def _wrap(text: str, first: str, others: str) -> str:
    if not sys.stdout.isatty():
        return first + text
    columns = max(60, shutil.get_terminal_size().columns)
    return textwrap.fill(text, columns, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)
