"""The report: one static HTML page with every table and figure of the paper, and the evidence for each number."""

from __future__ import annotations

import base64
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from markdown_it import MarkdownIt
from omegaconf import OmegaConf

from maml.config.compose import compose_experiment
from maml.config.identity import evaluation_config, training_config
from maml.errors import MamlError
from maml.paper.cells import Figure, Panel, Picture, Source, Table, load_figures, load_pictures, load_tables
from maml.paper.charts import histogram, line_chart
from maml.paper.evidence import Evidence, find_evidence, provenance
from maml.paper.figures import CurveComparison
from maml.paper.markup import Content, Markup, element
from maml.paper.plan import WATERMARK
from maml.paper.tables import (
    CONFLICT,
    NO_REASON,
    STATUSES,
    Comparison,
    bold_cells,
    compare,
    printed_value,
    reading_text,
    summary,
)
from maml.record.exported import read_index
from maml.record.index import Run
from maml.record.run_folder import read_metrics
from maml.record.statistics import MIN_RUNS

_NUM_POINTS = 200  # most points of a learning curve

_STEP_HEADS = ("step", "paper", "ours", "verdict")

# The sign and the meaning of each status. The sign makes the status readable without colour.
_STATUS_MEANINGS = {
    "reproduced": ("=", "the paper's value lies in our 95 % interval, or ours in the paper's"),
    "better": ("▲", "neither value lies in the other's interval, and ours is better"),
    "worse": ("▼", "neither value lies in the other's interval, and the paper's is better"),
    "measured": ("•", "finished, but there is no published number to compare with"),
    "reduced budget": ("◐", "training is not complete, so this number is not a reproduction"),
    "quoted": ("†", "the paper quotes this row from other authors; we did not run it"),
    "running": ("…", "training is running"),
    "not run": ("○", "nothing was evaluated yet; the cell shows the command"),
    "finished": ("•", "trained to the end and evaluated"),
}


def render(results: Path, runs: Sequence[Run], problems: Sequence[str]) -> tuple[str, list[str]]:
    """Renders the page.

    Args:
        results: folder of ``cells.yaml``, ``departures.yaml``, ``notes.md``, ``paper/`` and the rendered figures.
        runs: the runs that may be evidence.
        problems: one message for each run that was left out.

    Returns:
        The page, and all problems: ``problems``, and one message for each missing or damaged file in a run folder.
    """
    page = _Page(results, runs)
    tables = load_tables(results)
    compared = compare(tables, page.find)
    of_paper = [item for table in tables if table.in_paper for item in compared[table.name]]
    figures: dict[str, Markup] = {figure.name: page.figure(figure) for figure in load_figures(results)}
    figures |= {picture.name: page.picture(picture) for picture in load_pictures(results)}
    sections = {
        "Tables": [page.table(table, compared[table.name]) for table in tables if table.in_paper],
        "Figures": [figures[name] for name in sorted(figures)],
        "Not in the paper": [page.table(table, compared[table.name]) for table in tables if not table.in_paper],
        "Paper and code": [page.departures()],
        "Notes": [page.notes_section()],
    }
    problems = list(dict.fromkeys([*problems, *page.problems]))
    body = [
        element("p", WATERMARK, class_="watermark") if tables[0].title.startswith(WATERMARK) else "",
        _header(of_paper, list(sections), problems),
        element("main", [_section(title, content) for title, content in sections.items()]),
        element(
            "footer", "Made by make paper-report from the run folders, results/cells.yaml and results/departures.yaml."
        ),
    ]
    return _document(body), problems


def _document(body: Content) -> str:
    style, script = (Path(__file__).with_name(f"report.{kind}").read_text() for kind in ("css", "js"))
    head = [
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", "MAML, the paper from runs"),
        element("link", rel="icon", href="data:,"),
        element("style", Markup(style)),
    ]
    html = element("html", element("head", head), element("body", body, element("script", Markup(script))), lang="en")
    return f"<!doctype html>\n{html}\n"


