"""Hints that follow an error: the probable spelling, and no hint where nothing was misspelt."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from maml.config.hints import explain_override_error
from tests.runs import ROOT

EXPERIMENT = "sinusoid_10shot"


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["inner.step_sise=0.1"], "inner.step_sise is not a key: did you mean inner.step_size? allowed: step_size, "),
        (["num_iteration=5"], "num_iteration is not a key: did you mean num_iterations?"),
        (["model=mpl"], "model=mpl: no such file in conf/model/: did you mean mlp? allowed: conv4, gaussian_policy, "),
        (["+debug=smok"], "+debug=smok: no such file in conf/debug/: did you mean smoke?"),
        (
            ["+experiment=sinusoid_multitask"],
            "did you mean sinusoid_multitask_average or sinusoid_multitask_average_l2 or",
        ),
        (["+experiment=zzz"], "+experiment=zzz: no such file in conf/experiment/; `maml list` says what each"),
        ([EXPERIMENT], f"{EXPERIMENT}: did you mean +experiment={EXPERIMENT}?"),
        (["model=conv4", "model.num_filter=3"], "did you mean model.num_filters?"),
        (["-m", f"+experiment={EXPERIMENT}", "domain.num_shot=3"], "did you mean domain.num_shots?"),
        (["-m", "seed=0,1", "outer.step_sizes=0.1,0.2"], "did you mean outer.step_size?"),
    ],
)
def test_hint_names_what_was_meant(arguments: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    explain_override_error(arguments)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert hint in lines[0]


@pytest.mark.parametrize(
    "arguments",
    [
        ["domain=omniglot", "model=conv4", "domain.num_ways=5", "model.num_filters=32", "inner.step_size=-1"],
        [f"+experiment={EXPERIMENT}", "+zzz=3", "~outer.clip", "hydra.verbose=true", "-m"],
        ["seed=0,1", "model=mlp,conv4", "--cfg=job"],
    ],
)
def test_hint_is_silent_about_keys_that_exist(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    explain_override_error(arguments)
    assert capsys.readouterr().err == ""


def test_misspelt_key_on_the_command_line_ends_with_the_hint(tmp_path: Path) -> None:
    command = [sys.executable, "train.py", f"runs_dir={tmp_path / 'runs'}", "inner.step_sise=0.1"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert process.returncode == 1
    assert "inner.step_sise is not a key: did you mean inner.step_size?" in process.stderr.splitlines()[-1]
    assert "Traceback" not in process.stderr
    assert list(tmp_path.iterdir()) == []
