"""The accuracy of each class of a data set, and how often one class was taken for another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maml.domain.base import Predictions

TABLES = {
    "classes.csv": ("num_shots", "class", "examples", "accuracy"),
    "confusion.csv": ("num_shots", "class", "taken_for", "examples", "of"),
}
"""The columns of each file beside ``report.json``."""


@dataclass(frozen=True)
class Confusion:
    """What the query examples of one K were taken for, after the last gradient step.

    Attributes:
        num_shots: K.
        names: the name of each class of the data set.
        true, taken_for: the pairs of classes that were in a task together, as numbers in ``names``, ``(P,)`` each, in
            ascending order. A class makes a pair with itself.
        count: number of examples of the class ``true`` that were taken for ``taken_for``, ``(P,)``.
        chances: number of examples of ``true`` in the tasks that have both classes, ``(P,)``.
    """

    num_shots: int
    names: Sequence[str]
    true: Tensor
    taken_for: Tensor
    count: Tensor
    chances: Tensor

    def class_rows(self) -> list[dict[str, Any]]:
        """Returns the rows of ``classes.csv``: the number of examples of each class, and the share that was right."""
        rows = [row for row in self._rows() if row["true"] == row["taken_for"]]
        return [
            {
                "num_shots": self.num_shots,
                "class": self.names[row["true"]],
                "examples": row["chances"],
                "accuracy": float(f"{row['count'] / row['chances']:.7g}"),
            }
            for row in rows
        ]

    def pair_rows(self) -> list[dict[str, Any]]:
        """Returns the rows of ``confusion.csv``: the pairs that occurred, those of a class with itself included."""
        return [
            {
                "num_shots": self.num_shots,
                "class": self.names[row["true"]],
                "taken_for": self.names[row["taken_for"]],
                "examples": row["count"],
                "of": row["chances"],
            }
            for row in self._rows()
            if row["count"]
        ]

    def summary(self) -> str:
        """Returns one line: the class with the lowest accuracy, and the two classes that were confused most often."""
        worst = min(self.class_rows(), key=lambda row: row["accuracy"])
        lowest = f"{worst['accuracy']:.4g}, {worst['class']} ({worst['examples']} examples)"
        text = f"K={self.num_shots}: lowest accuracy {lowest}"
        confused = [row for row in self.pair_rows() if row["class"] != row["taken_for"]]
        if not confused:
            return f"{text}; no class was taken for another"
        most = max(confused, key=lambda row: (row["examples"], row["examples"] / row["of"]))
        times = f"{most['examples']} of {most['of']} times"
        return f"{text}; most confused {most['class']}, taken for {most['taken_for']} {times}"

    def _rows(self) -> list[dict[str, int]]:
        columns = {name: getattr(self, name).tolist() for name in ("true", "taken_for", "count", "chances")}
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def class_tables(counted: Sequence[Confusion]) -> dict[str, list[dict[str, Any]]]:
    """Returns the rows of each file in `TABLES`, for the confusion at each K."""
    rows = [row for each in counted for row in each.class_rows()], [row for each in counted for row in each.pair_rows()]
    return dict(zip(TABLES, rows, strict=True))


def confusion(num_shots: int, predictions: Predictions, names: Sequence[str]) -> Confusion:
    """Counts the predictions of one K.

    Args:
        num_shots: K.
        predictions: those of all tasks, on the CPU.
        names: the name of each class of the data set.
    """
    classes, taken_for, choices = predictions
    # Only pairs that were in a task together have a row: a matrix of all classes may be large.
    in_task = (classes.unsqueeze(1) == choices.unsqueeze(2)).sum(2)  # (T, N), the examples of each class
    both = choices.unsqueeze(2) * len(names) + choices.unsqueeze(1)  # (T, N, N), pairs as single numbers
    pairs, which = both.flatten().unique(return_inverse=True)
    per_task = in_task.unsqueeze(2).expand_as(both)
    chances = torch.zeros_like(pairs).index_add_(0, which, per_task.flatten())
    occurred = (classes * len(names) + taken_for).flatten()
    count = torch.bincount(torch.searchsorted(pairs, occurred), minlength=len(pairs))
    seen = chances > 0  # a class may be a choice without an example
    pairs = pairs[seen]
    return Confusion(num_shots, names, pairs // len(names), pairs % len(names), count[seen], chances[seen])