def _header(of_paper: Sequence[Comparison], sections: Sequence[str], problems: Sequence[str]) -> Markup:
    counts = Counter(item.status for item in of_paper)
    tiles = [
        element(
            "li",
            element("strong", str(counts[status])),
            _chip(status),
            element("span", _STATUS_MEANINGS[status][1]),
            class_="tile",
        )
        for status in STATUSES
        if counts[status] or status not in ("measured", "running")
    ]
    bar = [
        element("span", class_=_slug(status), style=f"flex-grow: {counts[status]}", title=f"{counts[status]} {status}")
        for status in STATUSES
        if counts[status]
    ]
    errors = [element("li", problem) for problem in problems]
    return element(
        "header",
        element("p", "Finn, Abbeel, Levine: Model-Agnostic Meta-Learning (ICML 2017)", class_="eyebrow"),
        element("h1", "The paper, rebuilt cell by cell"),
        element("p", summary(of_paper), ".", id="summary", class_="lead"),
        element("div", bar, class_="bar-of-all", aria_hidden="true"),
        element("ul", tiles, class_="tiles"),
        element(
            "p",
            "Each number of ours is the mean over runs ± the half-width of its 95 % interval, which covers test tasks "
            f"and, if there are at least {MIN_RUNS} runs, trainings. Select a number to see its evidence, or the head "
            "of a column to sort the rows.",
        ),
        element("section", element("h2", "Left out"), element("ul", errors), class_="problems") if errors else "",
        element("nav", [element("a", title, href=f"#{_slug(title)}") for title in sections]),
    )


def _section(title: str, content: Content) -> Markup:
    return element("section", element("h2", title), content, id=_slug(title))


