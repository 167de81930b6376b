"""The report: one static HTML page with every table and figure of the paper, and the evidence for each number."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from markdown_it import MarkdownIt

from maml.errors import MamlError
from maml.paper.cells import Figure, Panel, Picture, Table, load_figures, load_pictures, load_tables
from maml.paper.departures import departures_table
from maml.paper.evidence import Evidence, find_evidence, measured_by
from maml.paper.evidence_view import EvidenceView
from maml.paper.figures import NOTE, CurveComparison
from maml.paper.markup import Content, Markup, element
from maml.paper.methods import methods_section
from maml.paper.plan import WATERMARK
from maml.paper.tables import (
    BOLD,
    NO_REASON,
    QUOTED,
    SYMBOLS,
    TRANSDUCTIVE,
    UNPRINTED,
    VERDICTS,
    Comparison,
    bold_cells,
    compare,
    judged_value,
    layout_rows,
    printed_value,
    reading_text,
    summary,
)
from maml.paper.widgets import (
    VERDICT_MEANINGS,
    chip,
    dialog,
    fact_list,
    open_button,
    scroll_box,
    slug,
    sort_button,
)
from maml.record.comparison import groups_on_the_same_tasks
from maml.record.contents import Source
from maml.record.exported import read_index
from maml.record.index import Run
from maml.record.statistics import MIN_RUNS
from maml.types import FIRST_STEP

_SCALE = 1.75  # pixels per point of a figure: text of 7.5 points is then a little smaller than the page's
_WIDE = 700  # pixels; a wider figure scrolls on a phone, because its text would be too small
_HEADS = ("paper", "ours", "verdict")


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
    of_paper = [item for group in compared.values() for item in group if item.cell.is_of_paper]
    figures: dict[str, Markup] = {figure.name: page.figure(figure) for figure in load_figures(results)}
    figures |= {picture.name: page.picture(picture) for picture in load_pictures(results)}
    sections = {
        "Tables": [page.table(table, compared[table.name]) for table in tables if table.in_paper],
        "Figures": [element("p", NOTE, class_="muted"), *(figures[name] for name in sorted(figures))],
        "Same tasks": methods_section(groups_on_the_same_tasks(runs)),
        "Not in the paper": [page.table(table, compared[table.name]) for table in tables if not table.in_paper],
        "Paper and code": [departures_table(results, page.find)],
        "Notes": [page.notes_section()],
    }
    problems = list(dict.fromkeys([*problems, *page.problems, *page.view.problems]))
    body = [
        element("p", WATERMARK, class_="watermark") if tables[0].title.startswith(WATERMARK) else "",
        _header(of_paper, page.origin(), problems),
        _toolbar(list(sections)),
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


def _header(of_paper: Sequence[Comparison], origin: str, problems: Sequence[str]) -> Markup:
    counts = Counter(item.verdict for item in of_paper)
    tiles = [
        element(
            "li",
            element(
                "button",
                element("strong", str(counts[verdict])),
                chip(verdict),
                element("span", VERDICT_MEANINGS[verdict][1]),
                type="button",
                class_="tile",
                data_filter=slug(verdict),
                aria_pressed="false",
            ),
        )
        for verdict in VERDICTS
        if counts[verdict] or verdict not in ("measured", "quoted", "running")
    ]
    bar = [
        element("span", class_=slug(name), style=f"flex-grow: {counts[name]}", title=f"{counts[name]} {name}")
        for name in VERDICTS
        if counts[name]
    ]
    errors = [element("li", problem) for problem in problems]
    return element(
        "header",
        element("p", "Finn, Abbeel, Levine: Model-Agnostic Meta-Learning (ICML 2017)", class_="eyebrow"),
        element("h1", "The paper, rebuilt cell by cell"),
        element("p", summary(of_paper), ".", id="summary", class_="lead"),
        element("p", origin, class_="muted", id="origin"),
        element("div", bar, class_="bar-of-all", aria_hidden="true"),
        element("ul", tiles, class_="tiles"),
        element(
            "p",
            "Each number of ours is the mean over runs ± the half-width of its 95 % interval, which covers test tasks "
            f"and, if there are at least {MIN_RUNS} runs, trainings. Below it is the range of the runs' means; its "
            "evidence also has, in brackets, the interval over test tasks alone. Select a number to see its evidence, "
            "a verdict above to see its numbers alone, or the head of a column to sort the rows.",
        ),
        element("p", f"{BOLD}. {TRANSDUCTIVE}."),
        element("section", element("h2", "Left out"), element("ul", errors), class_="problems") if errors else "",
    )


def _toolbar(sections: Sequence[str]) -> Markup:
    search = element(
        "input",
        type="search",
        id="search",
        placeholder="Search: method, experiment, run, commit …",
        aria_label="Search methods, experiments, runs, commits, departures and notes",
        autocomplete="off",
        spellcheck="false",
    )
    found = element("output", id="found", for_="search")
    everything = element("button", "Show all", type="button", id="show-all", hidden=True)
    links = element("nav", [element("a", title, href=f"#{slug(title)}") for title in sections])
    return element("div", element("div", search, found, everything, role="search"), links, class_="toolbar")


def _section(title: str, content: Content) -> Markup:
    return element("section", element("h2", title), content, id=slug(title))


class _Page:
    """The parts of the page, and the data that they share.

    Attributes:
        results: the same as in `render`.
        problems: problems found while rendering.
        view: shows the evidence of a number.
        notes: heading and text of each section of ``notes.md``, by its anchor.
    """

    def __init__(self, results: Path, runs: Sequence[Run]) -> None:
        self.results = results
        self.problems: list[str] = []
        try:
            verifiable = set(read_index(results / "checkpoints").cells)
        except MamlError as error:
            self.problems.append(str(error))
            verifiable = set()
        self.view = EvidenceView(verifiable)
        self._runs = runs
        self._found: dict[Source, Evidence] = {}
        # A section is <a id="anchor"></a>, a heading and the text below it.
        parts = re.split(r'<a id="([\w-]+)"></a>\s+## (.+)\n', (results / "notes.md").read_text())
        self.notes = {parts[i]: (parts[i + 1], parts[i + 2]) for i in range(1, len(parts), 3)}

    def find(self, source: Source) -> Evidence:
        """Returns the runs of a source; each source is looked up once."""
        if source not in self._found:
            self._found[source] = find_evidence(source, self._runs)
        return self._found[source]

    def origin(self) -> str:
        """Returns how many runs the page was rendered from, and the commit and date of the newest.

        The page's own commit is not in it: equal evidence has to give an equal page.
        """
        runs = {run.path: run for evidence in self._found.values() for run, _ in evidence.evaluated}
        if not runs:
            return "Rendered without any evaluated run."
        segments = [segment for run in runs.values() for segment in run.record.segments]
        newest = max(segments, key=lambda segment: segment.started)
        count = f"{len(runs)} runs" if len(runs) > 1 else "1 run"
        day = newest.started[:10]
        return f"The numbers come from {count}; the newest was trained at commit {newest.commit_name} on {day}."

    def table(self, table: Table, comparisons: Sequence[Comparison]) -> Markup:
        """Returns a table in the paper's layout, and a panel for each of its cells."""
        layout, bold = table.layout, bold_cells(table)
        groups, has_quoted = layout_rows(table, comparisons), any(item.cell.quoted for item in comparisons)
        heads = [element("th", sort_button(layout.corner), rowspan="2", scope="col", aria_sort="none")]
        heads += [
            element(
                "th", words[0] if len(words) == 1 else [words[0], element("br"), words[1]], colspan="2", scope="col"
            )
            for words in layout.columns.values()
        ]
        subheads = [
            element("th", sort_button(whose), scope="col", aria_sort="none")
            for _ in layout.columns
            for whose in ("paper" if table.in_paper else "published", "ours")
        ]
        rows, panels = [], []
        for group in groups:
            for row in group:
                label = f"{row.name} {SYMBOLS['quoted']}" if row.quoted else row.name
                own = "own" if row.row in layout.own else None
                cells = [element("th", label, scope="row", data_sort=row.name, class_=own)]
                for (column, words), item in zip(layout.columns.items(), row.items, strict=True):
                    cells += self._numbers(item, (row.row, column) in bold)
                    if item:
                        setting = f"step {words[0]}" if words[0].isdigit() else ", ".join(words)
                        panels.append(self._cell_panel(table, item, f"{row.name}, {setting}"))
                first = row is group[0] and group is not groups[0]
                rows.append(element("tr", cells, class_="new-group" if first else None))
        head = element("thead", element("tr", heads), element("tr", subheads))
        return element(
            "article",
            element("h3", table.title),
            element("p", summary(comparisons), f". {QUOTED}." if has_quoted else ".", f" {table.note}", class_="muted"),
            scroll_box(element("table", head, element("tbody", rows), class_="sortable numbers"), table.title),
            panels,
            id=table.name,
        )

    def _numbers(self, item: Comparison | None, is_bold: bool) -> list[Markup]:
        """Returns the published number and ours, side by side."""
        if item is None:
            return [element("td", "—", data_sort=""), element("td", data_sort="")]
        text = printed_value(item.cell)
        ours = item.ours[0] if item.ours else math.nan
        label = element("span", reading_text(*item.ours, item.cell.decimals)) if item.ours else ""
        return [
            element("td", element("b", text) if is_bold else text, data_sort=item.cell.value),
            element(
                "td",
                open_button(item.cell.name, label, item.verdict, _spread(item)),
                data_sort="" if math.isnan(ours) else ours,
            ),
        ]

    def _cell_panel(self, table: Table, item: Comparison, name: str) -> Markup:
        cell = item.cell
        facts = {"paper": judged_value(cell) or "not published", "ours": "—", "verdict": chip(item.verdict)}
        if cell.quoted:
            facts["from"] = "other authors, whom the paper quotes"
        if item.ours:
            facts["ours"] = reading_text(*item.ours, item.cell.decimals)
        if item.runs_text:
            facts["runs"] = item.runs_text
        if item.place_text:
            facts["paper among our runs"] = item.place_text
        content: list[Content] = [fact_list(facts), element("p", VERDICT_MEANINGS[item.verdict][1], class_="muted")]
        if not cell.ci_is_printed:
            content.append(element("p", UNPRINTED, class_="muted"))
        if cell.source:
            content.append(self._reason(item.reason))
            content.append(self.view.show(item.cell.name, cell.source, item.evidence, cell.step, cell.value))
        elif not cell.quoted:
            content.append(element("p", "There is no experiment for this cell yet."))
        return dialog(item.cell.name, name, table.title, content)

    def _reason(self, reason: str) -> Markup:
        if not reason:
            return Markup()
        if reason == NO_REASON or reason not in self.notes:
            return element("p", "Why: ", NO_REASON, ".")
        return element("p", "Why: ", element("a", self.notes[reason][0], href=f"#{reason}"))

    def figure(self, figure: Figure) -> Markup:
        """Returns a figure and a panel for each of its curves."""
        items = [CurveComparison(curve, self.find(curve.source)) for curve in figure.curves]
        openers, panels = [], []
        for item in items:
            curve = item.curve
            name, published = figure.name_of(curve), curve.cells[-1].value if curve.cells else ""
            evidence = self.view.show(name, curve.source, item.evidence, curve.num_steps, published)
            note = "" if curve.is_plotted else "not drawn in the paper"
            openers.append(open_button(name, element("span", curve.label), item.verdict, note))
            content = [_steps(item), self._reason(item.reason), evidence]
            panels.append(dialog(name, curve.label, figure.title, content))
        counted = summary([item for item in items if item.curve.is_plotted], "curves")
        return self._figure_article(figure, element("p", counted, ".", class_="muted"), openers, panels)

    def picture(self, picture: Picture) -> Markup:
        """Returns a figure of single tasks and a panel for each method in it."""
        openers, panels = [], []
        shown: dict[str, Panel] = {panel.label: panel for panel in picture.panels}
        for label, panel in shown.items():
            evidence, name = self.find(panel.source), f"{picture.name}/{label}"
            openers.append(open_button(name, element("span", label), evidence.state))
            panels.append(dialog(name, label, picture.title, self.view.show(name, panel.source, evidence)))
        return self._figure_article(picture, "", openers, panels)

    def _figure_article(
        self, figure: Figure | Picture, counted: Content, openers: Sequence[Markup], panels: Sequence[Markup]
    ) -> Markup:
        path = self.results / figure.name.partition("_")[0] / f"{figure.name}.svg"
        image = (
            drawing(path, figure.title)
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


def _steps(item: CurveComparison) -> Markup:
    """Returns a curve as a table with one row per gradient step or showing."""
    curve, kind, rows = item.curve, measured_by(item.curve.source), []
    for step, verdict in enumerate(item.steps):
        paper = printed_value(curve.cells[step]) if curve.cells else ""
        if step in curve.points:
            paper = curve.points[step]
        elif not curve.cells and step in curve.levels:
            paper = "{:g} to {:g}, read off".format(*curve.levels[step])
        found = item.evidence.statistics(curve.source, step)
        ours = reading_text(found.mean, found.ci95, 3) if found else ""
        cells = [element("td", text) for text in (paper, ours, chip(verdict))]
        rows.append(element("tr", element("th", str(FIRST_STEP[kind] + step), scope="row"), cells))
    heads = (kind.split()[-1], *_HEADS)
    head = element("thead", element("tr", [element("th", name, scope="col") for name in heads]))
    return scroll_box(element("table", head, element("tbody", rows)), "Steps")


def _spread(item: Comparison) -> str:
    """Returns the number of runs and the range of their means; empty for a single run."""
    found = item.statistics
    if found is None or found.num_runs == 1:
        return ""
    if math.isnan(found.mean):
        return item.runs_text
    lowest, highest = (f"{value:.{item.cell.decimals}f}" for value in (found.lowest, found.highest))
    return f"{found.num_runs} runs, {lowest} to {highest}"


def drawing(path: Path, title: str) -> Markup:
    """Puts an SVG of `maml.record.style.save` into the page, in the colours of the page.

    Args:
        path: path of the SVG.
        title: description for those who do not see it.
    """
    _, _, svg = path.read_text().partition("<svg")
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert size is not None
    width = round(float(size[1]) * _SCALE)
    head, _, body = svg.partition(">")
    style = re.search(r'style="([^"]*)"', head)
    opening = element(
        "svg",
        viewBox=size[0].split('"')[1],
        role="img",
        aria_label=title,
        style=f"{style[1]}; width: {width}px" if style else f"width: {width}px",
    ).removesuffix("</svg>")
    content = Markup(opening + body.rstrip())
    return scroll_box(element("div", content, class_="drawing wide" if width > _WIDE else "drawing"), title)
