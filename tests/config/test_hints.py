"""Hints that follow an error: the probable spelling, and no hint where nothing was misspelt."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from maml.config.hints import explain_override_error
from tests.runs import ROOT

EXPERIMENT = "sinusoid_10shot"


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["inner.step_sise=0.1"], "inner.step_sise is not a key: did you mean inner.step_size? allowed: step_size, "),
        (["num_iteration=5"], "num_iteration is not a key: did you mean num_iterations?"),
        (["inner=null"], "inner=null: no such file in conf/inner/; allowed: adam, "),
        (
            ["model=mpl"],
            "model=mpl: no such file in conf/model/: did you mean mlp? "
            "allowed: categorical_policy, conv4, conv_pairs, ",
        ),
        (["+debug=smok"], "+debug=smok: no such file in conf/debug/: did you mean smoke?"),
        (
            ["+experiment=sinusoid_multitask"],
            "did you mean sinusoid_multitask_average or sinusoid_multitask_average_l2 or",
        ),
        (["+experiment=zzz"], "+experiment=zzz: no such file in conf/experiment/; `maml list` says what each"),
        ([EXPERIMENT], f"{EXPERIMENT}: did you mean +experiment={EXPERIMENT}?"),
        (["model=conv4", "model.num_filter=3"], "did you mean model.num_filters?"),
        (["logger.mode=offline"], "logger.mode is not a key: logger has none"),
        (["inner.num_tasks=9"], "inner.num_tasks is not a key: did you mean evaluation.num_tasks?"),
        (["step_size=0.1"], "step_size is not a key: did you mean inner.step_size or outer.step_size or"),
        (["inner.step_size=", "0.01"], "0.01: a setting is KEY=VALUE, without spaces around ="),
        (["runs_dir=/a/my runs(1)"], "needs quotes within quotes: 'runs_dir=\"/a/my runs(1)\"'"),
        (["runs_dir=~/runs"], "(~ is not your home folder then: write $HOME)"),
        (["-m", f"+experiment={EXPERIMENT}", "domain.num_shot=3"], "did you mean domain.num_shots?"),
        (["-m", "seed=0,1", "outer.step_sizes=0.1,0.2"], "did you mean outer.step_size?"),
        (["-m", "model=conv4,mpl"], "model=mpl: no such file in conf/model/: did you mean mlp?"),
        (["-m", "+experiment=choice(sinusoid_10shot,sinusid_oracle)"], "did you mean sinusoid_oracle?"),
        (["-m", "+experiment=glob(sinusoid_1*)", "evaluation.num_tsks=3"], "did you mean evaluation.num_tasks?"),
    ],
)
def test_hint_names_what_was_meant(arguments: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert explain_override_error(arguments)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert hint in lines[0]


@pytest.mark.parametrize(
    "arguments",
    [
        ["domain=omniglot", "model=conv4", "domain.num_ways=5", "model.num_filters=32", "inner.step_size=-1"],
        [f"+experiment={EXPERIMENT}", "+zzz=3", "~outer.clip", "hydra.verbose=true", "-m"],
        ["seed=0,1", "model=mlp,conv4", "--cfg=job"],
        ["-m", "seed=range(0,3)", "model='mlp','conv4'", "+experiment=glob(sinusoid_*)"],
    ],
)
def test_hint_is_silent_about_keys_that_exist(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert not explain_override_error(arguments)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("option", [("--config-dir", "{}"), ("-cd", "{}"), ("--config-dir={}",)])
def test_options_of_the_users_own_folder_are_known(
    option: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("{}")
    words = [word.format(tmp_path) for word in option]
    assert not explain_override_error([*words, "model=mine"])
    assert explain_override_error([*words, "model=mime"])
    assert "did you mean mine?" in capsys.readouterr().err


def _slow(*arguments: list[str]) -> Any:
    """Each of these is a process of its own."""
    return pytest.param(*arguments, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["inner.step_sise=0.1"], ["inner.step_sise is not a key: did you mean inner.step_size?"]),
        _slow(
            ["+experiment=sinusoid_10shto"], ["+experiment=sinusoid_10shto: no such file in conf/experiment/: did you "]
        ),
        _slow(["-m", "inner.step_sise=0.1,0.2"], ["inner.step_sise is not a key: did you mean inner.step_size?"]),
        (["hydra/launcher=foo"], ["In 'hydra/config': Could not find 'hydra/launcher/foo'; allowed: basic, "]),
        _slow(
            ["experiment=sinusoid_10shot"],
            ["Could not override 'experiment'. No match", "To append to your default list use +expe"],
        ),
        _slow(["inner=null"], ["inner=null: no such file in conf/inner/; allowed: adam, "]),
        (["+inner.sise=1"], ["Error executing job", "the config is not valid:", "  inner.sise is not a key"]),
    ],
)
def test_misspelt_word_costs_a_few_lines(words: list[str], lines: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "train.py", *words, f"runs_dir={tmp_path / 'runs'}"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (process.returncode, process.stdout) == (1, "")
    said = process.stderr.splitlines()
    assert len(said) == len(lines), said
    assert all(line.startswith(start) for line, start in zip(said, lines, strict=True)), said
    assert list(tmp_path.iterdir()) == []
