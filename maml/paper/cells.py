"""Reads ``results/cells.yaml``: the published numbers, curves and pictures, and the experiment for each of them."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from maml.config.paths import CONF
from maml.errors import MamlError
from maml.record.contents import Source
from maml.types import MeasuredBy

# Keys of a line in cells.yaml that are not fields of its `Source`.
_NON_SOURCE_KEYS = {
    "row",
    "column",
    "step",
    "num_steps",
    "one_half",
    "panel",
    "title",
    "goal",
    "note",
    "name",
    "points",
}


@dataclass(frozen=True)
class Reading:
    """Another reading of the paper that gives a number for a cell, beside the one that the table shows.

    Attributes:
        name: what the reading is, in a few words.
        source: source of its number.
        step: the gradient step after which the number is taken.
        note: anchor of the section in ``results/notes.md`` about the reading; may be empty.
    """

    name: str
    source: Source
    step: int
    note: str = ""


# Names of methods for the reader, by their `method` in the paper's files; any other method keeps the name it has there.
# The order gives the colours, which are the same in all figures.
METHODS = {
    "MAML": "MAML",
    "pretrained": "pretrained",
    "pretrained_step0.01": "pretrained",
    "pretrained_step0.02": "pretrained",
    "random": "random initialization",
    "oracle": "oracle",
}


@dataclass(frozen=True)
class Cell:
    """One printed number.

    Attributes:
        table: name of the file in ``results/paper/`` that contains it.
        row: its ``method`` in that file.
        column: its ``setting`` in that file.
        value: the number as printed; empty if none is published.
        ci: half-width of its 95 % interval, as printed or from the figure's file; empty if there is none.
        quoted: whether the paper quotes the number from other authors.
        source: source of our number; None if there is no experiment yet.
        step: the gradient step after which our number is taken.
        ci_is_printed: whether the paper prints the interval beside the value.
        note: anchor of the section in ``results/notes.md`` that explains why our number differs; may be empty.
        readings: other readings of the paper that give a number for this cell.
        pattern: a printed number of the same column, whose decimals a cell without a printed number has.
    """

    table: str
    row: str
    column: str
    value: str
    ci: str
    quoted: bool
    source: Source | None = None
    step: int = 0
    ci_is_printed: bool = True
    note: str = ""
    readings: tuple[Reading, ...] = ()
    pattern: str = ""

    @property
    def name(self) -> str:
        """The name by which scripts take it: ``table/row/column``."""
        return f"{self.table}/{self.row}/{self.column}"

    @property
    def is_of_paper(self) -> bool:
        """Whether the paper prints it; others are from later papers, or rows that a reader of this project added."""
        return is_in_paper(self.table) and bool(self.value)

    @property
    def decimals(self) -> int:
        """The number of decimals shown of ours: one more than printed, so that a reader can check the verdict."""
        return len((self.value or self.pattern).partition(".")[2]) + 1


@dataclass(frozen=True)
class Layout:
    """The printed layout of a table.

    Attributes:
        corner: heading of the column of row names.
        columns: heading of each column, as lines of text from top to bottom.
        groups: groups of rows, separated by lines; a group maps each row to its printed name.
        own: the rows of the paper's own method; only these have bold numbers.
    """

    corner: str
    columns: Mapping[str, Sequence[str]]
    groups: Sequence[Mapping[str, str]]
    own: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        name: its folder in ``results/``.
        title: its title.
        cells: its cells in printed order.
        layout: how it is printed.
        note: a remark for the reader; empty if there is none.
    """

    name: str
    title: str
    cells: tuple[Cell, ...]
    layout: Layout
    note: str = ""

    @property
    def in_paper(self) -> bool:
        """Whether the table is in the paper; other tables are from later papers."""
        return is_in_paper(self.name)


def is_in_paper(table: str) -> bool:
    """Returns whether a table of this name is in the paper; other tables have the names of their papers."""
    return table.startswith("table")


