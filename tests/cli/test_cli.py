"""The console script: its commands, lists and descriptions, and its messages for wrong arguments."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import maml
from maml.cli import eval_arguments, main
from maml.config.paths import CONF
from maml.record.run_folder import command_line, read_json
from tests.runs import ROOT, TinyRuns


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main(arguments)
    return capsys.readouterr().out


def refused(*arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return str(ended.value.code)


def test_list_has_a_line_for_every_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "list").splitlines()
    assert [line.split()[0] for line in lines] == sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
    assert len({re.match(r"  \S+ +", line).end() for line in lines}) == 1, "aligned"  # type: ignore[union-attr]
    assert not [line for line in lines if "python train.py" in line]


def test_list_finds_text_in_names_and_descriptions(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "list", "5WAY_1SHOT_fomaml").count("\n") == 3
    assert "ant_direction_maml" in printed(capsys, "list", "figure 5")


def test_list_is_quick_because_it_needs_no_torch() -> None:
    code = "import sys; from maml.cli import main; main(['list']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False).returncode == 0


def test_unknown_words_are_answered_with_what_was_meant() -> None:
    assert "did you mean omniglot?" in refused("list", "omniglt")
    assert refused("describe", "step_size").endswith(
        "did you mean inner.step_size or outer.step_size or evaluation.step_size?"
    )
    assert "did you mean inner.step_size?" in refused("describe", "inner.step_sise")
    assert "did you mean model=conv4?" in refused("describe", "model=conv5")
    assert "did you mean domain?" in refused("describe", "domian")
    assert refused("describe", "a", "b").startswith("maml describe takes one word")


def test_unknown_command_shows_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused("trian") == "2"
    assert "maml train ARGS" in capsys.readouterr().err
    assert "maml describe" in printed(capsys)
    assert printed(capsys, "--version") == f"maml {maml.__version__}\n"


def test_describe_key_gives_meaning_type_range_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "describe", "inner.step_size")
    for part in ("meaning  The paper's alpha.", "type     number", "range    > 0", "default  0.01  (inner=sgd)"):
        assert part in text
    assert "none: you must set it  (evaluation=accuracy)" in printed(capsys, "describe", "evaluation.num_steps")


def test_describe_group_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert "domain=omniglot " in printed(capsys, "describe", "domain")
    text = printed(capsys, "describe", "model=conv4")
    assert "maml.model.conv4.Conv4" in text
    assert "model.num_filters=64" in text
    assert "inner.order=1" in printed(capsys, "describe", "algorithm=fomaml")
    assert "Config groups" in printed(capsys, "describe")
    assert "num_iterations" in printed(capsys, "describe", "+experiment=sinusoid_10shot")


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


def test_train_and_eval_do_what_train_py_does(tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    words = ["+experiment=sinusoid_10shot", "+debug=smoke", f"runs_dir={tiny.runs_dir}", "hardware=cpu"]
    for command in ("train", "eval"):
        monkeypatch.setattr("sys.argv", ["/v/bin/maml", command, *words])
        main()
    assert str(tmp_path) in sys.path, "classes in the user's folder can be imported"
    (folder,) = tiny.runs_dir.glob("sinusoid_10shot/*")
    record = read_json(folder / "run.json")
    assert record
    assert record["status"] == "finished"
    assert record["command"] == shlex.join(["maml", "train", *words])
    report = (folder / "report.json").read_bytes()

    monkeypatch.setattr("sys.argv", ["train.py", *words[:2], f"runs_dir={tmp_path / 'other'}", words[3]])
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    (other,) = (tmp_path / "other").glob("sinusoid_10shot/*/report.json")
    assert other.read_bytes() == report
