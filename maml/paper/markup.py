"""HTML and SVG elements; text is escaped unless it is already markup."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import TypeAlias


class Markup(str):
    """Text that is already HTML; every other string is escaped when it becomes part of an element."""


Content: TypeAlias = str | Iterable["Content"]
"""Text, markup, or a sequence of both."""

_VOID = ("br", "img", "input", "link", "meta")


def join(content: Content) -> Markup:
    """Converts content to markup."""
    if isinstance(content, Markup):
        return content
    return Markup(escape(content) if isinstance(content, str) else "".join(map(join, content)))


def element(tag: str, *content: Content, **attributes: object) -> Markup:
    """Returns one element.

    Args:
        tag: name of the element.
        content: content of the element.
        attributes: attributes by name; ``class_`` stands for ``class`` and ``data_of`` for ``data-of``. True gives an
            attribute without a value; None and False are left out.
    """
    text = "".join(
        f" {name.strip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(str(value))}"')
        for name, value in attributes.items()
        if value is not None and value is not False
    )
    return Markup(f"<{tag}{text}>" if tag in _VOID else f"<{tag}{text}>{join(content)}</{tag}>")
