"""HTML and SVG elements whose text is escaped unless it is markup already."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import TypeAlias


class Markup(str):
    """Text that is HTML already; any other is escaped where it becomes part of an element."""


Content: TypeAlias = str | Iterable["Content"]
"""Text, markup, or several of them one behind the other."""

_VOID = ("br", "img", "link", "meta")


def join(content: Content) -> Markup:
    """Returns content as markup."""
    if isinstance(content, Markup):
        return content
    return Markup(escape(content) if isinstance(content, str) else "".join(map(join, content)))


def element(tag: str, *content: Content, **attributes: object) -> Markup:
    """Returns one element.

    Args:
        tag: its name.
        content: what stands in it.
        attributes: ``class_`` is ``class`` and ``data_of`` is ``data-of``; True is an attribute without a value; None
            and False are left out.
    """
    text = "".join(
        f" {name.strip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(str(value))}"')
        for name, value in attributes.items()
        if value is not None and value is not False
    )
    return Markup(f"<{tag}{text}>" if tag in _VOID else f"<{tag}{text}>{join(content)}</{tag}>")
