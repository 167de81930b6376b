"""A report on the console."""

from __future__ import annotations

import pytest

from maml.record.report import Judgement, print_report


def test_printed_report_has_a_line_per_step_and_says_what_is_reduced(capsys: pytest.CaptureFixture[str]) -> None:
    steps = [
        {"step": 0, "mean": 3.25, "ci95": 0.125, "num_tasks": 600},
        {"step": 1, "mean": None, "ci95": None, "num_tasks": 600},
    ]
    report = {
        "experiment": "sinusoid_10shot",
        "run_id": "1f2e3d",
        "seed": 2,
        "iteration": 30,
        "num_iterations": 40,
        "curves": [{"metric": "mse", "num_shots": 10, "steps": steps}],
    }
    print_report(report, "MAML")
    assert capsys.readouterr().out.splitlines() == [
        "sinusoid_10shot 1f2e3d, MAML, seed 2  (reduced budget: 30 of 40 iterations)",
        "  mse, K=10, 600 tasks",
        "    step  0:   3.2500 +- 0.1250",
        "    step  1: diverged",
    ]
    judgements = [
        Judgement("mse", 10, 0, "3.2 ± 0.1", "reproduced", ""),
        Judgement("mse", 10, 1, "0.5", "worse", ""),
        Judgement("mse", 10, 1, "", "measured", ""),
    ]
    print_report(report, "MAML", judgements)
    assert capsys.readouterr().out.splitlines()[1:] == [
        "  mse, K=10, 600 tasks            paper       verdict",
        "    step  0:   3.2500 +- 0.1250   3.2 ± 0.1   reproduced",
        "    step  1: diverged             0.5         worse",
        "                                  -           measured",
    ]
    print_report(report | {"iteration": 40}, "MAML")
    assert capsys.readouterr().out.splitlines()[0] == "sinusoid_10shot 1f2e3d, MAML, seed 2"
