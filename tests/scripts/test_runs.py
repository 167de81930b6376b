"""scripts/runs.py: lists, details and comparisons of fake runs, and the deletion of unneeded runs only."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import re
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from maml.errors import MamlError
from maml.record.index import SUPERSEDED
from maml.record.settings import experiment_settings
from tests.paper.fake_runs import POINT, SINUSOID, edit, make_run, make_run_with_own_classes
from tests.runs import ROOT, TinyRuns, file_contents
from tests.sweep.fake_sweep import write_beat, write_job, write_report

SCRIPT = runpy.run_path(str(ROOT / "scripts" / "runs.py"))
main = SCRIPT["main"]

OTHER: dict[str, Any] = {"inner.step_size": 0.01}

Lines = Callable[..., list[str]]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Lines:
    """Runs the script on this test's folder and returns its output lines, errors last."""

    def call(*arguments: str, status: int = 0) -> list[str]:
        assert main([*arguments, "--runs-dir", str(tmp_path)]) == status
        printed = capsys.readouterr()
        return [*printed.out.splitlines(), *printed.err.splitlines()]

    return call


def table(lines: list[str]) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO("\n".join(lines))))


def ids(lines: list[str]) -> list[str]:
    return [row["folder"].rpartition("/")[2] for row in table(lines)]


def test_list_has_one_line_per_run_with_its_headline(tmp_path: Path, run: Lines) -> None:
    folder = make_run(tmp_path, mean=0.5, ci95=0.0625)
    later = make_run(tmp_path, seed=1, done=500, evaluated=False, status="interrupted")
    lines = run("list")
    headline = "mse 0.5 ± 0.062 (K=5, step 10, n=600)"
    assert [re.split("  +", line) for line in lines[1:]] == [
        [
            folder.name,
            "sinusoid_10shot",
            "0",
            "70,000 of 70,000",
            "finished",
            headline,
            "50",
            "0123456+",
            "CPU, Abacus",
        ],
        [later.name, "sinusoid_10shot", "1", "500 of 70,000", "interrupted", "50", "0123456+", "CPU, Abacus"],
    ]
    assert all(line == line.rstrip() for line in lines)


def test_reader_that_has_enough_is_no_error(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, str(ROOT / "scripts" / "runs.py"), "list", "--runs-dir", str(tmp_path)]
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (1, "")  # as after each script that ends with `exit_with`


def test_list_says_at_which_iteration_a_run_was_evaluated_that_has_gone_on(tmp_path: Path, run: Lines) -> None:
    folder = make_run(tmp_path, done=500, status="interrupted")
    (segment,) = json.loads((folder / "run.json").read_text())["segments"]
    edit(folder / "run.json", segments=[segment | {"last_iteration": 900}])
    assert "900 of 70,000  interrupted  mse 1 ± 0.1 (K=5, step 10, n=600) at 500" in run("list")[1]


def test_list_filters_by_everything_it_offers(tmp_path: Path, run: Lines) -> None:
    make_run(tmp_path, name="a")
    make_run(tmp_path, name="b", seed=1, **OTHER)
    make_run(tmp_path, name="c", seed=2, done=500, status="interrupted", evaluated=False)
    for arguments, expected in [
        ([], "abc"),
        (["sinusoid_*"], "abc"),
        (["omniglot_*"], ""),
        (["--seed", "1"], "b"),
        (["--status", "interrupted"], "c"),
        (["--finished"], "ab"),
        (["--unfinished"], "c"),
        (["--set", "inner.step_size=1e-2"], "b"),
        (["--set", "inner.step_size=0.001"], "ac"),
        (["--set", "inner.step_size=0.001", "--finished"], "a"),
        (["--set", "inner.num_steps=1", "--set", "seed=0"], "a"),
        (["--set", "seed=0"], "a"),  # a default, which runs do not record
        (["--set", "model.activation=relu"], "abc"),
        (["--set", "num_iterations=70_000"], "abc"),
    ]:
        assert ids(run("list", "--csv", *arguments)) == list(expected), arguments


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("inner.step_sise=0.01", "no run was trained with inner.step_sise: did you mean inner.step_size?"),
        ("sead=1", "no run was trained with sead: did you mean seed?"),
        ("inner.step_size", "is not a setting; give KEY=VALUE"),
        ("seed=0,1", "is not a setting; give KEY=VALUE"),
        ("~seed", "is not a setting; give KEY=VALUE"),
    ],
)
def test_a_setting_that_there_is_not_is_named(tmp_path: Path, run: Lines, text: str, named: str) -> None:
    make_run(tmp_path, seed=1)
    (line,) = run("list", "--set", text, status=1)
    assert line.startswith(f"ERROR, --set {text}")
    assert named in line