class _Page:
    """The parts of the page, and the data that they share.

    Attributes:
        results: the same as in `render`.
        find: returns the runs of a source; results are cached.
        problems: problems found while rendering.
        verifiable: names of the cells and curves whose checkpoint is committed.
        notes: heading and text of each section of ``notes.md``, by its anchor.
    """

    def __init__(self, results: Path, runs: Sequence[Run]) -> None:
        self.results = results
        self.find: Callable[[Source], Evidence] = cache(lambda source: find_evidence(source, runs))
        self.problems: list[str] = []
        try:
            self.verifiable = set(read_index(results / "checkpoints").cells)
        except MamlError as error:
            self.problems.append(str(error))
            self.verifiable = set()
        # A section is <a id="anchor"></a>, a heading and the text below it.
        parts = re.split(r'<a id="([\w-]+)"></a>\s+## (.+)\n', (results / "notes.md").read_text())
        self.notes = {parts[i]: (parts[i + 1], parts[i + 2]) for i in range(1, len(parts), 3)}

    def table(self, table: Table, comparisons: Sequence[Comparison]) -> Markup:
        """Returns a table in the paper's layout, and a panel for each of its cells."""
        layout, bold = table.layout, bold_cells(table)
        by_cell = {(item.cell.row, item.cell.column): item for item in comparisons}
        heads = [element("th", _sort_button(layout.corner), rowspan="2", scope="col", aria_sort="none")]
        heads += [
            element(
                "th", words[0] if len(words) == 1 else [words[0], element("br"), words[1]], colspan="2", scope="col"
            )
            for words in layout.columns.values()
        ]
        subheads = [
            element("th", _sort_button(whose), scope="col", aria_sort="none")
            for _ in layout.columns
            for whose in ("paper" if table.in_paper else "published", "ours")
        ]
        rows, panels = [], []
        for group in layout.groups:
            for row, name in group.items():
                cells = [element("th", name, scope="row", data_sort=name, class_="own" if row in layout.own else None)]
                for column, words in layout.columns.items():
                    item = by_cell.get((row, column))
                    cells += self._numbers(item, (row, column) in bold)
                    if item:
                        setting = f"step {words[0]}" if words[0].isdigit() else ", ".join(words)
                        panels.append(self._cell_panel(table, item, f"{name}, {setting}"))
                first = row == next(iter(group)) and group is not layout.groups[0]
                rows.append(element("tr", cells, class_="new-group" if first else None))
        head = element("thead", element("tr", heads), element("tr", subheads))
        return element(
            "article",
            element("h3", table.title),
            element("p", summary(comparisons), ".", class_="muted"),
            _scroll_box(element("table", head, element("tbody", rows), class_="sortable numbers"), table.title),
            panels,
            id=table.name,
        )

    def _numbers(self, item: Comparison | None, is_bold: bool) -> list[Markup]:
        """Returns the published number and ours, side by side."""
        if item is None:
            return [element("td", "—", data_sort=""), element("td", data_sort="")]
        text = printed_value(item.cell)
        ours = item.ours[0] if item.ours else math.nan
        label: list[Content] = [element("span", reading_text(*item.ours, item.decimals))] if item.ours else []
        return [
            element("td", element("b", text) if is_bold else text, data_sort=item.cell.value),
            element(
                "td",
                element("button", label, _chip(item.status), type="button", data_opens=_cell_id(item)),
                data_sort="" if math.isnan(ours) else ours,
            ),
        ]

    def _cell_panel(self, table: Table, item: Comparison, name: str) -> Markup:
        cell = item.cell
        facts = {"paper": printed_value(cell) or "not published", "ours": "—", "verdict": _chip(item.status)}
        if item.ours:
            facts["ours"] = reading_text(*item.ours, item.decimals)
        if item.runs_text:
            facts["runs"] = item.runs_text
        if item.place_text:
            facts["paper among our runs"] = item.place_text
        content: list[Content] = [_fact_list(facts), element("p", _STATUS_MEANINGS[item.status][1], class_="muted")]
        if cell.source:
            content.append(self._reason(item.reason))
            content.append(self._evidence(_cell_id(item), cell.source, item.evidence, cell.step, cell.value))
        elif not cell.quoted:
            content.append(element("p", "There is no experiment for this cell yet."))
        return _panel(_cell_id(item), name, table.title, content)

    def _reason(self, reason: str) -> Markup:
        if not reason:
            return Markup()
        if reason == NO_REASON or reason not in self.notes:
            return element("p", "Why: ", NO_REASON, ".")
        return element("p", "Why: ", element("a", self.notes[reason][0], href=f"#{reason}"))

    def _evidence(
        self, name: str, source: Source, evidence: Evidence, step: int | None = None, published: str = ""
    ) -> Markup:
        """Returns the evidence for a number: command, seeds, charts and settings.

        Args:
            name: name of the cell or curve.
            source: source of our number.
            evidence: the runs of the source.
            step: number of gradient steps; None for a picture, which shows several.
            published: the paper's value; empty if there is none.
        """
        origin = provenance(source, evidence)
        content: list[Content] = [_command(origin["command"])]
        content += [element("p", f"{CONFLICT} {conflict}") for conflict in evidence.conflicts]
        if evidence.evaluated and name in self.verifiable:
            content.append(_command(f"make verify CELL={name}"))
        if evidence.progress:
            content.append(element("p", evidence.progress))
        if evidence.evaluated:
            content.append(self._runs(source, evidence, step, len(published.partition(".")[2]) + 1 if published else 3))
        metric = f"{source.metric.replace('_', ' ')} at K={source.num_shots}"
        facts: dict[str, Content] = {"reading": metric if step is None else f"{metric}, step {step}"}
        if origin["inner_order"]:
            facts["gradient order"] = str(origin["inner_order"])
        if origin["task_bank"]:
            facts["task bank"] = element("code", origin["task_bank"])
        charts = [self._training(source, evidence)]
        if evidence.evaluated and step is not None:
            charts.append(self._tasks(source, evidence, step, published))
        content += [_fact_list(facts), element("div", charts, class_="charts")]
        return element("div", content, self._settings(source, evidence))

    def _runs(self, source: Source, evidence: Evidence, step: int | None, decimals: int) -> Markup:
        names = ["seed", "ours", "run", "iterations", "commit", "hardware", "training"]
        rows = [
            element(
                "tr",
                element("td", str(report.seed)),
                element("td", "" if step is None else reading_text(*report.reading(source, step), decimals)),
                element("td", element("code", report.run_id)),
                element("td", f"{report.iteration:,}"),
                element("td", element("code", run.commits)),
                element("td", run.hardware),
                element("td", _duration(run.record.seconds)),
            )
            for run, report in evidence.evaluated
        ]
        head = element("thead", element("tr", [element("th", name, scope="col") for name in names]))
        return _scroll_box(element("table", head, element("tbody", rows)), "Runs")

    def _training(self, source: Source, evidence: Evidence) -> Content:
        """Returns the learning curves of all runs; empty if there are none."""
        runs = [run for run, _ in evidence.evaluated] or ([evidence.unevaluated] if evidence.unevaluated else [])
        curves, metric = {}, ""
        for run in runs:
            try:
                records = read_metrics(run.path / "metrics.jsonl")
            except MamlError as error:
                self.problems.append(str(error))
                continue
            known = records[0] if records else {}
            names = source.metric, source.metric.partition("_")[0]  # accuracy_transductive is logged as accuracy
            metric = next((name for name in names if name in known), "loss")
            points = [(line["iteration"], line[metric]) for line in records if line.get(metric) is not None]
            if len(points) > 1:
                name = f"seed {run.record.seed}"
                curves[f"{name}, {run.hardware}" if name in curves else name] = _downsampled(points)
        if not curves:
            return ""
        keys = [element("span", name, class_=f"key curve-{number % 4}") for number, name in enumerate(curves)]
        chart = line_chart(curves, "iterations", metric, log=metric == "loss")
        return element("figure", chart, element("figcaption", f"Training: {metric} of the meta-batch. ", keys))

    def _tasks(self, source: Source, evidence: Evidence, step: int, published: str) -> Content:
        """Returns a histogram of each test task's mean over runs; empty if the values cannot be read."""
        num_runs = len(evidence.evaluated)
        try:
            of_runs = evidence.per_task(source, step)
            if of_runs is None:  # on different tasks: the first run stands for all
                of_runs = evidence.evaluated[0][1].per_task(source, step)[None]
        except MamlError as error:
            self.problems.append(str(error))
            return ""
        of_runs = of_runs[np.isfinite(of_runs).any(1)] if np.isfinite(of_runs).any() else of_runs
        values = of_runs.mean(0)
        finite, metric = values[np.isfinite(values)], source.metric.replace("_", " ")
        num_diverged = len(values) - len(finite)
        caption = f"{metric} of each of the {len(values)} test tasks"
        caption += f", mean over {len(of_runs)} of {num_runs} runs." if num_runs > 1 else "."
        if num_diverged:
            caption += f" Not drawn: {num_diverged} that diverged."
        if num_diverged == len(values):
            return element("p", caption)
        marks = {} if num_diverged else {"ours": float(finite.mean())}
        marks |= {"paper": float(published)} if published else {}
        keys = [element("span", name, class_=f"key {name}") for name in marks]
        return element("figure", histogram(finite, marks, metric), element("figcaption", f"{caption} ", keys))

    def _settings(self, source: Source, evidence: Evidence) -> list[Markup]:
        """Returns the settings that differ from a constructor's default, and the whole config."""
        settings = compose_experiment(source.experiment, source.overrides)
        whole = OmegaConf.to_yaml(settings.as_dict())
        if evidence.evaluated:
            run, report = evidence.evaluated[0]
            differing = run.record.training | report.evaluation
            if (run.path / "config.yaml").exists():
                whole = (run.path / "config.yaml").read_text()
        else:
            differing = training_config(settings) | evaluation_config(settings)
        rows = [
            element("tr", element("th", key, scope="row"), element("td", element("code", json.dumps(value))))
            for key, value in differing.items()
        ]
        return [
            element(
                "details",
                element("summary", f"Settings that differ from defaults ({len(differing)})"),
                _scroll_box(element("table", element("tbody", rows), class_="settings"), "Settings"),
            ),
            element("details", element("summary", "config.yaml"), element("pre", whole, tabindex="0")),
        ]

    def figure(self, figure: Figure) -> Markup:
        """Returns a figure and a panel for each of its curves."""
        items = [CurveComparison(curve, self.find(curve.source)) for curve in figure.curves]
        openers, panels = [], []
        for item in items:
            curve = item.curve
            name = f"{figure.name}/{curve.row}/{curve.cells[0].table if curve.cells else f'K{curve.source.num_shots}'}"
            published = curve.cells[-1].value if curve.cells else ""
            evidence = self._evidence(name, curve.source, item.evidence, curve.num_steps, published)
            openers.append(_open_button(name, curve.label, item.status))
            content = [_steps(item), self._reason(item.reason), evidence]
            panels.append(_panel(name, curve.label, figure.title, content))
        return self._figure_article(
            figure, element("p", summary(items, "curves"), ".", class_="muted"), openers, panels
        )

    def picture(self, picture: Picture) -> Markup:
        """Returns a figure of single tasks and a panel for each method in it."""
        openers, panels = [], []
        shown: dict[str, Panel] = {panel.label: panel for panel in picture.panels}
        for label, panel in shown.items():
            evidence, name = self.find(panel.source), f"{picture.name}/{label}"
            openers.append(_open_button(name, label, evidence.state))
            panels.append(_panel(name, label, picture.title, self._evidence(name, panel.source, evidence)))
        return self._figure_article(picture, "", openers, panels)

    def _figure_article(
        self, figure: Figure | Picture, counted: Content, openers: Sequence[Markup], panels: Sequence[Markup]
    ) -> Markup:
        path = self.results / figure.name.partition("_")[0] / f"{figure.name}.png"
        image = (
            _image(path, figure.title)
            if path.exists()
            else element("p", "Not drawn yet: make paper-figures.", class_="muted")
        )
        return element(
            "article",
            element("h3", figure.title),
            counted,
            element("figure", image, element("figcaption", figure.note) if figure.note else ""),
            element("div", openers, class_="openers"),
            panels,
            id=figure.name,
        )

    def departures(self) -> Markup:
        """Returns where the paper, its authors' code and ours differ, with the effect where both were run."""
        rows = []
        for number, entry in enumerate(load_departures(self.results), start=1):
            where = element(
                "ul", [element("li", element("code", place.partition(": ")[0])) for place in entry["where"]]
            )
            rows.append(
                element(
                    "tr",
                    element("td", str(number), data_sort=number, data_label="#"),
                    element("th", entry["topic"], scope="row", data_sort=entry["topic"]),
                    element("td", entry["paper"], data_label="paper"),
                    element("td", entry["code"], data_label="authors' code"),
                    element("td", entry["ours"], where, data_label="here"),
                    element("td", self._effect(entry.get("measured")), data_label="effect"),
                )
            )
        heads = [element("th", _sort_button(name), scope="col", aria_sort="none") for name in ("#", "topic")]
        heads += [element("th", name, scope="col") for name in ("paper", "authors' code", "here", "effect")]
        head = element("thead", element("tr", heads))
        lead = (
            "The paper's text and its authors' code differ in these points. We mostly follow the code, because the "
            "published numbers come from it. The effect compares runs with either choice, in the order of their seeds."
        )
        return element(
            "article",
            element("p", lead),
            element("table", head, element("tbody", rows), class_="sortable departures"),
            id="departures",
        )

    def _effect(self, measured: Mapping[str, Any] | None) -> Content:
        if measured is None:
            return element("span", "effect not measured", class_="muted")
        lines, is_measured = [], True
        for label, source, step in measured_readings(measured):
            evidence = self.find(source)
            is_measured &= evidence.complete
            values = [reading_text(*report.reading(source, step), 2) for _, report in evidence.evaluated]
            text: Content = "; ".join(values)
            if not evidence.complete:
                partial = [text, f" ({evidence.progress}) "] if values else []
                text = [partial, _chip(evidence.state), element("code", source.command([]))]
            lines.append(element("li", element("b", label), ": ", text))
        quantity = measured["what"] if is_measured else f"effect not measured; {measured['what']}"
        return [element("span", quantity, class_="muted"), element("ul", lines)]

    def notes_section(self) -> Markup:
        """Returns the notes on the numbers, to which verdicts link."""
        # Raw HTML in the notes is shown as text.
        markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
        return element(
            "article",
            [
                element(
                    "details",
                    element("summary", title),
                    element("div", Markup(markdown.render(text)), id=anchor, class_="note"),
                )
                for anchor, (title, text) in self.notes.items()
            ],
        )


