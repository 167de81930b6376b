"""Compares a new report with the paper's cells at the end of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from maml.config.compose import compose_experiment
from maml.config.identity import evaluation_config, training_config
from maml.config.paths import RESULTS
from maml.config.schema import Settings
from maml.paper.cells import load_tables
from maml.paper.tables import judge, reading_text
from maml.record.contents import Report, Source
from maml.record.report import Judgement


def cell_verdicts(experiment: str, settings: Settings, report: Mapping[str, Any]) -> dict[str, Judgement]:
    """Judges each cell whose number comes from the report.

    Args:
        experiment: name of the experiment.
        settings: settings of the run. A run has no cells if its settings, other than the seed, differ from the
            experiment's.
        report: the content of ``report.json``.

    Returns:
        Judgement by ``table/row/column``; empty outside a clone, where there is no ``cells.yaml``.
    """
    if not (RESULTS / "cells.yaml").exists():
        return {}
    verdicts = {}
    for table in load_tables(RESULTS):
        for cell in table.cells:
            source = cell.source
            if source is None or source.experiment != experiment or not _has_settings_of(settings, source):
                continue
            read = Report.model_validate(report)
            ours, ci95 = read.reading(source, cell.step)
            verdict = "reduced budget"
            if read.complete:
                published = (float(cell.value), float(cell.ci or 0)) if cell.value else None
                verdict = judge(ours, ci95, *published, read.larger_is_better) if published else "measured"
            numbers = f"{reading_text(ours, ci95, cell.decimals)} (paper {cell.value or 'has none'})"
            published_here = " ± ".join(_in_our_unit(text, source.scale) for text in (cell.value, cell.ci) if text)
            verdicts[cell.name] = Judgement(
                source.metric, source.num_shots, cell.step, published_here, verdict, f"{numbers}: {verdict}"
            )
    return verdicts


def _in_our_unit(printed: str, scale: float) -> str:
    """Returns a printed number in the unit of our reports, with the same digits."""
    decimals = len(printed.partition(".")[2]) + round(math.log10(scale))
    return f"{float(printed) / scale:.{decimals}f}"


def _has_settings_of(settings: Settings, source: Source) -> bool:
    expected = compose_experiment(source.experiment, source.overrides)
    training, expected_training = (training_config(each) | {"seed": 0} for each in (settings, expected))
    return training == expected_training and evaluation_config(settings) == evaluation_config(expected)
