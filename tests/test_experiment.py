"""One experiment, from settings to report: refused before anything is written, resumed, judged, printed, evaluated."""

from __future__ import annotations

import itertools
import math
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from maml.algorithm.maml import MAML
from maml.config.schema import Settings
from maml.domain.base import Metrics
from maml.domain.sinusoid import Sinusoid
from maml.errors import Interrupted, MamlError
from maml.experiment import build_algorithm, run_experiment
from maml.hardware.base import Hardware
from maml.logger.base import Logger
from maml.model.mlp import MLP
from maml.record.index import read_run
from maml.record.plot import plot_report
from maml.record.report import Judgement
from maml.record.run_files import read_json
from maml.types import Examples, Params, Tasks
from tests.runs import TinyRuns, assert_same_run, before_iteration, file_contents
from tests.training.test_survival import training_forbidden

Reference = Callable[[TinyRuns], Path]


class Noting(Logger):
    """A logger that keeps all calls, of all runs, in order."""

    told: list[tuple[str, Any]] = []

    def start(self, run_dir: Path, experiment: str, run_id: str, config: Mapping[str, Any], resumed: bool) -> None:
        self.told.append(("start", (experiment, run_id, resumed)))

    def report(self, report: dict[str, Any], pictures: Mapping[str, Path]) -> None:
        self.told.append(("report", report))

    def finish(self, status: str) -> None:
        self.told.append(("finish", status))


NOTING = f"logger._target_={__name__}.Noting"
SHORT = ("num_iterations=10", "evaluation.num_tasks=3")