def test_list_names_what_is_damaged_in_conflict_and_superseded(tmp_path: Path, run: Lines) -> None:
    first, other = (make_run(tmp_path, mean=mean, name=name) for mean, name in ((0.5, "a"), (0.9, "b")))
    damaged = make_run(tmp_path, seed=1) / "report.json"
    damaged.write_text("{")
    lines = run("list", status=1)
    assert ["conflict" in lines[1], "conflict" in lines[2]] == [True, True]
    assert lines[3].startswith(
        f"conflict: {other} has the settings, the seed, the hardware and the versions of {first}"
    )
    assert lines[4].startswith(f"ERROR, left out: {damaged} is damaged")
    damaged.parent.rename(tmp_path / "away")
    run("supersede", str(other), "--by", str(first), "--reason", "trained on half the data")
    lines = run("list")
    assert "superseded" in lines[2]
    assert lines[3:] == [f"left out, superseded by {first}: trained on half the data: {other}"]


def test_by_seed_shows_the_mean_over_runs_with_both_intervals(tmp_path: Path, run: Lines) -> None:
    means = [0.7, 0.61, 0.75]
    for seed, mean in enumerate(means):
        make_run(tmp_path, mean=mean, ci95=0.05, seed=seed)
    make_run(tmp_path, mean=0.7, ci95=0.05, name="the same again")
    make_run(tmp_path, mean=9.0, seed=3, done=69_999, status="interrupted")
    make_run(tmp_path, mean=9.0, seed=4, name="wrong")
    run("supersede", str(tmp_path / SINUSOID.experiment / "wrong"), "--reason", "wrong")
    make_run(tmp_path, mean=0.3, seed=5, **OTHER)
    three, alone = sorted(run("list", "--by-seed")[1:], key=lambda line: "seeds" in line, reverse=True)
    assert re.split("  +", three)[2:] == [
        "mse (K=5, step 10, n=600)", "0.6867 ± 0.18", "± 0.046", "3: seeds 0 1 2", "0.61 to 0.75",
    ]  # fmt: skip
    assert re.split("  +", alone)[-4:] == ["0.3 ± 0.1", "± 0.1", "1: seed 5", "inner.step_size=0.01"]
    rows = {row["seeds"]: row for row in table(run("list", "--by-seed", "--csv"))}
    assert float(rows["0 1 2"]["mean"]) == pytest.approx(np.mean(means))
    assert float(rows["0 1 2"]["sd"]) == pytest.approx(np.std(means, ddof=1))
    assert rows["5"]["sd"] == ""


def test_by_seed_of_a_seed_that_diverged_has_no_mean_over_runs(tmp_path: Path, run: Lines) -> None:
    make_run(tmp_path, mean=0.5)
    make_run(tmp_path, mean=None, seed=1)
    assert re.split("  +", run("list", "--by-seed")[1])[-2:] == ["diverged", "2: seeds 0 1"]