def load_departures(results: Path) -> list[dict[str, Any]]:
    """Reads ``departures.yaml``."""
    entries = OmegaConf.to_container(OmegaConf.load(results / "departures.yaml"))
    assert isinstance(entries, list)
    return entries


def measured_readings(measured: Mapping[str, Any]) -> list[tuple[str, Source, int]]:
    """Returns label, source and gradient step of each reading that shows the effect of a departure."""
    readings = []
    for reading in measured["readings"]:
        fields = {"step": measured.get("step"), **measured["source"], **reading}
        label, step, overrides = fields.pop("label"), fields.pop("step"), tuple(fields.pop("overrides", ()))
        readings.append((label, Source(**fields, overrides=overrides), step))
    return readings


def _cell_id(item: Comparison) -> str:
    return f"{item.cell.table}/{item.cell.row}/{item.cell.column}"


def _slug(text: str) -> str:
    return text.lower().replace(" ", "-")


def _chip(status: str) -> Markup:
    sign = element("span", _STATUS_MEANINGS[status][0], aria_hidden="true")
    return element("span", sign, " ", status, class_=f"chip {_slug(status)}")


def _sort_button(name: str) -> Markup:
    return element("button", name, type="button", class_="sorter")


def _open_button(identity: str, label: str, state: str) -> Markup:
    return element("button", element("span", label), _chip(state), type="button", data_opens=identity)


