"""The output of `maml list` and `maml describe`, and their messages for unknown names."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from maml.config.paths import CONF
from tests.cli.test_cli import printed, refused
from tests.runs import ROOT


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
    assert refused("list", "--config-dir") == "maml list has one option, --config-dir DIR; there is --config-dir"


def test_describe_key_gives_meaning_type_range_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "describe", "inner.step_size")
    for part in (
        "meaning  Step size of every step, the paper's alpha.",
        "type     number",
        "range    > 0",
        "default  0.01  (inner=sgd)",
    ):
        assert part in text
    assert "none: you must set it  (evaluation=accuracy)" in printed(capsys, "describe", "evaluation.num_steps")


def test_describe_group_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert "domain=omniglot " in printed(capsys, "describe", "domain")
    text = printed(capsys, "describe", "model=conv4")
    assert "maml.model.conv4.Conv4" in text
    assert "model.num_filters=64" in text
    assert "Table 2" in printed(capsys, "describe", "sinusoid_10shot").partition("\n")[0]
    assert "inner.order=1" in printed(capsys, "describe", "algorithm=fomaml")
    assert "Config groups" in printed(capsys, "describe")
    assert "num_iterations" in printed(capsys, "describe", "+experiment=sinusoid_10shot")


def test_missing_folder_of_own_configs_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", list(sys.path))
    for words in (["list"], ["describe", "logger"]):
        assert refused(*words, "--config-dir", "nowhere").startswith("--config-dir: there is no folder nowhere")


def test_own_options_and_experiments_are_shown_beside_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.path", list(sys.path))
    for name, text in (
        ("experiment/mine", "# @package _global_\n# My sinusoids.\ndefaults: [sinusoid_10shot]\n"),
        ("inner/mine", "# My steps.\n_target_: maml.inner.sgd.SGD\nstep_size: 0.3\n"),
    ):
        path = tmp_path / "conf" / f"{name}.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    own = ("--config-dir", str(tmp_path / "conf"))
    assert printed(capsys, "list", "mine", *own).split() == ["mine", "My", "sinusoids."]
    assert "sinusoid_10shot" in printed(capsys, "list", *own)
    text = printed(capsys, "describe", f"--config-dir={tmp_path / 'conf'}", "inner=mine")
    assert "inner=mine: My steps." in text and "inner.step_size=0.3" in text
    assert "sinusoid_10shot" in printed(capsys, "describe", "experiment", *own)
