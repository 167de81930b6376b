"""Runs that are killed, stopped, run out of disk or diverge: which files remain, and how the same command resumes."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen

import pytest
import torch

from maml.algorithm.maml import MAML
from maml.errors import Interrupted, MamlError
from maml.outer.base import Objective
from maml.record import checkpoint
from maml.record.run_files import read_json
from maml.record.run_folder import RunFolder
from maml.training.meta_gradient import MetaGradient
from maml.types import Tasks
from tests.runs import TinyRuns, assert_same_run, before_iteration, file_contents, run_in_child

Reference = Callable[[TinyRuns], Path]


def count_lines(folder: Path) -> int:
    """Returns the number of lines that a run has logged so far."""
    metrics = folder / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def wait_for_metrics(folder: Path, lines: int, process: Popen[str]) -> None:
    """Waits until a run has logged this many lines."""
    deadline = time.monotonic() + 120
    while count_lines(folder) < lines:
        assert process.poll() is None, f"ended too early: {process.communicate()[1]}"
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_killed_run_resumes_bit_exactly(each_domain: TinyRuns, uninterrupted: Reference) -> None:
    folder = each_domain.folder()
    process = each_domain.start()
    wait_for_metrics(folder, random.randint(3, 8), process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "report.json").exists()
    killed_at = checkpoint.load(folder / "checkpoint.pt")["iteration"]
    assert killed_at < each_domain.config().num_iterations

    each_domain.run()
    assert_same_run(folder, uninterrupted(each_domain))
    record = read_json(folder / "run.json")
    assert record is not None
    assert record["status"] == "finished"
    assert [segment["first_iteration"] for segment in record["segments"]] == [0, killed_at]


def test_run_killed_again_and_again_ends_like_one_never_killed(tiny: TinyRuns, uninterrupted: Reference) -> None:
    """A checkpoint after every iteration, so that most kills hit a file that is being written or renamed."""
    config = tiny.config("checkpoint_every=1", "log_every=3")
    folder = tiny.folder()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["maml.experiment", "maml.domain.sinusoid"])
    reached = []
    for _ in range(5):
        logged = count_lines(folder)
        child = context.Process(target=run_in_child, args=(config,))
        child.start()
        while child.is_alive() and count_lines(folder) <= logged:
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.05))
        child.kill()
        child.join()
        newest = checkpoint.newest(folder / "checkpoint.pt")
        assert newest is not None
        reached.append(checkpoint.load(newest)["iteration"])
    assert reached == sorted(reached)
    tiny.run()
    assert_same_run(folder, uninterrupted(tiny))


@contextmanager
def training_forbidden(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(MAML, "meta_update", lambda *_: pytest.fail("trained again"))
        yield


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_run_says_so_and_resumes_bit_exactly(
    number: signal.Signals, exit_code: int, tiny: TinyRuns, uninterrupted: Reference
) -> None:
    process = tiny.start()
    wait_for_metrics(tiny.folder(), 3, process)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == exit_code
    *progress, last = stderr.splitlines()
    assert last.startswith(f"stopped by {number.name} after iteration ")
    assert last.endswith(f"saved in {tiny.folder()}: the same command resumes")
    if number == signal.SIGINT:
        progress.remove("stopping after this iteration; press Ctrl-C again to drop it")
    assert all(line.startswith("custom ") for line in progress), "nothing but the progress before it"
    record = read_json(tiny.folder() / "run.json")
    assert record is not None and record["status"] == "interrupted"
    tiny.run()
    assert_same_run(tiny.folder(), uninterrupted(tiny))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_between_two_checkpoints_saves_the_iteration_at_hand(
    number: signal.Signals, each_domain: TinyRuns, uninterrupted: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch, pytest.raises(Interrupted) as stop:
        before_iteration(patch, 11, lambda _: os.kill(os.getpid(), number))
        each_domain.run()
    assert stop.value.signal_number == number
    assert "after iteration 11 of" in str(stop.value)
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert checkpoint.load(each_domain.folder() / "checkpoint.pt")["iteration"] == 11
    each_domain.run()
    assert_same_run(each_domain.folder(), uninterrupted(each_domain))


@pytest.mark.parametrize("last", [5, 11, 12])
def test_run_whose_order_switches_resumes_bit_exactly(
    last: int, tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = ("num_iterations=20", "inner.second_order_from=12")
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match=f"after iteration {last} of 20"):
        before_iteration(patch, last, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        tiny.run(*own)
    assert_same_run(tiny.run(*own), tiny.in_folder("whole").run(*own))


@pytest.mark.slow  # it compiles three times
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # the compiler would give up at it
def test_compiled_run_resumes_bit_exactly(tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full runs on vectors are compiled, and the checkpoint says so."""
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        before_iteration(patch, 11, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        tiny.run("num_iterations=30", "hardware.compile=true")
    tiny.run("num_iterations=30")
    assert checkpoint.load(tiny.folder("num_iterations=30") / "checkpoint.pt")["execution"]["compile"] is True
    whole = tiny.in_folder("whole").run("num_iterations=30", "hardware.compile=true")
    assert_same_run(tiny.folder("num_iterations=30"), whole)


def test_signal_in_the_last_iteration_leaves_only_the_evaluation(
    tiny: TinyRuns, uninterrupted: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="after iteration 200 of 200"):
        before_iteration(patch, 200, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        tiny.run()
    with training_forbidden(monkeypatch):
        tiny.run()
    assert_same_run(tiny.folder(), uninterrupted(tiny))


def test_interrupt_during_the_evaluation_leaves_only_the_evaluation(
    tiny: TinyRuns, uninterrupted: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("maml.evaluation.Evaluation.__call__", interrupt)
        tiny.run()
    record = read_json(tiny.folder() / "run.json")
    assert record is not None and record["status"] == "interrupted"
    with training_forbidden(monkeypatch):
        tiny.run()
    assert_same_run(tiny.folder(), uninterrupted(tiny))


@pytest.fixture
def stopped(tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that was stopped after iteration 20; its last regular checkpoint is of iteration 14."""
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        before_iteration(patch, 20, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        tiny.run()
    return tiny.folder()


@pytest.mark.parametrize("is_first", [False, True])
def test_kill_between_the_two_renames_of_a_checkpoint_resumes(
    is_first: bool, stopped: Path, tiny: TinyRuns, uninterrupted: Reference
) -> None:
    (stopped / "checkpoint.pt").rename(stopped / "checkpoint.new.pt")
    if is_first:
        (stopped / "checkpoint.previous.pt").unlink()
    tiny.run()
    assert_same_run(stopped, uninterrupted(tiny))
    record = read_json(stopped / "run.json")
    assert record is not None
    assert [segment["first_iteration"] for segment in record["segments"]] == [0, 20]


def test_metrics_cut_off_within_a_line_are_completed(stopped: Path, tiny: TinyRuns, uninterrupted: Reference) -> None:
    metrics = stopped / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes() + b'{"iteration": 21, "loss": 0.1}\n{"iteration": 2')
    tiny.run()
    assert_same_run(stopped, uninterrupted(tiny))


def test_metrics_with_garbage_behind_the_checkpoint_are_completed(
    stopped: Path, tiny: TinyRuns, uninterrupted: Reference
) -> None:
    metrics = stopped / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes() + b"\0\0\xff\xfe\0\n\0")  # a power failure may leave such bytes
    tiny.run()
    assert_same_run(stopped, uninterrupted(tiny))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_damaged_checkpoint_is_refused_and_the_advice_works(
    damage: str, stopped: Path, tiny: TinyRuns, uninterrupted: Reference
) -> None:
    path = stopped / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 4  # inside a tensor
    path.write_bytes(content[: {"truncated": len(content) * 2 // 3, "empty": 0}.get(damage)])
    before = file_contents(stopped)
    with pytest.raises(MamlError) as caught:
        tiny.run()
    assert f"{path} is damaged" in str(caught.value)
    assert f"{stopped / 'checkpoint.previous.pt'}: rename it to checkpoint.pt" in str(caught.value)
    assert file_contents(stopped) == before

    (stopped / "checkpoint.previous.pt").rename(path)
    tiny.run()
    assert_same_run(stopped, uninterrupted(tiny))


def test_file_that_is_no_checkpoint_is_refused(stopped: Path, tiny: TinyRuns) -> None:
    torch.save({"theta": torch.zeros(3)}, stopped / "checkpoint.pt")
    with pytest.raises(MamlError, match=r"checkpoint\.pt is not a checkpoint of this project"):
        tiny.run()


def test_run_dir_of_another_run_is_refused_with_the_difference(stopped: Path, tiny: TinyRuns) -> None:
    before = file_contents(stopped)
    with pytest.raises(MamlError) as caught:
        tiny.run(f"run_dir={stopped}", "seed=3", "inner.step_size=0.5")
    assert "belongs to another run" in str(caught.value)
    assert "inner.step_size: 0.5 here, 0.01 there" in str(caught.value)
    assert "seed: 3 here, its default there" in str(caught.value)
    assert "outer" not in str(caught.value)
    assert file_contents(stopped) == before
    for path in stopped.glob("checkpoint*"):
        path.unlink()
    with pytest.raises(MamlError, match="seed: 3 here"):  # from run.json, because there is no checkpoint yet
        tiny.run(f"run_dir={stopped}", "seed=3")


def test_run_dir_by_hand_is_where_the_run_is(tiny: TinyRuns, tmp_path: Path, uninterrupted: Reference) -> None:
    mine = tmp_path / "by hand"
    for _ in range(2):
        tiny.run(f"run_dir={mine}")
    assert_same_run(mine, uninterrupted(tiny))
    assert not tiny.runs_dir.exists()


def test_checkpoint_of_another_run_is_refused_with_the_difference(stopped: Path, tiny: TinyRuns) -> None:
    with pytest.raises(MamlError, match=r"belongs to another run[^$]*outer.step_size: 0.5 here, its default there"):
        tiny.run("mode=eval", f"checkpoint={stopped / 'checkpoint.pt'}", "outer.step_size=0.5")
    assert not tiny.folder("outer.step_size=0.5").exists()


def test_checkpoint_for_training_is_refused(stopped: Path, tiny: TinyRuns) -> None:
    with pytest.raises(MamlError, match="checkpoint= is for mode=eval"):
        tiny.run(f"checkpoint={stopped / 'checkpoint.pt'}")


@contextmanager
def disk_full_behind(size: int) -> Iterator[None]:
    """Limits the size of this process's files to a number of bytes, so that a real write fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_room_for_a_checkpoint_leaves_the_one_before(
    tiny: TinyRuns, uninterrupted: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.folder()
    limit = disk_full_behind(8000)  # less than a checkpoint, more than any other file at this time
    with monkeypatch.context() as patch:
        before_iteration(patch, 16, lambda _: limit.__enter__())
        try:
            with pytest.raises(MamlError) as caught:
                tiny.run()
        finally:
            limit.__exit__(None, None, None)
    assert "checkpoint" in str(caught.value)
    assert "could not be written (File too large)" in str(caught.value)
    assert "Choose another folder, then run the same command again" in str(caught.value)
    record = read_json(folder / "run.json")
    assert record is not None and record["status"] == "failed"
    assert checkpoint.load(folder / "checkpoint.pt")["iteration"] == 14
    assert not list(folder.glob(".*")), "half-written files take the room that is missing"
    tiny.run()
    assert_same_run(folder, uninterrupted(tiny))


def test_no_room_for_metrics_leaves_the_last_checkpoint(
    tiny: TinyRuns, uninterrupted: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = tiny.folder() / "metrics.jsonl"
    kept = metrics.with_name("kept")

    def fill(meta_gradient: MetaGradient) -> None:
        metrics.rename(kept)
        metrics.symlink_to("/dev/full")

    def reopen(self: RunFolder, iteration: int, values: dict[str, float]) -> None:
        if iteration == 18 and self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        log(self, iteration, values)

    log = RunFolder.log
    with monkeypatch.context() as patch, pytest.raises(MamlError) as caught:
        before_iteration(patch, 17, fill)
        patch.setattr(RunFolder, "log", reopen)
        tiny.run()
    assert "metrics.jsonl could not be written (No space left on device)" in str(caught.value)
    assert "last checkpoint is intact" in str(caught.value)
    record = read_json(tiny.folder() / "run.json")
    assert record is not None and record["status"] == "failed"
    kept.replace(metrics)
    tiny.run()
    assert_same_run(tiny.folder(), uninterrupted(tiny))


@pytest.mark.parametrize("name", ["report.json", "tasks.csv"])
def test_no_room_for_the_report_costs_only_the_evaluation(
    name: str, tiny: TinyRuns, uninterrupted: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(meta_gradient: MetaGradient) -> None:
        (tiny.folder() / f".{name}.{os.getpid()}").symlink_to("/dev/full")

    with monkeypatch.context() as patch, pytest.raises(MamlError) as caught:
        before_iteration(patch, 200, fill)
        tiny.run()
    assert f"{name} could not be written (No space left on device)" in str(caught.value)
    assert not (tiny.folder() / name).exists()
    with training_forbidden(monkeypatch):
        tiny.run()
    assert_same_run(tiny.folder(), uninterrupted(tiny))


def test_runs_dir_that_is_no_folder_is_named(tiny: TinyRuns, tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    with pytest.raises(MamlError, match=r"the run folder .* cannot be created \(Not a directory\); change runs_dir"):
        tiny.run()


def test_diverged_run_names_the_iteration_and_saves_nothing_of_it(
    tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(meta_gradient: MetaGradient) -> None:
        meta_gradient.algorithm.theta["linear1.weight"].fill_(torch.inf)

    with monkeypatch.context() as patch, pytest.raises(MamlError) as caught:
        before_iteration(patch, 18, diverge)
        tiny.run()
    assert "loss=nan at iteration 18: training has diverged" in str(caught.value)
    assert "Lower inner.step_size or outer.step_size" in str(caught.value)
    saved = checkpoint.load(tiny.folder() / "checkpoint.pt")
    assert saved["iteration"] == 14
    assert all(value.isfinite().all() for group in saved["state"].values() for value in group.values())
    record = read_json(tiny.folder() / "run.json")
    assert record is not None and record["status"] == "failed"
    assert "NaN" not in (tiny.folder() / "metrics.jsonl").read_text()


@pytest.mark.parametrize("where", ["theta", "mean", "square"])
def test_state_that_diverges_under_a_finite_loss_is_not_saved(
    where: str, tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss belongs to the parameters before the update, so it stays finite one iteration longer than they do."""
    meta_update, count = MAML.meta_update, 0

    def overflowing(self: MAML, objective: Objective, tasks: Tasks) -> dict[str, torch.Tensor]:
        nonlocal count
        count += 1
        metrics = meta_update(self, objective, tasks)
        if count == 14:  # a checkpoint is due
            state = self.theta["linear2.bias"] if where == "theta" else self.outer_state[where]
            state[-1] = torch.inf
        return metrics

    monkeypatch.setattr(MAML, "meta_update", overflowing)
    with pytest.raises(MamlError, match="at iteration 14: training has diverged"):
        tiny.run()
    assert checkpoint.load(tiny.folder() / "checkpoint.pt")["iteration"] == 7


def test_diverging_step_size_is_reported_as_such(tiny: TinyRuns) -> None:
    with pytest.raises(MamlError, match=r"at iteration \d+: training has diverged"):
        tiny.run("inner.step_size=1e6", "inner.num_steps=5")


def test_second_process_on_a_run_is_refused(tiny: TinyRuns, uninterrupted: Reference) -> None:
    process = tiny.start()
    wait_for_metrics(tiny.folder(), 1, process)
    process.send_signal(signal.SIGSTOP)  # so that it stays alive
    try:
        with pytest.raises(MamlError, match=r"process \d+ on .* is training in .*; wait for it, or stop it"):
            tiny.run()
    finally:
        process.send_signal(signal.SIGCONT)
    assert process.wait(timeout=120) == 0, process.communicate()[1]
    process.communicate()
    assert_same_run(tiny.folder(), uninterrupted(tiny))


def test_evaluation_of_an_unfinished_run_is_marked_and_stands_apart(
    stopped: Path, tiny: TinyRuns, uninterrupted: Reference, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.run("mode=eval")
    assert "(reduced budget: 20 of 200 iterations)" in capsys.readouterr().out
    (early,) = (stopped / "evaluations").iterdir()
    report = read_json(early / "report.json")
    assert report is not None
    assert (report["iteration"], report["num_iterations"]) == (20, 200)
    assert not (stopped / "report.json").exists()
    tiny.run()  # the earlier evaluation does not count as the run's own
    assert_same_run(stopped, uninterrupted(tiny))
