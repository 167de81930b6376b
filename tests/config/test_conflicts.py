"""Options of the command and an experiment that contradict each other."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from maml.cli import main
from tests.runs import ROOT


@pytest.mark.parametrize(
    ("words", "explained"),
    [
        (["inner=meta_lstm"], ["inner.step_size"]),
        (["inner=meta_lstm", "inner.step_size=1"], []),  # the command sets it
        (["inner=mine"], []),  # the option's own file sets it
        (["model=mlp"], ["model.num_filters", "model.pooling", "model.head", "model.head_std"]),
    ],
)
def test_unknown_key_of_the_experiment_is_told_from_those_of_the_command(
    words: list[str],
    explained: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf" / "inner").mkdir(parents=True)
    lines = (ROOT / "conf" / "inner" / "meta_lstm.yaml").read_text()
    (tmp_path / "conf" / "inner" / "mine.yaml").write_text(f"{lines}step_size: 1.0\n")
    monkeypatch.setattr("sys.path", list(sys.path))
    places = [f"data_dir={tmp_path}", f"cache_dir={tmp_path}", f"runs_dir={tmp_path / 'runs'}"]
    arguments = ["--config-dir", "conf", "+experiment=mini_imagenet_5way_1shot", *places, *words]

    def said(*more: str) -> str:
        monkeypatch.setattr("sys.argv", ["/v/bin/maml", "train", *arguments, *more])
        with pytest.raises(SystemExit):
            main()
        return capsys.readouterr().err

    message = said()
    assert "is not a key" in message
    assert ("+experiment= sets" in message) == bool(explained), message
    if explained:
        advice = message.splitlines()[-1]
        assert advice.startswith(f"+experiment= sets {', '.join(explained)}, which")
        # What the message advises is enough: then only the photos are missing.
        assert "mini-ImageNet not found" in said(*shlex.split(advice.partition(" add ")[2].partition(" to leave")[0]))


def give_own_experiment(monkeypatch: pytest.MonkeyPatch, folder: Path, words: list[str], more: str = "") -> None:
    """Gives the command an experiment of the user, on photos that are missing, and further words."""
    monkeypatch.setattr("sys.path", list(sys.path))
    places = [f"data_dir={folder}", f"cache_dir={folder}", f"runs_dir={folder / 'runs'}"]
    (folder / "conf" / "experiment").mkdir(parents=True)
    (folder / "conf" / "experiment" / "mine.yaml").write_text(
        f"# @package _global_\ndefaults: [mini_imagenet_5way_1shot]\ninner: {{step_size: 0.4, num_steps: 1}}\n{more}"
    )
    settings = ["--config-dir", str(folder / "conf"), *places, "+experiment=mine"]
    monkeypatch.setattr("sys.argv", ["/v/bin/maml", "train", *settings, *words])


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["inner=adam", "inner.order=1"], ["inner.step_size=0.4 (default: 0.001)", "inner.num_steps=1 (default: 5)"]),
        (["inner=adam", "inner.order=1", "inner.step_size=0.4"], ["inner.num_steps=1 (default: 5)"]),
        (["inner=adam", "inner.order=1", "inner.step_size=0.1", "inner.num_steps=2"], []),
        (["inner=learned_sgd"], []),  # the same defaults
        (["inner.step_size=0.1"], []),
    ],
)
def test_values_of_the_experiment_for_another_option_are_named(
    words: list[str],
    kept: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    give_own_experiment(monkeypatch, tmp_path, words)
    with pytest.raises(SystemExit):  # the photos are missing
        main()
    *lines, missing = capsys.readouterr().err.splitlines()
    assert "mini-ImageNet not found" in missing
    expected = (
        f"{words[0]} has the experiment's values for inner=sgd: {', '.join(kept)}; if that is not meant, set them"
    )
    assert lines == [expected] * bool(kept)


@pytest.mark.parametrize(
    ("words", "asked", "has"),
    [
        (
            ["algorithm=prototypical"],
            "inner.num_steps=0 evaluation.num_steps=0",
            "inner.num_steps=1 evaluation.num_steps=5",
        ),
        (["algorithm=prototypical", "inner.num_steps=0"], "evaluation.num_steps=0", "evaluation.num_steps=5"),
        (["algorithm=reptile"], "inner.step_size=0.001 inner.num_steps=5", "inner.step_size=0.4 inner.num_steps=1"),
        (["algorithm=random_init"], "num_iterations=0", "num_iterations=60000"),
        (["algorithm=random_init", "+debug=smoke"], "", ""),
        (["algorithm=prototypical", "inner.num_steps=1", "evaluation.num_steps=0"], "", ""),
        (["algorithm=reptile", "inner=adam", "inner.step_size=0.001", "inner.num_steps=5"], "", ""),
        (["algorithm=fomaml"], "", ""),
        (["algorithm=context_vector"], "", ""),
    ],
)
def test_option_and_experiment_that_ask_for_different_values_are_refused(
    words: list[str],
    asked: str,
    has: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    give_own_experiment(monkeypatch, tmp_path, words, "evaluation: {num_steps: 5}\n")
    with pytest.raises(SystemExit):  # the photos are missing
        main()
    line = capsys.readouterr().err.splitlines()[-1]
    if asked:
        assert line == (
            f"{words[0]} asks for {asked}, but +experiment=mine sets {has}; add one or the other to the command, to "
            "say which is meant"
        )
    else:
        assert "mini-ImageNet not found" in line