@dataclass(frozen=True)
class Curve:
    """One curve of a figure.

    Attributes:
        row: its ``method`` in the paper's file.
        panel: title of its panel.
        source: source of our curve.
        num_steps: the last gradient step; 0 for a method that does not adapt, which is drawn as a flat line.
        levels: interval (low, high) by gradient step, where known: the 68 % interval of the printed mean. If only the
            image is published, it is the range in which the printed curve lies.
        cells: the printed mean at every gradient step; empty if only the image is published.
        is_plotted: whether the paper plots it.
        note: the same as in `Cell`.
        points: printed values by step, if only some steps of the curve were printed; `levels` are then their rounding.
    """

    row: str
    panel: str
    source: Source
    num_steps: int
    levels: Mapping[int, tuple[float, float]]
    cells: tuple[Cell, ...] = ()
    is_plotted: bool = True
    note: str = ""
    points: Mapping[int, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of the method for the reader; curves of several panels may share it."""
        return METHODS.get(self.row, self.row)

    @property
    def label(self) -> str:
        """A name that is unique within the figure."""
        return f"{self.name}, {self.panel}"


@dataclass(frozen=True)
class Figure:
    """One figure of curves.

    Attributes:
        name: name of its files in ``results/``.
        title: title above the figure.
        ylabel: label of the vertical axis.
        curves: the curves, panel by panel.
        axes: arguments of Matplotlib's ``Axes.set`` for each panel.
        note: a remark for the reader; empty if there is none.
        measured_by: what its curves are over.
    """

    name: str
    title: str
    ylabel: str
    curves: tuple[Curve, ...]
    axes: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    measured_by: MeasuredBy = "gradient step"

    @property
    def in_paper(self) -> bool:
        """Whether the figure is in the paper."""
        return self.name.startswith("figure")

    def name_of(self, curve: Curve) -> str:
        """Returns the name by which scripts take a curve.

        Its last part is the panel's file in ``results/paper/``, or ``K5`` (its K) if the panel has no exact numbers.
        """
        return f"{self.name}/{curve.row}/{curve.cells[0].table if curve.cells else f'K{curve.source.num_shots}'}"


@dataclass(frozen=True)
class Panel:
    """One panel of a picture: one method's adaptation to one task.

    Attributes:
        row: name of the method.
        task: number of the task in the picture, or, in navigation, number of the meta-test goal.
        one_half: whether all support points lie in the right half of the input range.
        source: source of the method's run; its K is also the task's.
    """

    row: str
    task: int
    one_half: bool
    source: Source

    @property
    def name(self) -> str:
        """The name of the method for the reader."""
        return METHODS.get(self.row, self.row)

    @property
    def label(self) -> str:
        """The method and K."""
        return f"{self.name}, K={self.source.num_shots}"


@dataclass(frozen=True)
class Picture:
    """One figure of single tasks.

    Attributes:
        name: name of its files in ``results/``; the part after ``_`` names the part of the figure.
        title: title above the figure.
        panels: the panels, by task and then by method.
        published: the lines of the file of published trajectories; empty for sinusoids.
        note: the same as in `Figure`.
    """

    name: str
    title: str
    panels: tuple[Panel, ...]
    published: tuple[dict[str, str], ...] = ()
    note: str = ""


def load_tables(results: Path) -> list[Table]:
    """Reads all tables: every printed number, with the source of ours if there is one.

    Args:
        results: folder of ``cells.yaml`` and ``paper/``.

    Raises:
        MamlError: if ``cells.yaml`` names a row or cell that the paper does not have.
    """
    return [_table(results, name, entry) for name, entry in _entries(results)["tables"].items()]


def load_figures(results: Path) -> list[Figure]:
    """Reads all figures of curves that have an experiment; ``results`` as in `load_tables`."""
    return [_figure(results, name, entry) for name, entry in _entries(results)["figures"].items()]


def load_pictures(results: Path) -> list[Picture]:
    """Reads all pictures of single tasks that have an experiment; ``results`` as in `load_tables`."""
    return [_picture(results, name, entry) for name, entry in _entries(results)["pictures"].items()]


def load_levels(results: Path, name: str, row: str, num_shots: int, num_steps: int) -> dict[int, tuple[float, float]]:
    """Reads the range in which a printed curve lies at each gradient step.

    Args:
        results: as in `load_tables`.
        name: name of the file of ranges in ``paper/``.
        row: the curve's ``method`` in that file.
        num_shots: K.
        num_steps: the last gradient step to read.

    Returns:
        Lowest and highest value by gradient step, where known.

    Raises:
        MamlError: if the file does not have this curve.
    """
    levels: dict[int, tuple[float, float]] = {}
    for line in _read(results, name):
        if line["method"] == row and int(line["K"]) == num_shots:
            steps = range(num_steps + 1) if line["grad_step"] == "any" else [int(line["grad_step"])]
            levels |= dict.fromkeys(steps, (float(line["mse_low"]), float(line["mse_high"])))
    if not levels:
        raise MamlError(
            f"results/paper/{name}.csv has no method {row} at K={num_shots}; correct it in results/cells.yaml"
        )
    return levels


def _entries(results: Path) -> dict[str, Any]:
    entries = OmegaConf.to_container(OmegaConf.load(results / "cells.yaml"))
    assert isinstance(entries, dict)
    return {str(key): value for key, value in entries.items()}


def _table(results: Path, name: str, entry: Mapping[str, Any]) -> Table:
    runs, added, published = dict(_lines_by_cell(entry, "runs")), entry.get("added", []), _read(results, name)
    _refuse_wrong_rows(name, entry, added, {line["method"] for line in published}, {row for row, _ in runs})
    patterns = {line["setting"]: line["value"] for line in published if line["value"]}
    for column in patterns:
        published += [
            {"method": row, "setting": column, "value": "", "ci": ""} for row in added if (row, column) in runs
        ]
    quoted = set(entry.get("quoted", ()))
    intervals = {row: _read(results, file) for row, file in entry.get("intervals", {}).items()}
    columns = entry.get("columns", {})
    readings: dict[tuple[str, str], list[Reading]] = {}
    for place, fields in _lines_by_cell(entry, "readings"):
        reading = Reading(fields["name"], _source(fields), fields.get("step", 0), fields.get("note", ""))
        readings.setdefault(place, []).append(reading)
    layout = Layout(**entry["layout"] | {"own": frozenset(entry["layout"].get("own", ()))})
    rows = {*quoted, *intervals, *layout.own, *(row for group in layout.groups for row in group)}
    _refuse_unknown(name, published, rows, {*columns, *layout.columns}, {*runs, *readings})
    cells = []
    for line in published:
        row, column = line["method"], line["setting"]
        ci = _figure_ci(intervals[row], row, column) if row in intervals else line["ci"]
        run = runs.get((row, column), {})
        source, step, note = _source(run) if run else None, run.get("step", 0), run.get("note", "")
        others = tuple(readings.get((row, column), ()))
        cells.append(
            Cell(
                *(name, row, column, line["value"], ci, row in quoted, source, step, ci == line["ci"], note, others),
                patterns.get(column, ""),
            )
        )
    return Table(name, entry["title"], tuple(cells), layout, entry.get("note", ""))


def _lines_by_cell(entry: Mapping[str, Any], key: str) -> Iterator[tuple[tuple[str, str], dict[str, Any]]]:
    """Yields row and column of each cell that the lines under ``key`` fill, with all fields of the line."""
    columns = entry.get("columns", {})
    for line in entry.get(key, ()):
        for column in [line["column"]] if "column" in line else columns:
            yield (line["row"], column), entry.get("defaults", {}) | columns.get(column, {}) | line


def _refuse_wrong_rows(name: str, entry: Mapping[str, Any], added: Any, printed: set[str], filled: set[str]) -> None:
    """Refuses rows of a reader's own that are not in the layout or have no experiment, or that the paper has."""
    shown = {row for group in entry["layout"]["groups"] for row in group} - {*entry["layout"].get("own", ())}
    if not isinstance(added, list) or not {*added} <= (shown & filled) - printed:
        raise MamlError(
            f"results/cells.yaml, {name}: added: {added} has to be a list of rows; each has a name in a group of the "
            f"layout, which is not in results/paper/{name}.csv nor in own:, and at least one line under runs:"
        )


def _refuse_unknown(
    name: str, published: list[dict[str, str]], rows: set[str], columns: set[str], cells: set[tuple[str, str]]
) -> None:
    unknown = rows - {line["method"] for line in published}
    unknown |= columns - {line["setting"] for line in published}
    unknown |= {"/".join(cell) for cell in cells - {(line["method"], line["setting"]) for line in published}}
    if unknown:
        raise MamlError(
            f"results/cells.yaml, {name}: results/paper/{name}.csv has no {', '.join(sorted(unknown))}; "
            "a row must be a `method` in that file or listed under `added`, a column a `setting`"
        )


def _figure(results: Path, name: str, entry: Mapping[str, Any]) -> Figure:
    curves = [_curve(results, entry, line) for line in entry["curves"]]
    axes, note, measured_by = entry.get("axes", {}), entry.get("note", ""), entry.get("measured_by", "gradient step")
    return Figure(name, entry["title"], entry["ylabel"], tuple(curves), axes, note, measured_by)


def _curve(results: Path, entry: Mapping[str, Any], line: Mapping[str, Any]) -> Curve:
    file = line.get("panel")
    fields = entry["defaults"] | (entry["panels"][file] if file else {}) | line
    row, num_steps, source = fields["row"], fields["num_steps"], _source(fields)
    if "points_of" in entry:
        points = _points(results, entry["points_of"], line.get("points", {}))
        levels = {step: _rounding(value) for step, value in points.items()}
        return Curve(row, fields["title"], source, num_steps, levels, note=fields.get("note", ""), points=points)
    if file is None:
        levels = load_levels(results, entry["levels"], row, source.num_shots, num_steps)
        if source.num_shots in entry.get("unreadable", ()):
            levels = {}
        return Curve(row, f"K={source.num_shots}", source, num_steps, levels, note=fields.get("note", ""))
    printed = [
        point for point in _read(results, file) if point["method"] == row and int(point["grad_step"]) <= num_steps
    ]
    if len(printed) != num_steps + 1:
        raise MamlError(
            f"results/paper/{file}.csv has no method {row} with steps 0 to {num_steps}; correct results/cells.yaml"
        )
    return Curve(
        row,
        f"{fields['title']}, K={source.num_shots}",
        source,
        num_steps,
        {step: (float(point["boot68_low"]), float(point["boot68_high"])) for step, point in enumerate(printed)},
        tuple(
            Cell(file, row, f"gradsteps_{step}", point["mean"], point["ci95_halfwidth"], False, source, step)
            for step, point in enumerate(printed)
        ),
        printed[0]["plotted_in_paper"] == "yes",
        fields.get("note", ""),
    )


def _points(results: Path, file: str, cells: Mapping[int, str]) -> dict[int, str]:
    """Returns printed values by step, given the cell of each step as ``method/setting`` of a file in ``paper/``."""
    printed = {f"{line['method']}/{line['setting']}": line["value"] for line in _read(results, file)}
    if unknown := set(cells.values()) - printed.keys():
        raise MamlError(f"results/paper/{file}.csv has no {', '.join(sorted(unknown))}; correct results/cells.yaml")
    return {int(step): printed[cell] for step, cell in cells.items()}


def _rounding(printed: str) -> tuple[float, float]:
    """Returns the range of values that are printed so."""
    half = 0.5 * 10.0 ** -len(printed.partition(".")[2])
    return float(printed) - half, float(printed) + half


def _picture(results: Path, name: str, entry: Mapping[str, Any]) -> Picture:
    panels = [
        Panel(
            method["row"],
            task.get("goal", number),
            task.get("one_half", False),
            _source(entry["defaults"] | task | method),
        )
        for number, task in enumerate(entry["tasks"])
        for method in entry["methods"]
    ]
    published = _read(results, entry["published"]) if "published" in entry else []
    return Picture(name, entry["title"], tuple(panels), tuple(published), entry.get("note", ""))


def _source(fields: Mapping[str, Any]) -> Source:
    file = CONF / "experiment" / f"{fields['experiment']}.yaml"
    if not file.exists():
        raise MamlError(f"results/cells.yaml names the experiment {fields['experiment']}, but there is no {file}")
    kept = {name: value for name, value in fields.items() if name not in _NON_SOURCE_KEYS}
    return Source(**{**kept, "overrides": tuple(fields.get("overrides", ()))})


def _figure_ci(lines: list[dict[str, str]], row: str, column: str) -> str:
    step = column.removeprefix("gradsteps_")
    return next(line["ci95_halfwidth"] for line in lines if (line["method"], line["grad_step"]) == (row, step))


def _read(results: Path, name: str) -> list[dict[str, str]]:
    with open(results / "paper" / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def named_sources(results: Path) -> dict[str, tuple[Source, Sequence[int]]]:
    """Returns the source and the gradient steps of every cell and curve that has an experiment, by name."""
    sources: dict[str, tuple[Source, Sequence[int]]] = {
        cell.name: (cell.source, [cell.step]) for table in load_tables(results) for cell in table.cells if cell.source
    }
    for figure in load_figures(results):
        for curve in figure.curves:
            sources[figure.name_of(curve)] = curve.source, range(curve.num_steps + 1)
    return sources
