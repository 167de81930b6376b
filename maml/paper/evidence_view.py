"""The evidence for one number in the report: command, runs, charts and settings."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterable

import numpy as np
from omegaconf import OmegaConf

from maml.config.compose import compose_experiment
from maml.config.identity import evaluation_config, training_config
from maml.errors import MamlError
from maml.paper.charts import histogram, line_chart
from maml.paper.evidence import Evidence, measured_by, provenance
from maml.paper.markup import Content, Markup, element
from maml.paper.tables import CONFLICT, reading_text
from maml.paper.widgets import command, fact_list, scroll_box
from maml.record.contents import Source
from maml.record.gallery import drawn_pictures
from maml.record.index import Run
from maml.record.labels import AXIS, metric_label, step_label
from maml.record.plot import training_curve
from maml.record.run_files import read_metrics
from maml.types import FIRST_STEP


class EvidenceView:
    """Shows the evidence of numbers.

    Args:
        verifiable: names of the cells and curves whose checkpoint is committed.

    Attributes:
        problems: one message for each missing or damaged file that was found on the way.
    """

    def __init__(self, verifiable: set[str]) -> None:
        self.problems: list[str] = []
        self._verifiable = verifiable

    def show(
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
        content: list[Content] = [command(origin["command"])]
        content += [element("p", f"{CONFLICT} {conflict}") for conflict in evidence.conflicts]
        if evidence.evaluated and name in self._verifiable:
            content.append(command(f"make verify CELL={name}"))
        if evidence.progress:
            content.append(element("p", evidence.progress))
        if evidence.evaluated:
            content.append(_runs(source, evidence, step, len(published.partition(".")[2]) + 1 if published else 3))
        metric = f"{metric_label(source.metric)} at K={source.num_shots}"
        facts: dict[str, Content] = {
            "reading": metric if step is None else f"{metric}, {step_label(step, measured_by(source))}"
        }
        if origin["inner_order"]:
            facts["gradient order"] = str(origin["inner_order"])
        if origin["task_bank"]:
            facts["task bank"] = element("code", origin["task_bank"])
        charts = [_adaptation(source, evidence), self._training(source, evidence)]
        if evidence.evaluated and step is not None:
            charts.append(self._tasks(source, evidence, step, published))
        charts += _pictures(evidence)
        content += [fact_list(facts), element("div", charts, class_="charts")]
        return element("div", content, _settings(source, evidence))

    def _training(self, source: Source, evidence: Evidence) -> Content:
        """Returns the learning curves of all runs; empty if there are none."""
        runs = [run for run, _ in evidence.evaluated] or ([evidence.unevaluated] if evidence.unevaluated else [])
        curves: dict[str, list[tuple[float, float]]] = {}
        metric = ""
        for run in runs:
            try:
                records = read_metrics(run.path / "metrics.jsonl")
            except MamlError as error:
                self.problems.append(str(error))
                continue
            metric, points = training_curve(records, source.metric)
            if len(points) > 1:
                scale = 1 if metric == "loss" else source.scale
                curves[_run_name(run, curves)] = [(iteration, value * scale) for iteration, value in points]
        if not curves:
            return ""
        label = metric if metric == "loss" else _with_unit(metric, source)
        chart = line_chart(curves, "iterations", label, log=metric == "loss")
        return element("figure", chart, element("figcaption", f"Training: {metric} of the meta-batch. ", _keys(curves)))

    def _tasks(self, source: Source, evidence: Evidence, step: int, published: str) -> Content:
        """Returns a histogram of each test task's mean over runs; empty if the values cannot be read."""
        num_runs = len(evidence.evaluated)
        try:
            of_runs = evidence.per_task_or_first(source, step)
        except MamlError as error:
            self.problems.append(str(error))
            return ""
        of_runs = of_runs[np.isfinite(of_runs).any(1)] if np.isfinite(of_runs).any() else of_runs
        values = of_runs.mean(0)
        finite, metric = values[np.isfinite(values)], metric_label(source.metric)
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
        chart = histogram(finite, marks, _with_unit(metric, source))
        return element("figure", chart, element("figcaption", f"{caption} ", keys))


def _adaptation(source: Source, evidence: Evidence) -> Content:
    """Returns the curves of meta-test of all runs; empty if they have fewer than two points."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for run, report in evidence.evaluated:
        (steps,) = (
            each.steps for each in report.curves if (each.metric, each.num_shots) == (source.metric, source.num_shots)
        )
        first = FIRST_STEP[report.measured_by]
        points = [(float(first + each.step), each.mean * source.scale) for each in steps if each.mean is not None]
        if len(points) > 1:
            curves[_run_name(run, curves)] = points
    if not curves:
        return ""
    label = _with_unit(metric_label(source.metric), source)
    chart = line_chart(curves, AXIS[measured_by(source)], label, log=False)
    return element("figure", chart, element("figcaption", "Adaptation at meta-test. ", _keys(curves)))


def _pictures(evidence: Evidence) -> list[Markup]:
    """Returns the pictures that the algorithms of all runs have made."""
    figures = []
    for run, report in evidence.evaluated:
        for name, path in drawn_pictures(report.folder).items():
            title = f"{metric_label(name)}, {_run_name(run, ())}"
            content = b64encode(path.read_bytes()).decode()
            image = element("img", src=f"data:image/png;base64,{content}", alt=title)
            figures.append(element("figure", image, element("figcaption", title)))
    return figures


def _runs(source: Source, evidence: Evidence, step: int | None, decimals: int) -> Markup:
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
    return scroll_box(element("table", head, element("tbody", rows)), "Runs")


def _settings(source: Source, evidence: Evidence) -> list[Markup]:
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
            scroll_box(element("table", element("tbody", rows), class_="settings"), "Settings"),
        ),
        element("details", element("summary", "config.yaml"), element("pre", whole, tabindex="0")),
    ]


def _with_unit(label: str, source: Source) -> str:
    return f"{label} (%)" if source.scale == 100 else label


def _run_name(run: Run, taken: Iterable[str]) -> str:
    name = f"seed {run.record.seed}"
    return f"{name}, {run.hardware}" if name in taken else name


def _keys(curves: Iterable[str]) -> list[Markup]:
    return [element("span", name, class_=f"key curve-{number % 4}") for number, name in enumerate(curves)]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
