"""Renders the paper's figures from all finished runs: results/figures.md, and a folder for each figure.

    python scripts/paper_figures.py

Reads results/cells.yaml, results/paper/, the run folders and the committed runs in results/runs/; trains nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from maml.cli.scripts import exit_with, print_problems, rendering_parser
from maml.errors import MamlError
from maml.paper import adaptation, trajectories
from maml.paper.cells import Figure, Picture, load_figures, load_pictures
from maml.paper.evidence import Evidence, find_evidence, provenance
from maml.paper.figures import NOTE, CurveComparison, figure_rows, plot_figure, prepare_curve
from maml.paper.markdown import markdown_table
from maml.paper.tables import CONFLICT, summary
from maml.record.atomic import write_text_atomically
from maml.record.contents import Source
from maml.record.index import Run, conflicts_among, find_runs

_FILES_NOTE = "The CSV beside each picture has all numbers and the verdict of each step. Made by `make paper-figures`."


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes all figures and prints the verdict on each curve; returns 1 if a damaged run was left out, else 0.

    Each file is written whole or not at all.
    """
    options = rendering_parser(__doc__.splitlines()[0]).parse_args(arguments)
    runs, damaged = find_runs(*options.runs_dir)
    conflicts = conflicts_among(runs)
    sections, judged = {}, []
    for figure in load_figures(options.results):
        sections[figure.name], compared = _draw_figure(figure, runs, _path(options.out, figure.name), damaged)
        judged += [item for item in compared if item.curve.is_plotted and figure.in_paper]
    for picture in load_pictures(options.results):
        sections[picture.name] = _draw_picture(picture, runs, _path(options.out, picture.name), damaged)
    damaged = list(dict.fromkeys(damaged))  # several panels may share a run
    counted = summary(judged, "curves")
    head = f"{counted}. The verdicts are those of the {len(judged)} curves that the paper draws."
    overview = ["# The paper's figures", "", head, ""]
    overview += [f"**ERROR, left out:** {message}\n" for message in damaged]
    overview += [line for name in sorted(sections) for line in sections[name]]
    overview += [f"**{CONFLICT}** {message}\n" for message in conflicts]
    write_text_atomically(options.out / "figures.md", "\n".join([*overview, f"{NOTE} {_FILES_NOTE}", ""]))
    status = print_problems(damaged, conflicts)
    print(f"{counted}\nwritten to {options.out / 'figures.md'}")
    return status


def _draw_figure(
    figure: Figure, runs: Sequence[Run], path: Path, damaged: list[str]
) -> tuple[list[str], list[CurveComparison]]:
    """Draws the curves of a figure and writes their numbers.

    Args:
        figure: the figure.
        runs: all runs.
        path: path of its files, without the suffix.
        damaged: messages about runs that are left out; those of this figure are added.

    Returns:
        The figure's section in Markdown, and its judged curves.
    """
    curves = []
    for curve in figure.curves:
        evidence = find_evidence(curve.source, runs)
        try:
            curves.append((curve, evidence, prepare_curve(curve, evidence)))
        except MamlError as error:
            damaged.append(str(error))
            curves.append((curve, Evidence(), prepare_curve(curve, Evidence())))
    plot_figure(figure, [item for _, _, item in curves], path.with_suffix(".png"))
    _write_csv(path, [row for each in curves for row in figure_rows(*each)])
    compared = [CurveComparison(curve, evidence) for curve, evidence, _ in curves]
    texts = {item.curve.label: (item.verdict, item.text, item.curve.source, item.evidence) for item in compared}
    return _section(figure, path, "verdict", texts), compared


def _draw_picture(picture: Picture, runs: Sequence[Run], path: Path, damaged: list[str]) -> list[str]:
    """Draws single tasks, as `_draw_figure` draws curves; returns the section in Markdown."""
    kind = trajectories if picture.published else adaptation
    panels = []
    for panel in picture.panels:
        evidence = find_evidence(panel.source, runs)
        try:
            rows = kind.panel_rows(picture, panel, evidence)
        except MamlError as error:
            damaged.append(str(error))
            rows = kind.panel_rows(picture, panel, Evidence())
        panels.append((panel, evidence, rows))
    kind.plot_picture(picture, panels, path.with_suffix(".png"))
    _write_csv(path, [row for _, _, rows in panels for row in rows])
    texts = {panel.label: (evidence.state, evidence.state, panel.source, evidence) for panel, evidence, _ in panels}
    return _section(picture, path, "state", texts)


def _path(out: Path, name: str) -> Path:
    """Returns the path of a figure's files without the suffix; all parts of a figure share one folder."""
    folder = out / name.partition("_")[0]
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_text_atomically(path.with_suffix(".csv"), pd.DataFrame(rows, dtype=object).to_csv(index=False))


def _section(
    figure: Figure | Picture, path: Path, kind: str, items: Mapping[str, tuple[str, str, Source, Evidence]]
) -> list[str]:
    """Prints the verdict on each curve, or the state of each panel; returns a section in Markdown with the provenance.

    Args:
        figure: the figure, with its title and note.
        path: path of its files, without the suffix.
        kind: what is said of each: its ``verdict`` or its ``state``.
        items: verdict or state, the same in Markdown, source and runs of each curve or panel, by label.
    """
    picture = f"{path.parent.name}/{path.name}"
    lines = [f"## {figure.title}", "", f"![{figure.title}]({picture}.png)", ""]
    lines += [f"[PDF]({picture}.pdf), [SVG]({picture}.svg), [all numbers]({picture}.csv)", ""]
    lines += [figure.note, ""] if figure.note else []
    rows = []
    for label, (said, text, source, evidence) in items.items():
        print(f"{figure.title}, {label}: {said}")
        origin = provenance(source, evidence)
        rows.append([label, text, origin["seeds"], origin["commit"], origin["hardware"], f"`{origin['command']}`"])
    return [*lines, *markdown_table(("drawn", kind, "seeds", "commit", "hardware", "command"), rows), ""]


if __name__ == "__main__":
    exit_with(main)
