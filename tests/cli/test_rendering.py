"""Options and messages of the scripts that read all finished runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from maml.cli.rendering import print_problems, rendering_parser


def test_runs_of_the_user_come_before_the_committed_ones() -> None:
    options = rendering_parser("", Path("a", "results")).parse_args([])
    assert options.runs_dir == [Path("runs"), Path("a", "results", "runs")]
    assert options.out == options.results == Path("a", "results")


def test_problems_are_printed_after_the_notes(capsys: pytest.CaptureFixture[str]) -> None:
    assert print_problems([], ["two runs differ"]) == 0
    assert print_problems(["run.json is damaged"]) == 1
    assert capsys.readouterr().err == "NOTE: two runs differ\nERROR, left out: run.json is damaged\n"
