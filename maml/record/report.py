"""A report on the console, with the published numbers that it is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from maml.record.labels import step_label


@dataclass(frozen=True)
class Judgement:
    """The comparison of one number of a report with a published one.

    Attributes:
        metric: the curve's metric.
        num_shots: the curve's K.
        step: the gradient step.
        published: the published number, in the report's unit; empty if there is none.
        verdict: how ours compares, in words.
        text: both numbers, in the published unit, and the verdict.
    """

    metric: str
    num_shots: int
    step: int
    published: str
    verdict: str
    text: str


def print_report(report: Mapping[str, Any], algorithm: str, judgements: Sequence[Judgement] = ()) -> None:
    """Prints each curve of a report as a table: the mean and the 95 % interval after every gradient step or showing.

    Args:
        report: the content of ``report.json``.
        algorithm: name of the algorithm.
        judgements: comparisons with published numbers, which are printed beside ours.
    """
    done, planned = report["iteration"], report["num_iterations"]
    budget = "" if done == planned else f"  (reduced budget: {done} of {planned} iterations)"
    print(f"{report['experiment']} {report['run_id']}, {algorithm}, seed {report['seed']}{budget}")
    rows, ways = [], report.get("evaluation", {}).get("evaluation.num_ways")
    shots = f"{ways} ways, K" if ways else "K"
    for curve in report["curves"]:
        title = f"  {curve['metric']}, {shots}={curve['num_shots']}, {curve['steps'][0]['num_tasks']} tasks"
        judged = [each for each in judgements if (each.metric, each.num_shots) == (curve["metric"], curve["num_shots"])]
        rows.append((title, "paper", "verdict") if judged else (title, "", ""))
        for step in curve["steps"]:
            place = step_label(step["step"], report.get("measured_by", "gradient step"), width=2)
            ours = f"    {place}: {_value_text(step['mean'], step['ci95'])}"
            if not step["num_tasks"]:
                ours = f"    {place}: in no task"
            here = [(each.published or "-", each.verdict) for each in judged if each.step == step["step"]]
            here = list(dict.fromkeys(here)) or [("", "")]  # two tables can print the same number
            rows += [(ours if index == 0 else "", *numbers) for index, numbers in enumerate(here)]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for ours, published, verdict in rows:
        print(f"{ours:{widths[0]}}   {published:{widths[1]}}   {verdict}".rstrip())


def _value_text(mean: float | None, ci95: float | None) -> str:
    if mean is None or ci95 is None:
        return "diverged"
    # Adaptation that almost diverged has numbers of any length.
    return f"{mean:8.4f} +- {ci95:.4f}" if max(abs(mean), ci95) < 1e5 else f"{mean:.3e} +- {ci95:.3e}"
