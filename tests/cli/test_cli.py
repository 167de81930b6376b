"""The console script: its commands, and the command that a run records."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest

import maml
from maml.cli import eval_arguments, main
from maml.record.provenance import command_line
from tests.runs import ROOT


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main(arguments)
    return capsys.readouterr().out


def refused(*arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return str(ended.value.code)


def test_unknown_command_shows_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused("trian") == "2"
    assert "maml train ARGS" in capsys.readouterr().err
    assert "maml describe" in printed(capsys)
    assert printed(capsys, "--version") == f"maml {maml.__version__}\n"


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("+experiment=x seed=1", "mode=eval +experiment=x seed=1"),
        ("-m +experiment=x", "-m mode=eval +experiment=x"),
        ("+experiment=x -m", "mode=eval +experiment=x -m"),
        ("--cfg job", "--cfg job mode=eval"),
    ],
)
def test_eval_is_train_in_another_mode(given: str, wanted: str) -> None:
    assert eval_arguments(given.split()) == wanted.split()


@pytest.mark.parametrize(
    ("argv", "processes", "command"),
    [
        ("/v/bin/maml +experiment=x", 1, "maml train +experiment=x"),
        ("/v/bin/maml mode=eval +experiment=x", 1, "maml eval +experiment=x"),
        ("/s/maml/__main__.py seed=1", 1, "python -m maml train seed=1"),
        ("/v/bin/maml seed=1", 2, "torchrun --nproc-per-node=2 -m maml train seed=1"),
        (f"{ROOT}/train.py mode=eval seed=1", 1, "python train.py mode=eval seed=1"),
    ],
)
def test_recorded_command_is_what_one_would_type(
    argv: str, processes: int, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", argv.split())
    monkeypatch.setattr("maml.hardware.distributed.world_size", lambda: processes)
    monkeypatch.setattr("maml.hardware.distributed.local_world_size", lambda: processes)
    assert command_line() == command


def test_reader_that_has_enough_ends_a_command_quietly() -> None:
    program = "import time; from maml.cli import main; time.sleep(0.5); main(['list'])"  # the reader is gone by then
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(program)} | true"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr == ""
