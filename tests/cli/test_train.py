"""`maml train` and `maml eval`: the runs of `python train.py`, and what they say about a wrong command."""

from __future__ import annotations

import importlib.metadata
import os
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from maml.cli import main
from maml.cli.train import run
from maml.config.paths import CONF
from maml.record.run_files import read_json
from tests.runs import ROOT, TinyRuns


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


SMOKE = ("+debug=smoke", "hardware=cpu", "evaluation.num_shots=[5]", "evaluation.num_steps=1")


def command(monkeypatch: pytest.MonkeyPatch, tiny: TinyRuns, *words: str) -> None:
    monkeypatch.setattr("sys.path", list(sys.path))
    options = [word for word in words if word.startswith("-")]
    others = [word for word in words if not word.startswith("-")]
    places = [f"runs_dir={tiny.runs_dir}"] * ("~runs_dir" not in words)
    monkeypatch.setattr("sys.argv", ["/v/bin/maml", "train", *options, *SMOKE, *places, *others])
    main()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["seed=${nope}"], ["Error executing job", "seed: Interpolation key 'nope' not found"]),
        (["inner.step_size=${nope}"], ["Error executing job", "inner.step_size: Interpolation key 'nope' not found"]),
        (["model=module"], ["Error executing job", "model.module._target_ has no value, and the run needs one: set"]),
        (["~runs_dir"], ["Error executing job", "the config is not valid:", "  runs_dir is missing"]),
        (["domain=5"], ["domain=5: no such file in conf/domain/; allowed: "]),
        (["model=null"], ["model=null: no such file in conf/model/; allowed: "]),
        (["=5"], ["=5: there is no key before the ="]),
        (["hydra=null"], ["ValueError: Config group override must be a string or a list"]),
        (["runs_dir=/dev/null/x"], ["Error executing job", "the run folder /dev/null/x/custom/"]),
        (["-m", "seed=0,1", "inner.step_size=-1"], ["+debug=smoke ", "  inner.step_size=-1: input should be greater"]),
        (["-m", "seed=0,1", "seeds=${nope}"], ["+debug=smoke "]),
        (
            ["inner.adapt={head:1}"],
            ["inner.adapt={head:1}: a mapping {...} does not replace a list [...], nor the other way round; write '~"],
        ),
        (
            ["outer=adam_cosine", "outer.schedule={nope:1}"],
            ["outer.schedule={nope:1} can only change entries that are there. '++outer.schedule={nope:1}' adds "],
        ),
        (
            ["-m", "inner.step_size=interval(0.1,1)"],
            ["interval(...) draws values, which needs a sweeper that can"],
        ),
    ],
)
def test_wrong_command_costs_three_lines_and_writes_nothing(
    words: list[str],
    said: list[str],
    tiny: TinyRuns,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, tiny, *words)
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 1
    assert len(lines) == len(said), lines
    assert all(line.startswith(start) for line, start in zip(lines, said, strict=True)), lines
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["defaults: [override /inner: adam]\n", "num_iterations: 3\n"])
def test_own_experiment_without_its_first_line_is_refused_with_the_line(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.path", list(sys.path))
    path = tmp_path / "conf" / "experiment" / "mine.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(f"# My experiment.\n{text}")
    words = ["--config-dir", str(tmp_path / "conf"), "+experiment=mine", f"runs_dir={tmp_path / 'runs'}"]
    monkeypatch.setattr("sys.argv", ["/v/bin/maml", "train", *words])
    with pytest.raises(SystemExit):
        main()
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"{path}: an experiment sets keys of all groups, so its first line has to be `# @package _global_`"
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("launcher", "plugin", "words", "said"),
    [
        (
            "joblib",
            "hydra-joblib-launcher",
            ["hydra.launcher.n_jobs=0"],
            "hydra.launcher.n_jobs=0: it has to be",
        ),
        ("slurm", "hydra-submitit-launcher", [], "launcher=slurm: this machine has no SLURM (srun not found)"),
    ],
)
def test_launcher_that_cannot_start_says_why_and_writes_nothing(
    launcher: str,
    plugin: str,
    words: list[str],
    said: str,
    tiny: TinyRuns,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if plugin not in {each.name for each in importlib.metadata.distributions()}:
        pytest.skip(f"no {plugin}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(SystemExit):
        command(monkeypatch, tiny, f"launcher={launcher}", "seed=0,1", *words)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(said)
    assert list(tmp_path.iterdir()) == []


def test_wrong_environment_is_refused_and_a_rank_that_was_left_over_is_not(
    tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "abc")
    with pytest.raises(SystemExit, match="WORLD_SIZE='abc'"):
        command(monkeypatch, tiny)
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("RANK", "1")
    command(monkeypatch, tiny, "num_iterations=0")
    assert "RANK" not in os.environ
    assert len(list(tiny.runs_dir.glob("custom/*/report.json"))) == 1


def test_error_of_a_users_class_is_raised_without_a_hint(
    tiny: TinyRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "conf" / "domain").mkdir(parents=True)
    (tmp_path / "conf" / "domain" / "own.yaml").write_text("_target_: own_failing.Own\n")
    (tmp_path / "own_failing.py").write_text(
        "from maml.domain.sinusoid import Sinusoid\n"
        "class Own(Sinusoid):\n"
        "    def __init__(self) -> None:\n"
        "        raise ValueError('classes of unequal size')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="classes of unequal size"):
        command(monkeypatch, tiny, f"--config-dir={tmp_path / 'conf'}", "domain=own")
    assert "no such file" not in capsys.readouterr().err


@pytest.mark.parametrize("diverges", [False, True])
def test_adaptation_that_diverged_has_no_number_for_a_sweep(
    diverges: bool, tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["num_iterations=3", *(["evaluation.step_size=1e30"] if diverges else [])]
    words = [*tiny.base, f"runs_dir={tiny.runs_dir}", *more]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", words, return_hydra_config=True)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", config)
    headline = run(OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"]))
    assert (headline is None) is diverges, "Optuna counts None as a failed trial; NaN ends the search"
