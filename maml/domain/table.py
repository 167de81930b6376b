"""Tasks from a user's own table: each has its rows, with the same columns as inputs and targets (not in the paper)."""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
from annotated_types import MinLen
from torch import Tensor

from maml.data.splits import SPLITS, share_out
from maml.digest import digest
from maml.domain.base import Metrics, Predictions, Role, SupervisedDomain, reads_data
from maml.domain.classification import accuracy, cross_entropies
from maml.domain.draw import choice_of_each
from maml.errors import MamlError, Unavailable, first_ten
from maml.model.base import Model
from maml.seeding import Stream
from maml.types import Count, Examples, NonNegativeFloat, Params, Split, Tasks

Columns = Annotated[list[str], MinLen(1)]


class Table(SupervisedDomain):
    """Regression or classification of rows. A task is all rows that have the same value in one column.

    Args:
        file: the table, a ``.csv`` or ``.parquet`` file within ``data_dir`` or with its full path.
        task: the column that says to which task a row belongs.
        inputs: the columns that the network sees, numbers.
        targets: the columns that it predicts: numbers; with ``classes``, one column of classes.
        split: the column that says ``train``, ``val`` or ``test`` for all rows of a task; or the shares of the tasks
            for training, validation and test.
        data_dir: folder of the data sets.
        classes: the classes of the target column, the same in every task; None is regression.
        num_shots: K, support rows per task.
        num_query: query rows per task in training; None is as many as support rows.

    Raises:
        MamlError: if the table cannot be read, columns are missing, a value is no number or none of the classes, a task
            is in two splits, or a task has too few rows.
    """

    def __init__(
        self,
        file: str,
        task: str,
        inputs: Columns,
        targets: Columns,
        split: str | list[NonNegativeFloat],
        data_dir: str,
        classes: Annotated[list[str | int | bool], MinLen(2)] | None = None,
        num_shots: Count = 10,
        num_query: Count | None = None,
    ) -> None:
        if classes is not None and (len(targets) > 1 or len({*classes}) < len(classes)):
            raise MamlError(
                f"domain.targets={[*targets]}, domain.classes={[*classes]}: classes are different values of one column"
            )
        named = [task, *inputs, *targets, *([split] if isinstance(split, str) else [])]
        if repeated := [name for name, count in Counter(named).items() if count > 1]:
            raise MamlError(
                f"domain.inputs={[*inputs]}, domain.targets={[*targets]}: the column {repeated[0]!r} is named twice; "
                "name each column once, as the task, an input, a target or the split"
            )
        self.in_shape = (len(inputs),)
        self.classes = None if classes is None else list(classes)
        self.class_names = [str(value) for value in classes or []]
        self.out_dim = len(targets) if classes is None else len(classes)
        self.headline, self.larger_is_better = ("mse", False) if classes is None else ("accuracy", True)
        self.num_shots, self.num_query = num_shots, num_query
        self.path = Path(data_dir) / file
        if reads_data():
            self._read(task, inputs, targets, split)
            self._check_rows("train", num_shots, num_query or num_shots)

    def check_available(self) -> None:
        if not self.path.is_file():
            raise Unavailable(
                f"there is no table {self.path}; set domain.file= to your file, with its full path or within data_dir="
            )

    def _read(self, task: str, inputs: Sequence[str], targets: Sequence[str], split: str | Sequence[float]) -> None:
        self.check_available()
        table, header = _load(self.path, task)
        wanted = [task, *inputs, *targets, *([split] if isinstance(split, str) else [])]
        if repeated := [name for name in wanted if header.count(name) > 1]:
            raise MamlError(f"{self.path} has {header.count(repeated[0])} columns {repeated[0]!r}; rename all but one")
        if missing := [name for name in wanted if name not in table]:
            raise MamlError(
                f"{self.path} has no column {' and no column '.join(missing)}; it has {first_ten([*map(str, table)])}"
            )
        if table.empty:
            raise MamlError(f"{self.path} has no rows")
        if (empty := table[task].isna() | (table[task] == "")).any():
            raise MamlError(f"{self.path}, row {_row(empty)}: the column {task!r} is empty")
        table = table.assign(**{task: table[task].astype(str)}).sort_values(task, kind="stable")
        counts = table.groupby(task).size()
        self.tasks, self.counts = [*counts.index], counts.tolist()
        self.largest = max(self.counts)
        self.sizes = torch.tensor(self.counts)
        self.starts = self.sizes.cumsum(0) - self.sizes
        self.inputs = torch.from_numpy(self._numbers(table, inputs))
        if self.classes is None:
            self.targets = torch.from_numpy(self._numbers(table, targets))
        else:
            self.targets = torch.tensor(self._class_numbers(table[targets[0]]))
        chosen = self._split_by_column(table, task, split) if isinstance(split, str) else share_out(split, self.tasks)
        number = {name: index for index, name in enumerate(self.tasks)}
        self.splits: dict[Split, Tensor] = {
            one: torch.tensor(sorted(number[name] for name in chosen[one])) for one in SPLITS if chosen[one]
        }
        if absent := {"train", "test"} - {*self.splits}:
            raise MamlError(f"{self.path}: domain.split={split} leaves no tasks for {' and '.join(sorted(absent))}")
        self.smallest = {one: int(self.sizes[members].min()) for one, members in self.splits.items()}
        content = hashlib.sha256(self.inputs.numpy().tobytes() + self.targets.numpy().tobytes()).hexdigest()
        members = {one: members.tolist() for one, members in self.splits.items()}
        self.data_digest = digest({"content": content, "counts": self.counts, "splits": members})

    def _numbers(self, table: pd.DataFrame, columns: Sequence[str]) -> np.ndarray:
        if dates := [name for name in columns if table[name].dtype.kind in "mM"]:
            raise MamlError(f"{self.path}: {dates[0]!r} holds dates or durations; bring them to numbers first")
        numbers = [pd.to_numeric(table[name], errors="coerce").to_numpy(np.float64) for name in columns]
        for name, values in zip(columns, numbers, strict=True):
            dtype = torch.get_default_dtype()
            wrong = ~(np.abs(values) <= torch.finfo(dtype).max)  # also where a value is NaN
            if wrong.any():
                value, is_finite = table[name].iloc[wrong.argmax()], np.isfinite(values[wrong.argmax()])
                row = _row(pd.Series(wrong, table.index))
                what = f"too large for {dtype}" if is_finite else "no finite number"
                raise MamlError(
                    f"{self.path}, row {row}: {name!r} is {str(value)!r}, which is {what}; mend or remove it"
                )
        return np.stack(numbers, axis=1)

    def _class_numbers(self, column: pd.Series) -> np.ndarray:
        if column.isna().any():
            raise MamlError(
                f"{self.path}, row {_row(column.isna())}: {column.name!r} is empty (None, NA and nan count as empty); "
                "fill it, or remove the row"
            )
        found = column.astype(str).map({str(value): index for index, value in enumerate(self.classes or [])})
        if found.isna().any():
            value = column[found.isna()].iloc[0]
            raise MamlError(
                f"{self.path}, row {_row(found.isna())}: {column.name!r} is {str(value)!r}, which is none of "
                f"domain.classes={self.classes}; add it, or remove the row"
            )
        return found.to_numpy(np.int64)

    def _split_by_column(self, table: pd.DataFrame, task: str, split: str) -> dict[Split, list[str]]:
        values = table.groupby(task)[split].unique()
        wrong = [
            f"{name} has {', '.join(map(str, found))}"
            for name, found in zip(self.tasks, values, strict=True)
            if len(found) > 1 or found[0] not in SPLITS
        ]
        if wrong:
            raise MamlError(
                f"{self.path}: each task has one split, train, val or test, in the column {split!r}, but "
                f"{first_ten(wrong)}"
            )
        return {
            one: [name for name, found in zip(self.tasks, values, strict=True) if found[0] == one] for one in SPLITS
        }

    @property
    def has_validation(self) -> bool:
        """Whether there are tasks for validation."""
        return "val" in self.splits

    def _check_rows(self, split: Split, num_shots: int, num_query: int) -> None:
        if split not in self.splits:
            raise MamlError(f"{self.path} has no {split} tasks, only {' and '.join(self.splits)}")
        needed = num_shots + num_query
        if needed > self.smallest[split]:
            counts = {self.tasks[i]: self.counts[i] for i in self.splits[split].tolist()}
            few = first_ten([f"task {name} has {count} rows" for name, count in counts.items() if count < needed])
            raise MamlError(
                f"num_shots={num_shots} plus num_query={num_query} is {needed}, but {few}; lower either, add rows, or "
                "take the task away"
            )

    def to(self, device: torch.device) -> None:
        self.inputs, self.targets = self.inputs.to(device), self.targets.to(device)
        self.sizes, self.starts = self.sizes.to(device), self.starts.to(device)
        self.splits = {split: members.to(device) for split, members in self.splits.items()}

    def draw_tasks(self, num_tasks: int, stream: Stream, split: Split, num_shots: int, num_query: int) -> Tasks:
        """Draws tasks, and rows of each without replacement.

        Raises:
            MamlError: if a task has too few rows, or the split has no tasks.
        """
        self._check_rows(split, num_shots, num_query)
        members = self.splits[split].to(stream.device)
        drawn = members[stream.child("tasks").integers((num_tasks,), len(members))]
        sizes, starts = self.sizes.to(stream.device)[drawn], self.starts.to(stream.device)[drawn]
        rows = choice_of_each(stream.child("rows"), sizes, self.largest, num_shots + num_query) + starts.unsqueeze(-1)
        support, query = rows.split([num_shots, num_query], dim=-1)
        return {"support_rows": support, "query_rows": query}

    def data(self, tasks: Tasks, role: Role, step: int = 0) -> Examples:
        rows = tasks[f"{role}_rows"]
        x, y = self.inputs[rows].to(torch.get_default_dtype()), self.targets[rows]
        if self.classes is None:
            y = y.to(x.dtype)
        return Examples(x, y, num_shots=tasks["support_rows"].shape[-1])

    def loss(self, outputs: Tensor, data: Examples) -> tuple[Tensor, Metrics]:
        """The mean squared error; the mean cross-entropy, if targets are classes."""
        if self.classes is None:
            return (outputs - data.y).square().mean((1, 2)), {}
        return cross_entropies(outputs, data.y).mean(1), {"accuracy": accuracy(outputs, data.y)}

    def measure(self, model: Model, params: Params, support: Examples, query: Examples, step: int) -> Metrics:
        """The error or the accuracy on the query rows."""
        outputs = model(params, query.x)
        if self.classes is None:
            return {"mse": self.loss(outputs, query)[0]}
        return {"accuracy": accuracy(outputs, query.y)}

    def predict_classes(self, model: Model, params: Params, tasks: Tasks) -> Predictions:
        query = self.data(tasks, "query")
        choices = torch.arange(self.out_dim, device=query.y.device).expand(len(query.y), -1)
        classes = query.y.reshape(len(query.y), -1)
        return Predictions(classes, model(params, query.x).argmax(-1), choices)


def _load(path: Path, task: str) -> tuple[pd.DataFrame, list[str]]:
    """Reads a file, and the names of its columns: pandas gives columns of a csv that have the same name other ones.

    Of a csv, the names of tasks are kept as they are written: 1.1 is not 1.10, and 007 is not 7.
    """
    try:
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
            table = table.reset_index(drop=not any(table.index.names))
            return table, [*map(str, table)]
        with warnings.catch_warnings():
            # Some rows have more fields than the header. Fields beyond it are left out only if all of them are empty.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            table = pd.read_csv(path, index_col=False, converters={task: str}, low_memory=False)
            return table, [*pd.read_csv(path, header=None, nrows=1, dtype=str).iloc[0]]
    except ImportError as error:
        raise Unavailable(f"{path}: Parquet files need a package; pip install pyarrow, or save it as csv") from error
    except Exception as error:  # pandas raises many kinds of errors
        raise MamlError(f"{path} cannot be read as a table ({type(error).__name__}: {error})") from error


def _row(wrong: pd.Series) -> int:
    """Returns the number of the first wrong row, counted from 1 below the header."""
    return int(wrong.index[wrong.to_numpy().argmax()]) + 1
