"""Reads the yaml files of ``conf/`` as text: their header comments, their values, and the comments beside them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from maml.config.paths import CONF


@dataclass(frozen=True)
class Entry:
    """A value as written in the file, and the comment on its line."""

    value: str
    comment: str


@dataclass(frozen=True)
class ConfigFile:
    """A yaml file, merged with the files of the same folder that its defaults list includes.

    Attributes:
        header: the comment at the top of the file.
        is_global: whether it sets keys of the root instead of keys of its folder's config group.
        entries: the values that it sets, by dotted name.
        choices: the options that its defaults list chooses, by config group.
    """

    header: str
    is_global: bool
    entries: dict[str, Entry]
    choices: dict[str, str]

    @property
    def summary(self) -> str:
        """The first sentence of the header, without the command that may follow it."""
        return re.split(r"(?<=[.:])\s{2,}|(?<=\.)\s+(?=[A-Z])", self.header, maxsplit=1)[0]


@cache
def read(path: Path) -> ConfigFile:
    """Reads a yaml file; the result is cached."""
    text = path.read_text()
    lines = text.splitlines()
    is_global = "# @package _global_" in lines
    opening = []
    for line in lines:
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            opening.append(line.removeprefix("#").strip())
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    entries: dict[str, Entry] = {}
    choices: dict[str, str] = {}
    if isinstance(root, yaml.MappingNode):
        for node in _defaults(root):
            if isinstance(node, yaml.MappingNode):  # `model: mlp`, `override /inner: adam`
                for key, value in node.value:
                    name = key.value.removeprefix("override ").removeprefix("/").replace("/", ".")
                    if value.value != "null":
                        choices[name] = value.value
            elif node.value != "_self_":
                beside = path.with_name(f"{node.value}.yaml")  # a user's file can include one of the project
                other = read(beside if beside.exists() else CONF / path.parent.name / beside.name)
                entries |= other.entries
                choices |= other.choices
        entries |= dict(_entries(root, "", is_global, text, lines))
    return ConfigFile(" ".join(opening), is_global, entries, choices)


def _defaults(root: yaml.MappingNode) -> list[yaml.Node]:
    for key, value in root.value:
        if key.value == "defaults" and isinstance(value, yaml.SequenceNode):
            return value.value
    return []


def _entries(
    node: yaml.MappingNode, prefix: str, has_parts: bool, text: str, lines: Sequence[str]
) -> Iterator[tuple[str, Entry]]:
    """Yields the values of a mapping by dotted name.

    A nested mapping with a ``_target_`` counts as one value, unless it is a part of a global file (``has_parts``).
    """
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        if name == "defaults":
            continue
        makes_object = isinstance(value, yaml.MappingNode) and "_target_" in [inner.value for inner, _ in value.value]
        if isinstance(value, yaml.MappingNode) and value.value and (has_parts or not makes_object):
            yield from _entries(value, f"{name}.", False, text, lines)
        else:
            raw = text[value.start_mark.index : value.end_mark.index]
            if isinstance(value, yaml.MappingNode) and "\n" in raw:
                inner = [text[name.start_mark.index : item.end_mark.index] for name, item in value.value]
                raw = "{" + ", ".join(inner) + "}"
            end = value.end_mark if value.end_mark.line == key.start_mark.line else key.end_mark
            comment = re.search(r"\s#\s+(.*)$", lines[key.start_mark.line][end.column :])
            yield name, Entry(" ".join(raw.split()), comment[1] if comment else "")
