"""All methods that were tested on the same tasks, with paired differences: a page, and a section of the report."""

from __future__ import annotations

from collections.abc import Sequence

from maml.paper.markdown import markdown_table
from maml.paper.markup import Markup, element
from maml.paper.widgets import scroll_box
from maml.record.comparison import Tested, method_rows

_INTRODUCTION = (
    "Each table holds the methods of this repository that were tested on the same frozen tasks, the best one first. A "
    "difference from the best is paired over tasks, so its interval is narrower than those of the two means. All "
    "intervals are over tasks; of several runs that differ in the seed only, each task's mean counts. A method is "
    "judged by its own headline metric after its last gradient step, tested as its experiment asks, or else in its "
    "newest test on these tasks. Methods of one experiment name the settings in which they differ. A run with part of "
    "its iterations says so; its place in a table is no result."
)
_OWN = "`python scripts/runs.py methods` makes the same tables from your own runs."


def methods_markdown(groups: Sequence[Sequence[Tested]]) -> str:
    """Returns the page, with one table for each group of methods."""
    lines = ["# Methods on the same tasks", "", f"{_INTRODUCTION} {_OWN}", ""]
    for group in _in_order(groups):
        rows = method_rows(group)
        lines += [f"## {_title(group)}", "", *markdown_table([*rows[0]], ([*row.values()] for row in rows)), ""]
    return "\n".join([*lines, "Made by `make paper-tables`.", ""])


def methods_section(groups: Sequence[Sequence[Tested]]) -> list[Markup]:
    """Returns the section of the report, with one table for each group of methods."""
    parts = [element("p", _INTRODUCTION, class_="muted")]
    for group in _in_order(groups):
        rows, title = method_rows(group), _title(group)
        head = element("thead", element("tr", [element("th", name, scope="col") for name in rows[0]]))
        lines = [
            element(
                "tr",
                element("th", name, scope="row"),
                [element("td", text) for text in numbers],
            )
            for name, *numbers in (row.values() for row in rows)
        ]
        table = element("table", head, element("tbody", lines), class_="methods")
        parts.append(element("article", element("h3", title), scroll_box(table, title)))
    return parts


def _in_order(groups: Sequence[Sequence[Tested]]) -> list[Sequence[Tested]]:
    return sorted(groups, key=lambda group: (group[0].domain, group[0].num_shots, -len(group), group[0].bank))


def _title(group: Sequence[Tested]) -> str:
    best = group[0]
    direction = "larger" if best.larger_is_better else "smaller"
    return f"{best.domain}, {best.tasks} of bank {best.bank[:6]} ({direction} is better)"
