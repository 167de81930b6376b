"""Options, messages and exit status that scripts share."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from maml.cli.scripts import exit_with, print_problems, rendering_parser
from maml.config.paths import RESULTS
from maml.errors import Interrupted, MamlError


def test_runs_of_the_user_come_before_the_committed_ones() -> None:
    options = rendering_parser("").parse_args([])
    assert options.runs_dir == [Path("runs"), RESULTS / "runs"]
    assert options.out == options.results == RESULTS


def test_folder_of_runs_that_does_not_exist_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = rendering_parser("")
    with pytest.raises(SystemExit):
        parser.parse_args(["--runs-dir", str(tmp_path), str(tmp_path / "rnus")])
    assert f"there is no folder {tmp_path / 'rnus'}" in capsys.readouterr().err


def test_folder_without_cells_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = rendering_parser("")
    with pytest.raises(SystemExit):
        parser.parse_args(["--results", str(tmp_path)])
    assert f"{tmp_path} has no cells.yaml" in capsys.readouterr().err
    (tmp_path / "cells.yaml").touch()
    assert parser.parse_args(["--results", str(tmp_path)]).results == tmp_path


def test_problems_are_printed_after_the_notes(capsys: pytest.CaptureFixture[str]) -> None:
    assert print_problems([], ["two runs differ"]) == 0
    assert print_problems(["run.json is damaged"]) == 1
    assert capsys.readouterr().err == "NOTE: two runs differ\nERROR, left out: run.json is damaged\n"


@pytest.mark.parametrize("status", [0, 1, None])
def test_script_exits_with_its_status(status: int | None) -> None:
    with pytest.raises(SystemExit) as exit_:
        exit_with(lambda: status)
    assert exit_.value.code == status


def test_error_of_a_script_is_its_message() -> None:
    def main() -> int:
        raise MamlError("results/ cannot be written")

    with pytest.raises(SystemExit) as exit_:
        exit_with(main)
    assert exit_.value.code == "results/ cannot be written"


def test_signal_is_its_message_and_the_status_of_the_signal(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        raise Interrupted("stopped; the same command resumes", signal.SIGTERM)

    with pytest.raises(SystemExit) as exit_:
        exit_with(main)
    assert exit_.value.code == 128 + 15
    assert capsys.readouterr().err == "stopped; the same command resumes\n"


def test_error_of_a_file_is_its_name_and_reason(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as exit_:
        exit_with(lambda: (tmp_path / "file" / "x").mkdir())
    assert exit_.value.code == f"{tmp_path / 'file' / 'x'}: Not a directory"


def test_error_of_the_system_without_a_file_keeps_its_traceback() -> None:
    def main() -> int:
        raise ConnectionResetError(104, "Connection reset by peer")

    with pytest.raises(ConnectionResetError):
        exit_with(main)