def _scroll_box(table: Markup, label: str) -> Markup:
    return element("div", table, class_="scroll", tabindex="0", role="region", aria_label=label)


def _panel(identity: str, name: str, title: str, content: Content) -> Markup:
    close = element("button", "Close", type="button", class_="close")
    heading = element("div", element("p", title, class_="eyebrow"), element("h3", name))
    return element("dialog", element("div", heading, close, class_="top"), content, id=identity, aria_label=name)


def _fact_list(facts: Mapping[str, Content]) -> Markup:
    return element(
        "dl",
        [element("div", element("dt", name), element("dd", value)) for name, value in facts.items()],
        class_="facts",
    )


def _command(command: str) -> Markup:
    return element("div", element("code", command), element("button", "Copy", type="button"), class_="command")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _steps(item: CurveComparison) -> Markup:
    """Returns a curve as a table with one row per gradient step."""
    curve, rows = item.curve, []
    for step, status in enumerate(item.steps):
        paper = printed_value(curve.cells[step]) if curve.cells else ""
        if not curve.cells and step in curve.levels:
            paper = "{:g} to {:g}, read off".format(*curve.levels[step])
        found = item.evidence.statistics(curve.source, step)
        ours = reading_text(found.mean, found.ci95, 3) if found else ""
        cells = [element("td", text) for text in (paper, ours, _chip(status))]
        rows.append(element("tr", element("th", str(step), scope="row"), cells))
    head = element("thead", element("tr", [element("th", name, scope="col") for name in _STEP_HEADS]))
    return _scroll_box(element("table", head, element("tbody", rows)), "Steps")


def _downsampled(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Averages neighbouring points so that at most `_NUM_POINTS` are left."""
    width = math.ceil(len(points) / _NUM_POINTS) or 1
    groups = (np.array(points[start : start + width], float) for start in range(0, len(points), width))
    return [(float(x), float(y)) for x, y in (group.mean(0) for group in groups)]


def _image(path: Path, title: str) -> Markup:
    """Embeds an image file in the page as lossless WebP, which is less than half the size of a PNG."""
    from PIL import Image

    buffer = BytesIO()
    with Image.open(path) as image:
        image.convert("RGB").save(buffer, "WEBP", lossless=True)
        width = round(image.width * 96 / 150)  # figures have 150 pixels per inch, web pages 96
    source = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    drawing = element("img", src=source, alt=title, width=width, loading="lazy")
    return element("div", drawing, class_="drawing wide" if width > 900 else "drawing")