def test_list_shows_in_what_a_run_differs_from_its_experiment(tmp_path: Path, run: Lines) -> None:
    make_run(tmp_path, name="a", seed=1)
    make_run(tmp_path, name="b", **OTHER | {"outer.clip": 10.0, "domain.oracle": False, "model.widths": [8, 8]})
    make_run(tmp_path, name="c", evaluated=False)
    tested = make_run(tmp_path, name="d", **OTHER) / "report.json"
    edit(tested, evaluation=json.loads(tested.read_text())["evaluation"] | {"evaluation.num_tasks": 60})
    custom = make_run(tmp_path / "elsewhere", **OTHER)
    (tmp_path / "custom").mkdir()
    custom.rename(tmp_path / "custom" / "e")
    other = "inner.step_size=0.01 model.widths=[8,8] outer.clip=10.0"
    found = {Path(row["folder"]).name: row["settings"] for row in table(run("list", "--csv"))}
    assert found == {"a": "", "b": other, "c": "", "d": "evaluation.num_tasks=60 inner.step_size=0.01", "e": "?"}
    lines = run("list")
    assert [line.endswith(f"CPU, Abacus  {other}") for line in lines].count(True) == 1
    assert lines[1].endswith("CPU, Abacus  ?")
    assert sorted(row["settings"] for row in table(run("list", "--by-seed", "--csv"))) == sorted(
        ["", other, found["d"], "?"]
    )
    assert any(line.endswith(other) for line in run("list", "--by-seed"))


def test_settings_of_an_experiment_that_is_no_longer_valid_are_unknown(
    tmp_path: Path, run: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path)
    conf = tmp_path / "conf"
    (conf / "experiment").mkdir(parents=True)
    (conf / "experiment" / "sinusoid_10shot.yaml").touch()
    monkeypatch.setattr("maml.record.settings.CONF", conf)

    def refuse(experiment: str) -> None:
        raise MamlError(f"{experiment} has a key that does not exist")

    monkeypatch.setattr("maml.record.settings.compose_experiment", refuse)
    assert [row["settings"] for row in table(run("list", "--csv"))] == ["?"]