@pytest.fixture
def told() -> Iterator[list[tuple[str, Any]]]:
    Noting.told.clear()
    yield Noting.told
    Noting.told.clear()


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("outer=trpo",), "choose outer=adam, or an RL domain"),
        (("domain=point_navigation", "algorithm=multitask_average"), "learns from labelled examples"),
        (("seed=9223372036854775807", "seeds=2"), "seeds=2 from seed=9223372036854775807 on end above 2"),
        (("inner=learned_sgd", "algorithm=pretrain"), "does not differentiate through adaptation"),
        (("model=conv4",), r"takes images \(height, width, channels\)"),
        (("evaluation.step_size={5: 0.1}",), "no entry for K=10"),
        (("evaluation.num_steps=0", "evaluation.step_size=0.1"), r"evaluation\.num_steps=0 takes none"),
        (("algorithm=random_init", "validate_every=2"), "random_init learns nothing"),
        (("num_iterations=0", "validate_every=2"), "num_iterations=0 trains nothing; set validate_every=null"),
        (("algorithm=multitask_average", "outer=adam_cosine"), "trains each regressor anew.*; set outer.schedule=null"),
        (("algorithm=multitask_average", "outer=sgd", "outer.final_step_size=0"), "trains each regressor anew"),
        (("algorithm=multitask_average", "algorithm.pull=mean"), "which is not at all; set a weight"),
        (("algorithm=multitask_average", "algorithm.num_examples=11"), "some would count twice"),
        (("hardware.min_processes=2",), "1 process, fewer than hardware"),
        (("checkpoint=a.pt",), "checkpoint= is for mode=eval"),
        (("run_dir=here", "seeds=2"), "run_dir= and checkpoint= are for one run"),
        (("mode=eval",), "there is nothing to evaluate"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(
    tiny: TinyRuns, overrides: tuple[str, ...], reason: str, told: list[tuple[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(MamlError, match=reason):
        tiny.run(NOTING, *overrides)
    assert list(tmp_path.iterdir()) == []
    assert told == [], "no mirror is opened"


def test_run_is_mirrored_from_start_to_finish(
    tiny: TinyRuns, told: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maml.experiment.plot_report", plot_report)
    folder = tiny.run(NOTING, *SHORT)
    (start, begun), (report, content), (finish, status) = told
    assert (start, report, finish) == ("start", "report", "finish")
    assert begun == ("custom", folder.name, False)
    assert status == "finished"
    saved = read_json(folder / "report.json")
    assert {key: content[key] for key in saved or {}} == saved
    assert content["cells"] == {}
    with Image.open(folder / "report.png") as picture:
        assert picture.size == (1200, 520), "adaptation and training"


class Lacking(Noting):
    """A logger that has no run yet."""

    has_it: bool = False

    def has(self, *arguments: Any) -> bool:
        return self.has_it


def test_finished_run_is_sent_to_a_logger_that_lacks_it(
    tiny: TinyRuns, told: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking = f"logger._target_={__name__}.Lacking"
    folder = tiny.run(*SHORT)
    before = file_contents(folder)
    monkeypatch.setattr("maml.experiment.train", training_forbidden)
    tiny.run(*SHORT, lacking)
    (_, begun), (_, content), (_, status) = told
    assert (begun, status) == (("custom", folder.name, False), "finished")
    assert content == {**(read_json(folder / "report.json") or {}), "cells": {}}
    monkeypatch.setattr(Lacking, "has_it", True)
    tiny.run(*SHORT, lacking)
    assert len(told) == 3
    assert file_contents(folder) == before


def test_evaluation_of_a_saved_state_is_a_run_of_its_own_for_the_logger(
    tiny: TinyRuns, told: list[tuple[str, Any]]
) -> None:
    folder = tiny.run(*SHORT)
    tiny.run(*SHORT, NOTING, "mode=eval", "evaluation.num_steps=1")
    assert [kind for kind, _ in told] == ["start", "report", "finish"]
    (evaluation,) = folder.glob("evaluations/*/report.json")
    saved = read_json(evaluation) or {}
    assert {key: told[1][1][key] for key in saved} == saved


def test_stopped_run_is_resumed_by_the_same_command_and_its_mirror_told(
    tiny: TinyRuns, told: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        before_iteration(patch, 5, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        tiny.run(NOTING, *SHORT)
    assert told[-1] == ("finish", "interrupted")
    folder = tiny.run(NOTING, *SHORT)
    assert [what[2] for kind, what in told if kind == "start"] == [False, True]
    assert told[-1] == ("finish", "finished")
    assert_same_run(folder, tiny.in_folder("whole").run(*SHORT))


def test_failed_run_is_told_to_its_mirror_and_recorded(
    tiny: TinyRuns, told: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="a bug"):
        before_iteration(patch, 5, fail)
        tiny.run(NOTING, *SHORT)
    assert told[-1] == ("finish", "failed")
    record = read_json(tiny.folder(*SHORT) / "run.json")
    assert record is not None and record["status"] == "failed"


def test_judge_is_shown_the_report_and_what_it_says_is_printed_in_it_and_mirrored(
    tiny: TinyRuns, told: list[tuple[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    config, shown = tiny.config(NOTING, *SHORT), []

    def judge(experiment: str, settings: Settings, report: Mapping[str, Any]) -> dict[str, Judgement]:
        shown.append((experiment, settings, report["headline"]))
        text = "0.50 (paper 0.67): better"
        return {"table9/MAML/K10": Judgement("mse", 10, 1, "0.67", "better", text)}

    headline = run_experiment(config, "custom", judge)
    assert shown == [("custom", config, headline)]
    *lines, written = capsys.readouterr().out.splitlines()
    (judged,) = (line for line in lines if "better" in line)
    assert re.fullmatch(r"    step  1: +\d\.\d{4} \+- \d\.\d{4}   0\.67    better", judged)
    assert written == f"written to {tiny.folder(*SHORT)}"
    assert dict(told)["report"]["cells"] == {"table9/MAML/K10": "0.50 (paper 0.67): better"}
    assert "cells" not in (read_json(tiny.folder(*SHORT) / "report.json") or {}), "a verdict is no measurement"


def test_headline_is_the_last_step_at_the_domains_own_k_and_the_mean_over_seeds(tiny: TinyRuns) -> None:
    """The tiny runs evaluate K=5 and K=10; the domain trains with 10, or with 7, which is not evaluated."""
    both = run_experiment(tiny.config(*SHORT, "seeds=2"), "custom")
    lasts = []
    for seed in (0, 1):
        report = read_json(tiny.folder(*SHORT, f"seed={seed}") / "report.json")
        assert report is not None
        (curve,) = (curve for curve in report["curves"] if curve["num_shots"] == 10)
        assert report["headline"] == curve["steps"][-1]["mean"]
        lasts.append(report["headline"])
    assert both == pytest.approx(sum(lasts) / 2, rel=1e-12)
    other = run_experiment(tiny.config(*SHORT, "domain.num_shots=7"), "custom")
    report = read_json(tiny.folder(*SHORT, "domain.num_shots=7") / "report.json")
    assert report is not None
    assert other == report["curves"][0]["steps"][-1]["mean"], "the first K in the list"


def test_damaged_checkpoint_of_a_later_seed_is_named_before_anything_is_written(tiny: TinyRuns) -> None:
    later = tiny.run(*SHORT, "seed=1", "evaluation.num_steps=1")
    (later / "checkpoint.pt").write_bytes(b"PK")
    kept = file_contents(tiny.runs_dir)
    with pytest.raises(MamlError, match=re.escape(str(later / "checkpoint.pt"))):
        tiny.run(*SHORT, "seeds=2")
    assert file_contents(tiny.runs_dir) == kept


def test_adaptation_that_diverged_has_no_number_for_a_sweep(tiny: TinyRuns) -> None:
    assert math.isnan(run_experiment(tiny.config(*SHORT, "evaluation.step_size=1e30"), "custom"))


def test_same_command_after_the_end_trains_nothing_and_gives_the_same_number(
    tiny: TinyRuns, uninterrupted: Reference, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(uninterrupted(tiny), tiny.folder())
    before = file_contents(tiny.folder())
    report = read_json(tiny.folder() / "report.json")
    assert report is not None
    with training_forbidden(monkeypatch):
        assert run_experiment(tiny.config(), "custom") == report["headline"]
    _, _, said = capsys.readouterr().out.partition(f"already finished: {tiny.folder()}")
    assert "mse, K=10" in said and f"{report['headline']:.4f}" in said
    assert file_contents(tiny.folder()) == before


@pytest.mark.parametrize(
    "other", ["evaluation.num_shots=[3]", "evaluation.num_steps=4", "evaluation.bank_seed=1", "evaluation.split=val"]
)
def test_other_evaluation_of_a_finished_run_stands_beside_the_first(
    other: str, tiny: TinyRuns, uninterrupted: Reference
) -> None:
    shutil.copytree(uninterrupted(tiny), tiny.folder())
    before = file_contents(tiny.folder())
    tiny.run("mode=eval", other)
    after = file_contents(tiny.folder())
    assert {name: after[name] for name in before} == before
    (folder,) = (tiny.folder() / "evaluations").iterdir()
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "report.json", "report.png", "tasks.csv"}
    report = read_json(folder / "report.json")
    assert report is not None
    name, _, value = other.removeprefix("evaluation.").partition("=")
    assert str(report["evaluation"][f"evaluation.{name}"]) == value


def test_training_command_with_another_evaluation_only_evaluates(
    tiny: TinyRuns, uninterrupted: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(uninterrupted(tiny), tiny.folder())
    with training_forbidden(monkeypatch):
        tiny.run("evaluation.num_shots=[3]")
    assert_same_run(tiny.folder(), uninterrupted(tiny))
    assert len(list((tiny.folder() / "evaluations").iterdir())) == 1


def test_same_evaluation_again_writes_the_same_report(tiny: TinyRuns, uninterrupted: Reference) -> None:
    shutil.copytree(uninterrupted(tiny), tiny.folder())
    tiny.run("mode=eval")
    tiny.run("mode=eval", f"checkpoint={tiny.folder()}")  # the folder of a run, or its file
    tiny.run("mode=eval", f"checkpoint={tiny.folder() / 'checkpoint.pt'}")
    assert_same_run(tiny.folder(), uninterrupted(tiny))
    (again,) = (tiny.folder() / "evaluations").iterdir()
    for name in ("report.json", "tasks.csv"):
        assert (again / name).read_bytes() == (tiny.folder() / name).read_bytes()


@pytest.mark.parametrize(
    "lost", [("report.png",), ("tasks.csv",), ("report.json", "report.png"), ("tasks.csv", "report.png")]
)
def test_lost_file_of_a_finished_run_is_made_again(
    lost: tuple[str, ...], tiny: TinyRuns, uninterrupted: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(uninterrupted(tiny), tiny.folder())
    before = file_contents(tiny.folder())
    for name in lost:
        (tiny.folder() / name).unlink()
    with training_forbidden(monkeypatch):
        tiny.run()
    assert file_contents(tiny.folder()) == before


def test_picture_of_a_run_without_checkpoint_is_drawn_again_and_its_mirror_left_alone(
    tiny: TinyRuns, uninterrupted: Reference, told: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(uninterrupted(tiny), tiny.folder())
    for path in (*tiny.folder().glob("checkpoint*"), tiny.folder() / "report.png"):
        path.unlink()
    with training_forbidden(monkeypatch):
        tiny.run(NOTING)
    assert (tiny.folder() / "report.png").exists()
    assert (tiny.folder() / "metrics.jsonl").read_bytes() == (uninterrupted(tiny) / "metrics.jsonl").read_bytes()
    assert told == []


def test_run_that_was_killed_before_its_mirror_was_told_is_finished(
    tiny: TinyRuns, told: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def kill(self: Noting, status: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Noting, "finish", kill)
        tiny.run(NOTING, *SHORT)
    run = read_run(tiny.folder(*SHORT))
    assert run is not None and (run.record.status, run.status) == ("interrupted", "finished")
    told.clear()
    monkeypatch.setattr("maml.evaluation.Evaluation.__call__", lambda *_: pytest.fail("evaluated again"))
    judged = {"table9/a": Judgement("mse", 10, 1, "0.5", "better", "both numbers: better")}
    headline = run_experiment(tiny.config(NOTING, *SHORT), "custom", lambda *_: judged)
    (start, (*_, resumed)), (report, content), finish = told
    assert (start, resumed, report, finish) == ("start", True, "report", ("finish", "finished"))
    assert (content["headline"], content["cells"]) == (headline, {"table9/a": "both numbers: better"})
    assert "was evaluated, but lacked status: now it is finished" in capsys.readouterr().out
    record = read_json(tiny.folder(*SHORT) / "run.json")
    assert record is not None and record["status"] == "finished"


def test_evaluation_tries_no_outer_optimizer(tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    def check_step(*_: object) -> None:
        raise MamlError("tried a step")

    tiny.run(*SHORT)
    monkeypatch.setattr("maml.experiment.check_step", check_step)
    tiny.run(*SHORT, "mode=eval")
    with pytest.raises(MamlError, match="tried a step"):
        tiny.run(*SHORT)


def test_evaluation_of_an_unfinished_training_says_how_far_it_was(
    tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        before_iteration(patch, 5, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        tiny.run(*SHORT)
    folder = tiny.run(*SHORT, "mode=eval")
    (evaluation,) = folder.glob("evaluations/*/report.json")
    report = read_json(evaluation)
    assert report is not None
    assert (report["iteration"], report["num_iterations"]) == (5, 10)


def test_evaluation_of_nothing_trained_says_what_to_do(tiny: TinyRuns) -> None:
    with pytest.raises(MamlError, match=r"there is nothing to evaluate in .*: train first"):
        tiny.run("mode=eval")
    assert not tiny.runs_dir.exists()


def test_evaluation_of_a_missing_checkpoint_names_it(tiny: TinyRuns, tmp_path: Path) -> None:
    with pytest.raises(MamlError, match=r"there is no checkpoint at .*nowhere\.pt"):
        tiny.run("mode=eval", f"checkpoint={tmp_path / 'nowhere.pt'}")
    assert not tiny.runs_dir.exists()


class Misnamed(Sinusoid):
    """A domain of a user whose headline is none of its metrics."""

    headline = "error"


class OtherMetrics(Sinusoid):
    """A domain of a user that measures something else after the first step."""

    def measure(self, *args: Any) -> Metrics:
        measured = super().measure(*args)
        return measured if args[-1] == 0 else {"other": measured["mse"]}


class MeanMeasured(Sinusoid):
    """A domain of a user that averages over tasks and query points."""

    def measure(self, *args: Any) -> Metrics:
        return {name: value.mean() for name, value in super().measure(*args).items()}


class Short(MAML):
    """An algorithm of a user that forgets the start."""

    def adapt(self, *args: Any) -> Iterator[Params]:
        return itertools.islice(super().adapt(*args), 1, None)


class Shared(Sinusoid):
    """A domain of a user whose tasks have an entry without a task axis."""

    def draw_tasks(self, *args: Any, **options: Any) -> Tasks:
        return super().draw_tasks(*args, **options) | {"constant": torch.arange(17.0)}


class OneTask(Sinusoid):
    """A domain of a user that always draws one task."""

    def draw_tasks(self, num_tasks: int, *args: Any, **options: Any) -> Tasks:
        return super().draw_tasks(1, *args, **options)


class Tuples(Sinusoid):
    """A domain of a user whose data are plain tuples."""

    def data(self, *args: Any, **options: Any) -> Any:
        return tuple(super().data(*args, **options))


class Wide(Sinusoid):
    """A domain of a user whose inputs are not those that it announces."""

    def data(self, *args: Any, **options: Any) -> Examples:
        examples = super().data(*args, **options)
        return examples._replace(x=examples.x.repeat(1, 1, 2))


class OneOutput(MLP):
    """A model of a user that gives one output for all examples."""

    def outputs(self, *args: Any) -> Any:
        return super().outputs(*args)[:, :1]


class OneValue(Sinusoid):
    """A domain of a user whose loss returns no metrics."""

    def loss(self, *args: Any) -> Any:
        return super().loss(*args)[0]

    def measure(self, model: Any, params: Params, support: Examples, query: Examples, step: int) -> Metrics:
        return {"mse": torch.zeros(len(query.x))}


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            "domain._target_={}.OtherMetrics",
            "OtherMetrics.measure returns other after 1 gradient steps, but mse",
        ),
        ("domain._target_={}.MeanMeasured", r"MeanMeasured.measure returns 'mse' of shape \(\), but for 1 tasks"),
        ("algorithm._target_={}.Short", "Short.adapt has to yield parameters after 0, 1, ..., 1 gradient steps"),
        ("domain._target_={}.Shared", r"Shared has to draw tasks as .* constant of shape \(17,\)"),
        ("domain._target_={}.OneTask", r"OneTask has to draw tasks .* with \d+ tasks as their first axis, .* \(1"),
        ("domain._target_={}.Tuples", "Tuples.data has to return Examples, but returns tuple"),
        ("domain._target_={}.Wide", r"Wide.data has to .* its in_shape is \(1,\), but it returns \(\d+, \d+, 2\)"),
        ("model._target_={}.OneOutput", r"OneOutput has to return outputs \(T, S, out_dim\) .* returns \(\d+, 1, 1\)"),
        ("domain._target_={}.OneValue", "OneValue.loss has to return two values.*; it returns Tensor"),
    ],
)
def test_wrong_return_of_a_users_class_is_an_error_before_training(tiny: TinyRuns, part: str, message: str) -> None:
    settings = tiny.config(part.format(__name__))
    with pytest.raises(MamlError, match=message):
        run_experiment(settings, "custom")
    assert not tiny.runs_dir.exists()


def test_headline_that_is_not_measured_is_named(tiny: TinyRuns) -> None:
    settings = tiny.config(f"domain._target_={__name__}.Misnamed")
    with pytest.raises(MamlError, match=r"Misnamed\.headline is error, but its measure returns mse only"):
        run_experiment(settings, "custom")
    assert not tiny.runs_dir.exists(), "the error comes before training"


def test_resumed_run_keeps_the_execution_of_its_checkpoint(tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        before_iteration(patch, 3, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        tiny.run("num_iterations=6", "hardware.task_chunk=1")
    folder = tiny.run("num_iterations=6")
    first, second = (part["execution"] for part in (read_json(folder / "run.json") or {})["segments"])
    assert first == second and first["task_chunk"] == 1


def test_seeds_begin_with_parameters_of_their_own(tiny: TinyRuns) -> None:
    first, again, second = (build_algorithm(tiny.config(f"seed={seed}"), Hardware("cpu")).theta for seed in (0, 0, 1))
    assert all(value.equal(again[name]) for name, value in first.items())
    assert not all(value.equal(second[name]) for name, value in first.items())
