"""A page of all methods that were tested on the same tasks, with paired differences."""

from __future__ import annotations

from collections.abc import Sequence

from maml.record.comparison import Tested, method_rows

_INTRODUCTION = (
    "Each table holds the methods of this repository that were tested on the same frozen tasks, the best one first. A "
    "difference from the best is paired over tasks, so its interval is narrower than those of the two means. All "
    "intervals are over tasks; of several runs that differ in the seed only, each task's mean counts. A method is "
    "judged by its own headline metric after its last gradient step. A run with part of its iterations says so; its "
    "place in a table is no result. `python scripts/runs.py methods` makes the same tables from your own runs."
)


def methods_markdown(groups: Sequence[Sequence[Tested]]) -> str:
    """Returns the page, with one table for each group of methods."""
    lines = ["# Methods on the same tasks", "", _INTRODUCTION, ""]
    for group in sorted(groups, key=lambda each: (each[0].domain, each[0].num_shots, -len(each))):
        best, rows = group[0], method_rows(group)
        direction = "larger" if best.larger_is_better else "smaller"
        lines += [f"## {best.domain}, K={best.num_shots}, {len(best.values)} tasks ({direction} is better)", ""]
        lines += ["| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])]
        lines += ["| " + " | ".join(row.values()) + " |" for row in rows]
        lines.append("")
    return "\n".join([*lines, "Made by `make paper-tables`.", ""])