def test_list_composes_an_experiment_once(tmp_path: Path, run: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(20):
        make_run(tmp_path, seed=seed, evaluated=False)
    asked = []

    def settings_of(experiment: str) -> Any:
        asked.append(experiment)
        return experiment_settings(experiment)

    monkeypatch.setitem(main.__globals__, "experiment_settings", settings_of)
    assert len(run("list")) == 21
    assert asked == ["sinusoid_10shot"]


def test_list_sorts_by_the_headline_in_the_direction_of_the_report(tmp_path: Path, run: Lines) -> None:
    def changed(seed: int) -> dict[str, Any]:
        return {"seed": seed, "inner.step_size": 0.01 * seed}

    make_run(tmp_path, name="unevaluated", evaluated=False)
    for name, mean, seed in (("good", 0.5, 1), ("diverged", None, 2), ("bad", 0.75, 3)):
        make_run(tmp_path, name=name, mean=mean, **changed(seed))
    for name, mean, seed in (("low", -9.0, 0), ("high", -3.0, 1)):
        make_run(tmp_path, name=name, mean=mean, source=POINT, **changed(seed))
    best_first = ["good", "bad", "diverged", "high", "low", "unevaluated"]
    assert ids(run("list", "--csv", "--sort", "headline")) == best_first
    experiments = [line.split()[1] for line in run("list", "--sort", "headline")[1:]]
    assert experiments == 3 * ["sinusoid_10shot"] + 2 * ["point_navigation_maml"] + ["sinusoid_10shot"]
    means = [row["mean"] for row in table(run("list", "--by-seed", "--csv", "--sort", "headline"))]
    assert means == ["0.5", "0.75", "", "-3.0", "-9.0"]


def test_list_draws_lines_on_a_terminal(
    tmp_path: Path, run: Lines, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run(tmp_path)
    wide = lambda: Console(force_terminal=True, width=200)  # noqa: E731
    monkeypatch.setitem(main.__globals__, "Console", wide)
    lines = run("list")
    assert len(lines) > 4
    assert any("┃" in line for line in lines)
    assert any(folder.name in line and "│" in line for line in lines)


def test_without_runs_every_list_is_empty(tmp_path: Path, run: Lines) -> None:
    none = [f"none: there is no run in {tmp_path}"]
    assert run("list") == run("list", "--by-seed") == run("list", "--set", "inner.step_size=1") == none
    assert run("list", "sinusoid") == [f"none: there is no run of 'sinusoid' in {tmp_path}"]
    (line,) = run("sweep")
    assert line.startswith(f"none: there is no sweep in {tmp_path}; --runs-dir names another folder")
    assert run("prune") == ["nothing to delete"]


def test_list_without_a_match_says_why(tmp_path: Path, run: Lines) -> None:
    make_run(tmp_path, done=500, status="interrupted")
    make_run(tmp_path, evaluated=False, seed=1)
    for arguments, why in [
        (["sinusoid"], f"there is no run of 'sinusoid' in {tmp_path}; experiments begin with it: 'sinusoid*'"),
        (["omniglot*"], f"there is no run of 'omniglot*' in {tmp_path}"),
        (["sinusoid*", "--seed", "7"], f"of 2 runs of 'sinusoid*' in {tmp_path}, none fits the other options"),
        (["--by-seed"], f"of 2 runs in {tmp_path}, none is completely trained, evaluated and not superseded"),
    ]:
        assert run("list", *arguments) == [f"none: {why}"], arguments


def test_show_has_settings_segments_evaluations_and_cells(tmp_path: Path, run: Lines) -> None:
    folder = make_run(tmp_path, mean=0.5)
    text = "\n".join(run("show", folder.name[:5]))
    for part in (
        f"in {folder}",
        "Training settings that differ from the experiment's:\nnone",
        "2026-01-01T00:00:00+00:00  0 to 70,000  50       1.4e+03       0123456+  CPU, Abacus",
        ".       70,000     mse, K=20  600  0.5 ± 0.1  10: 0.5 ± 0.1",
        "table2_multitask/MAML/K5_gradsteps_1",
        "figure3: MAML, K=10",
    ):
        assert part in text
    other = make_run(tmp_path, seed=1, **OTHER | {"outer.clip": 10.0})
    lines = run("show", str(other))
    start = lines.index("Training settings that differ from the experiment's:")
    assert [line.split() for line in lines[start + 1 : start + 5]] == [
        ["setting", "run", "experiment"], ["inner.step_size", "0.01", "0.001"], ["outer.clip", "10.0", "None"],
        ["seed", "1", "0"],
    ]  # fmt: skip
    assert lines[-1] == "none"


def test_show_of_a_superseded_run_says_so_and_that_it_serves_nothing(tmp_path: Path, run: Lines) -> None:
    folder = make_run(tmp_path)
    run("supersede", str(folder), "--reason", "a wrong bank")
    lines = run("show", str(folder))
    assert "left out of tables and figures: superseded: a wrong bank" in lines
    assert lines[-2:] == ["Used by:", "none"]


def test_a_run_is_found_by_folder_or_by_the_beginning_of_its_id(tmp_path: Path, run: Lines) -> None:
    folders = [make_run(tmp_path, seed=seed) for seed in range(20)]
    twins = [folder for folder in folders if sum(other.name[0] == folder.name[0] for other in folders) > 1]
    (line, *others) = run("show", twins[0].name[0], status=1)
    assert "give more of the id, or a folder:" in line
    assert f"  {twins[0]}" in others
    assert run("show", "no such", status=1)[0].startswith("ERROR, there is no run no such;")
    assert "is no run folder" in run("show", str(tmp_path), status=1)[0]
    (folders[0] / "run.json").write_text("")
    assert "run.json is damaged" in run("show", str(folders[0]), status=1)[0]


def test_name_that_the_system_refuses_is_an_error_without_traceback(run: Lines) -> None:
    name = "x" * 300
    assert run("show", name, status=1) == [f"ERROR, {name}: File name too long"]
    assert main(["list", "--runs-dir", name]) == 1


def compared(lines: list[str]) -> list[list[str]]:
    start = next(number for number, line in enumerate(lines) if line.startswith("B - A"))
    return [line.split("  ") for line in lines[start + 2 :]]


def test_showing_that_no_task_has_did_not_diverge() -> None:
    assert [SCRIPT["_mean_text"](None, None, count) for count in (0, 5, None)] == ["in no task", *2 * ["diverged"]]
    assert SCRIPT["_mean_text"](0.5, 0.25, 2) == "0.5 ± 0.25"


def test_compare_pairs_runs_task_by_task(tmp_path: Path, run: Lines) -> None:
    a, b = make_run(tmp_path, mean=0.5), make_run(tmp_path, mean=0.25, seed=1, **OTHER)
    lines = run("compare", a.name, str(b))
    text = "\n".join(lines)
    assert "inner.step_size  0.001  0.01" in text
    assert "B - A (smaller is better)" in text
    rows = [[part.strip() for part in row if part.strip()] for row in compared(lines)]
    assert len(rows) == 3 * 11
    # The value of every task is 0.25 lower in one run than in the other.
    assert rows[0] == ["mse, K=5", "0", "0.5 ± 0.1", "0.25 ± 0.1", "-0.25", "-0.25 to -0.25", "600"]


def test_setting_that_one_run_records_and_the_other_has_by_default_does_not_differ(tmp_path: Path, run: Lines) -> None:
    a, b = make_run(tmp_path), make_run(tmp_path, seed=1, **OTHER)
    recorded = json.loads((b / "run.json").read_text())["training"]
    assert "domain.oracle" not in recorded
    edit(b / "run.json", training=recorded | {"domain.oracle": False})
    assert "domain.oracle" not in "\n".join(run("compare", str(a), str(b)))
    edit(b / "run.json", training=recorded | {"domain.oracle": True})
    assert "domain.oracle    False  True" in "\n".join(run("compare", str(a), str(b)))


def test_arguments_of_own_classes_at_their_default_are_found_and_shown(tmp_path: Path, run: Lines) -> None:
    other: dict[str, Any] = {"algorithm.strength": 0.5}
    a, b = make_run_with_own_classes(tmp_path), make_run_with_own_classes(tmp_path, **other)
    assert ids(run("list", "--csv", "--set", "algorithm.strength=0.01")) == [a.name]
    assert sorted(ids(run("list", "--csv", "--set", "model.module.width=8"))) == sorted([a.name, b.name])
    settings = {Path(row["folder"]).name: row["settings"] for row in table(run("list", "--csv"))}
    assert "algorithm.strength=0.01" in settings[a.name].split()
    differing = [line.split() for line in run("compare", str(a), str(b))]
    assert ["algorithm.strength", "0.01", "0.5"] in differing
    assert "model.module.width" not in [line[0] for line in differing if line]
    assert ["algorithm.strength", "0.01"] in [line.split() for line in run("show", str(a))]


def test_compare_says_why_it_cannot_pair(tmp_path: Path, run: Lines) -> None:
    a, b = make_run(tmp_path, mean=0.5), make_run(tmp_path, mean=0.25, seed=1)
    report = json.loads((b / "report.json").read_text())
    edit(b / "report.json", banks=report["banks"] | {"5": "another"}, curves=report["curves"][:2])
    text = "\n".join(run("compare", str(a), str(b)))
    assert text.count("not paired: their task banks are different") == 11
    assert text.count("-0.25 to -0.25") == 11
    assert text.count("only A has this curve") == 1
    (b / "tasks.csv").unlink()
    assert f"not paired: {b / 'tasks.csv'} is missing" in "\n".join(run("compare", str(a), str(b)))
    horizon: dict[str, Any] = {"domain.horizon": 20}
    other = make_run(tmp_path, mean=0.25, seed=2, **horizon)
    text = "\n".join(run("compare", str(a), str(other)))
    assert "not paired: the data or environments of their tasks are different" in text
    diverged = make_run(tmp_path, mean=None, seed=2)
    assert "\n".join(run("compare", str(diverged), str(a))).count("  diverged  ") == 2 * 33
    unevaluated = make_run(tmp_path, seed=3, evaluated=False)
    assert f"{unevaluated} has no evaluation" in run("compare", str(a), str(unevaluated), status=1)[-1]


def test_methods_shows_those_on_the_same_tasks(tmp_path: Path, run: Lines) -> None:
    make_run(tmp_path, mean=0.5)
    assert "no two methods of 'sinusoid_*' were tested on the same tasks" in run("methods", "sinusoid_*", status=1)[-1]
    make_run(tmp_path, mean=0.75, **OTHER)
    lines = run("methods")
    assert lines[0].startswith("all intervals are over test tasks alone, without the luck of training")
    assert [line for line in lines if line.startswith("K=")] == [
        f"K={k}, 600 tasks; minus best: paired over tasks, 95 % bootstrap" for k in (5, 10, 20)
    ]
    assert sum("+0.25" in line for line in lines) == 3


def test_sweep_shows_each_job_and_without_an_id_all_sweeps(tmp_path: Path, run: Lines) -> None:
    sweep = tmp_path / "sweeps" / "0123456789ab"
    write_report(tmp_path, "done", [1.0, 3.0])
    write_job(sweep, "a=1", run_id="done")
    write_beat(write_job(sweep, "a=2", run_id="runs"), iteration=3, speed=2.0)
    write_job(sweep, "a=3", error="why")
    (sweep / "sweep.json").write_text('{"planned": null, "num_jobs": 4}')
    lines = run("sweep", "0123")
    assert [line.split()[:2] for line in lines[:4]] == [
        ["a", "state"],
        ["1", "finished"],
        ["2", "running"],
        ["3", "failed"],
    ]
    assert "1 of at most 4 finished, 1 running, 1 failed, ETA 0:00:08" in lines
    assert run("sweep")[1].startswith("0123456789ab")
    assert "there is no sweep 7" in run("sweep", "7", status=1)[-1]


def test_supersede_writes_one_file_and_undo_removes_it(tmp_path: Path, run: Lines) -> None:
    folder, other = make_run(tmp_path), make_run(tmp_path, seed=1)
    before = file_contents(tmp_path)
    run("supersede", str(folder), "--by", other.name[:6])
    assert set(file_contents(tmp_path)) - set(before) == {str((folder / SUPERSEDED).relative_to(tmp_path))}
    assert json.loads((folder / SUPERSEDED).read_text()) == {"by": str(other), "reason": ""}
    run("supersede", str(folder), "--undo")
    assert file_contents(tmp_path) == before


def test_supersede_refuses_what_makes_no_sense(tmp_path: Path, run: Lines) -> None:
    folder, other = make_run(tmp_path), make_run(tmp_path, seed=1)
    before = file_contents(tmp_path)
    assert "name the run that replaces it" in run("supersede", str(folder), status=1)[0]
    assert "name the run that replaces it" in run("supersede", str(folder), "--reason", " ", status=1)[0]
    assert "it has no mark to remove" in run("supersede", str(folder), "--undo", status=1)[0]
    assert "cannot replace itself" in run("supersede", str(folder), "--by", str(folder), status=1)[0]
    assert file_contents(tmp_path) == before
    run("supersede", str(folder), "--by", str(other))
    assert "is no longer evidence itself" in run("supersede", str(other), "--by", str(folder), status=1)[0]
    assert "leave them out" in run("supersede", str(folder), "--undo", "--reason", "x", status=1)[0]


def age(folder: Path, days: float) -> None:
    then = time.time() - days * 86_400
    os.utime(folder / "run.json", (then, then))


def test_prune_deletes_superseded_runs_and_old_failed_ones_with_nothing_saved(
    tmp_path: Path, run: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failed(name: str, seed: int, days: float = 8, **settings: Any) -> Path:
        settings.setdefault("status", "failed")
        settings.setdefault("evaluated", False)
        folder = make_run(tmp_path, done=0, name=name, seed=seed, **settings)
        age(folder, days)
        return folder

    superseded, serving = make_run(tmp_path, mean=0.9, name="superseded"), make_run(tmp_path, name="serving")
    run("supersede", str(superseded), "--by", str(serving))
    age(serving, 1000)
    gone = [superseded, failed("old", 1), failed("killed", 2, status="running")]
    kept = [serving, failed("recent", 3, days=6), failed("interrupted", 4, status="interrupted")]
    kept += [failed("evaluated", 5, evaluated=True), failed("saved", 6), failed("damaged", 7)]
    (kept[-2] / "checkpoint.previous.pt").touch()
    (kept[-1] / "report.json").write_text("{")
    committed = make_run(tmp_path, seed=8, name="committed")
    run("supersede", str(committed), "--reason", "old")
    monkeypatch.setitem(main.__globals__, "RESULTS", committed)

    before = file_contents(tmp_path)
    lines = run("prune")
    assert [line.split()[2] for line in lines[:-1]] == sorted(map(str, gone))
    assert lines[-1] == "nothing is deleted without --yes"
    assert file_contents(tmp_path) == before
    assert len(run("prune", "--days", "9")) == 2

    run("prune", "--yes")
    left = {path.parent for path in tmp_path.rglob("run.json")}
    assert left == {*kept, committed}
    assert not list(tmp_path.glob(".deleted*"))
    assert run("prune", "--yes") == ["nothing to delete; 1 failed run is younger than 7 days (--days 0)"]
    failed("yesterday", 9, days=0.5, status="running")
    assert run("prune", "--days", "6.5") == ["nothing to delete; 2 failed runs are younger than 6.5 days (--days 0)"]
    assert len(run("prune", "--days", "0")) == 3
    run("prune", "--days", "0", "--yes")
    assert run("prune") == ["nothing to delete"]


@pytest.mark.parametrize("days", ["nan", "-1", "week"])
def test_prune_refuses_an_age_that_is_none(days: str, run: Lines, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("prune", f"--days={days}")
    assert "is no age in days; give 0 or more" in capsys.readouterr().err


def test_prune_leaves_a_run_that_a_process_is_in(tmp_path: Path, run: Lines) -> None:
    alive = make_run(tmp_path, done=500, status="running")
    evaluating = make_run(tmp_path, seed=1)
    for folder in (alive, evaluating):
        run("supersede", str(folder), "--reason", "wrong")
    with open(alive / "lock", "w") as one, open(evaluating / "lock", "w") as other:
        fcntl.flock(one, fcntl.LOCK_EX)
        fcntl.flock(other, fcntl.LOCK_EX)
        assert run("prune", "--yes") == [f"kept, a process is using it: {evaluating} (superseded: wrong)"]
    assert alive.is_dir()
    assert evaluating.is_dir()
    run("prune", "--yes")
    assert not list(tmp_path.rglob("run.json"))


def test_a_deletion_cut_short_leaves_no_run(tmp_path: Path, run: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tmp_path)
    run("supersede", str(folder), "--reason", "wrong")

    def killed(path: Path) -> None:
        (path / SUPERSEDED).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(main.__globals__["shutil"], "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        run("prune", "--yes")
    assert run("list") == [f"none: there is no run in {tmp_path}"]


def test_committed_runs_are_all_listed_and_none_is_damaged(capsys: pytest.CaptureFixture[str]) -> None:
    committed = ROOT / "results" / "runs"
    assert main(["list", "--csv", "--runs-dir", str(committed)]) == 0
    assert len(table(capsys.readouterr().out.splitlines())) == len(list(committed.glob("*/*/run.json")))


def test_mirror_sends_a_finished_run_once(tiny: TinyRuns, capsys: pytest.CaptureFixture[str]) -> None:
    wandb = pytest.importorskip("wandb")
    folder = tiny.run("num_iterations=10", "evaluation.num_tasks=3")
    before = file_contents(folder)
    outputs = []
    for _ in range(2):
        assert main(["mirror", str(folder), "--mode", "offline", "--project", "mine"]) == 0
        outputs.append(capsys.readouterr().out.splitlines()[-1])
    wandb.teardown()
    assert outputs == [
        f"mirrored {folder} to W&B; its files are in {folder}",
        f"{folder} was mirrored to W&B before",
    ]
    (sent,) = folder.glob("wandb/offline-run-*")
    assert sent.name.endswith(f"custom-{folder.name}")
    after = file_contents(folder)
    assert {path: after[path] for path in before} == before
    assert all(path.startswith("wandb/") for path in after.keys() - before.keys())


def test_mirror_to_tensorboard_and_of_a_committed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    folder = next((ROOT / "results" / "runs" / "point_navigation_pretrain").iterdir())
    before = file_contents(folder)
    assert main(["mirror", str(folder), "--logger", "tensorboard"]) == 0
    assert list(tmp_path.glob("runs/mirrored/point_navigation_pretrain/*/tensorboard/events*"))
    assert file_contents(folder) == before
    assert main(["mirror", str(folder), "--logger", "tensorboard", "--project", "mine"]) == 1
    assert "--project is no option of tensorboard" in capsys.readouterr().err
