"""Meta-trains the sinusoid experiment with the paper's full budget and compares it with the paper.

    python scripts/demo.py

The run is the same as that of ``python train.py +experiment=sinusoid_10shot``. It resumes if it was interrupted, and
shows its results at once if it has already finished.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from maml.cli.scripts import exit_with
from maml.config.compose import compose
from maml.config.paths import RESULTS
from maml.experiment import run_experiment
from maml.paper.cells import load_figures, load_tables
from maml.paper.figures import DrawnCurve, plot_figure
from maml.paper.markdown import markdown_table
from maml.paper.tables import judge, reading_text
from maml.record.atomic import write_text_atomically
from maml.record.contents import Report, Source
from maml.record.run_folder import RunFolder

EXPERIMENT = "sinusoid_10shot"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the demo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="three iterations, for tests; its numbers mean nothing")
    parser.add_argument("--runs-dir", default="runs", help="where run folders are made (default: runs)")
    options = parser.parse_args(arguments)
    smoke = ["+debug=smoke"] if options.smoke else []
    settings, experiment = compose([f"+experiment={EXPERIMENT}", f"runs_dir={options.runs_dir}", *smoke])
    print(
        f"{experiment}: {settings.num_iterations:,} iterations. You can stop it at any time; the same command resumes "
        "it."
    )
    run_experiment(settings, experiment)
    run = RunFolder(settings, experiment)
    report = Report.model_validate(run.finished_report())
    table = comparison(report, options.smoke)
    write_text_atomically(run.path / "comparison.md", f"{table}\n")
    picture = draw_figure(report, options.smoke, run.path / "figure3.png")
    print(
        f"\n{table}\n\n"
        f"run folder  {run.path}\n"
        f"picture     {picture}\n"
        f"table       {run.path / 'comparison.md'}\n"
        f"next steps  python train.py +experiment={EXPERIMENT} seed=1   (or any other file of conf/experiment/)\n"
        "            make paper-tables, make paper-figures   (all finished runs, compared with the paper)"
    )


def comparison(report: Report, smoke: bool) -> str:
    """Returns our mean squared errors beside the paper's, as a Markdown table."""
    cells = {
        cell.step: cell
        for table in load_tables(RESULTS)
        for cell in table.cells
        if table.name == "table2_multitask" and cell.source is not None and cell.row == "MAML"
    }
    rows = []
    read_off = {
        curve.source.num_shots: curve.levels
        for figure in load_figures(RESULTS)
        for curve in figure.curves
        if figure.name == "figure6" and curve.row == "MAML"
    }
    for num_shots, levels in read_off.items():
        printed = cells if num_shots == 5 else {}
        for step in sorted({*levels, *printed}):
            ours, ci = report.reading(Source(EXPERIMENT, "mse", num_shots), step)
            if step in printed:
                paper, source = printed[step].value, "Table 2"
                judged = judge(ours, ci, float(paper), 0.0, report.larger_is_better)
            else:
                low, high = levels[step]
                paper = f"{low} to {high}" if low < high else str(low)
                source, judged = "Figure 6, read off the image", ""
            judged = "smoke test" if smoke else judged
            rows.append([str(num_shots), str(step), reading_text(ours, ci, decimals=3), paper, source, judged])
    return "\n".join(markdown_table(("K", "gradient steps", "ours (mse)", "paper", "source", "verdict"), rows))


def draw_figure(report: Report, smoke: bool, path: Path) -> Path:
    """Plots Figure 3 with our MAML curve over the paper's; returns the file."""
    (figure,) = (figure for figure in load_figures(RESULTS) if figure.name == "figure3")
    curves = [curve for curve in figure.curves if curve.source.experiment == EXPERIMENT]
    missing = f"{report.num_iterations} iterations: a smoke test" if smoke else ""
    lines = [
        DrawnCurve(curve, [report.reading(curve.source, step) for step in range(curve.num_steps + 1)], missing=missing)
        for curve in curves
    ]
    return plot_figure(figure, lines, path)


if __name__ == "__main__":
    exit_with(main)
