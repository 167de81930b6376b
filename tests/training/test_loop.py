"""The outer loop with an algorithm that only counts: what is drawn, logged and saved, and when."""

from __future__ import annotations

import json
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from maml.config.schema import Settings
from maml.errors import Interrupted, MamlError
from maml.experiment import build_algorithm
from maml.hardware.base import Execution, Hardware
from maml.inner.sgd import SGD
from maml.logger.base import Logger
from maml.record import checkpoint
from maml.record.run_folder import RunFolder
from maml.seeding import Stream
from maml.training.iteration import Iteration
from maml.training.learner import Learner
from maml.training.loop import _largest_entries, train
from maml.types import Params
from tests.runs import TinyRuns, checkpoint_tensors

STREAM = Stream(5)
RL = (
    "evaluation.step_size=0.1",
    "domain.horizon=8",
    "domain.num_shots=3",
    "evaluation.num_shots=[2]",
    "model.hidden_sizes=[8]",
)


class Counting:
    """Sums up the numbers of the iterations; its loss is the iteration's number."""

    def __init__(self) -> None:
        self.name = "Counting"
        facts = {"on_policy": False, "selected_by": None, "data_digest": None}
        self.domain = SimpleNamespace(**facts, rollout_metrics=lambda tasks: ({}, {}))
        self.stream, self.buffers, self.best = Stream(0), dict[str, Tensor](), dict[str, Tensor]()
        self.inner = SGD(step_size=0.1, num_steps=1, order=2, adapt=["*"])
        self.theta = {"sum": torch.zeros(())}
        self.outer_state = {"step": torch.zeros((), dtype=torch.float64)}
        self.drawn: list[tuple[int, int]] = []

    def sample_tasks(self, num_tasks: int, stream: Stream) -> dict[str, Tensor]:
        self.drawn.append((num_tasks, stream.key))
        return {"x": stream.uniform((num_tasks,))}

    def meta_update(self, objective: object, tasks: dict[str, Tensor]) -> dict[str, Tensor]:
        self.theta["sum"] += tasks["x"].sum()
        self.outer_state["step"] += 1
        return {"loss": self.outer_state["step"].float(), "accuracy": torch.tensor(0.5)}

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {"theta": self.theta, "outer": self.outer_state}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        self.theta["sum"].copy_(state["theta"]["sum"])
        self.outer_state["step"].copy_(state["outer"]["step"])


class Recording(Logger):
    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []

    def log(self, metrics: Any, iteration: int) -> None:
        self.lines.append((iteration, dict(metrics)))


class Loop:
    """One run of the loop."""

    def __init__(self, tiny: TinyRuns, num_iterations: int, log_every: int = 3, checkpoint_every: int = 4) -> None:
        algorithm: Any = Counting()
        settings = tiny.config(
            f"num_iterations={num_iterations}",
            "meta_batch_size=6",
            f"log_every={log_every}",
            f"checkpoint_every={checkpoint_every}",
        )
        self.algorithm, self.learner = algorithm, Learner(settings, "custom", algorithm)
        self.run, self.learner.stream = self.learner.folder, STREAM
        self.logger = self.learner.logger = Recording()

    def __call__(self) -> None:
        saved = self.run.open({"cpu": "Abacus"}, "", "Counting")
        if saved:
            self.learner.restore(saved)
        try:
            train([self.learner], Execution(1, None, False))
        finally:
            self.run.close("finished")

    @property
    def lines(self) -> list[dict[str, float]]:
        path = self.run.path / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def saved(self) -> dict[str, Any]:
        return checkpoint.load(self.run.checkpoint_path)


def test_iteration_sees_what_seed_and_number_say(tiny: TinyRuns) -> None:
    loop = Loop(tiny, 5)
    loop()
    expected = [STREAM.child("train").child(iteration).key for iteration in range(1, 6)]
    assert loop.algorithm.drawn == [(6, key) for key in expected]


@pytest.mark.parametrize("num_iterations", [1, 3, 8, 11, 12])
def test_metrics_are_logged_regularly_and_at_the_end(tiny: TinyRuns, num_iterations: int) -> None:
    loop = Loop(tiny, num_iterations)
    loop()
    due = sorted({*range(3, num_iterations + 1, 3), num_iterations})
    assert loop.lines == [{"iteration": iteration, "loss": iteration, "accuracy": 0.5} for iteration in due]
    assert loop.logger.lines == [(iteration, {"loss": iteration, "accuracy": 0.5}) for iteration in due]


@pytest.mark.parametrize("num_iterations", [1, 3, 4, 11, 12])
def test_state_is_saved_regularly_and_at_the_end(
    tiny: TinyRuns, num_iterations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loop(tiny, num_iterations)
    iterations = []
    save = RunFolder.save_checkpoint

    def saving(self: RunFolder, iteration: int, *rest: Any) -> None:
        iterations.append(iteration)
        save(self, iteration, *rest)

    monkeypatch.setattr(RunFolder, "save_checkpoint", saving)
    loop()
    assert iterations == sorted({*range(4, num_iterations + 1, 4), num_iterations})
    assert loop.saved["iteration"] == num_iterations
    assert loop.saved["state"]["outer"]["step"] == num_iterations
    assert loop.saved["execution"] == Execution(1, None, False).as_dict()


def test_no_iterations_keep_theta_as_it_was_drawn_and_keep_theta_as_drawn(tiny: TinyRuns) -> None:
    loop = Loop(tiny, 0)
    loop()
    assert loop.algorithm.drawn == []
    assert loop.lines == []
    assert loop.saved["iteration"] == 0


def test_resumed_loop_goes_on_behind_the_checkpoint(tiny: TinyRuns) -> None:
    whole = Loop(tiny.in_folder("whole"), 11)
    whole()
    first = Loop(tiny, 11)

    def stop(objective: object, tasks: dict[str, Tensor]) -> dict[str, Tensor]:
        if len(first.algorithm.drawn) == 10:
            raise ZeroDivisionError
        return Counting.meta_update(first.algorithm, objective, tasks)

    first.algorithm.meta_update = stop
    with pytest.raises(ZeroDivisionError):
        first()
    second = Loop(tiny, 11)
    second()
    assert second.algorithm.drawn == whole.algorithm.drawn[8:]
    assert second.lines == whole.lines
    assert torch.equal(second.algorithm.theta["sum"], whole.algorithm.theta["sum"])


def iterated(settings: Settings, order: int, numbers: range, state: dict[str, Any] | None = None) -> dict[str, Any]:
    """Makes the iterations with one order of the meta-gradient, from a state on; returns the new state."""
    inner = {key: value for key, value in settings.inner.items() if key != "second_order_from"} | {"order": order}
    algorithm = build_algorithm(replace(settings, inner=inner), Hardware("cpu"))
    if state:
        algorithm.load_state_dict(state)
    iterate = Iteration([algorithm], [Stream(settings.seed)], settings.meta_batch_size, Execution(1, None, False))
    for number in numbers:
        iterate(number)
    return algorithm.state_dict()


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param((), id="sgd"),
        pytest.param(("inner=learned_sgd", "inner.num_steps=2"), id="learned_sgd"),
        pytest.param(("+experiment=point_navigation_maml", "+debug=smoke", *RL), id="trpo"),
        pytest.param(("+experiment=point_navigation_maml", "+debug=smoke", *RL, "outer=adam"), id="policy_gradient"),
    ],
)
def test_meta_gradient_is_of_first_order_up_to_the_switch_and_of_second_from_there(
    parts: tuple[str, ...], tiny: TinyRuns
) -> None:
    own = (*parts, "num_iterations=5", "meta_batch_size=4", "inner.second_order_from=4", "hardware.task_chunk=all")
    found, settings = checkpoint_tensors(tiny.run(*own)), tiny.config(*own)
    before = {group: clone(values) for group, values in iterated(settings, 1, range(1, 4)).items()}
    for order in (1, 2):
        after = iterated(settings, order, range(4, 6), {group: clone(values) for group, values in before.items()})
        expected = {f"{group}.{name}": value for group, values in after.items() for name, value in values.items()}
        equal = {name for name, value in expected.items() if torch.equal(found[name], value)}
        assert (equal == expected.keys()) is (order == 2), order


def clone(values: Params) -> Params:
    return {name: value.clone() for name, value in values.items()}


def test_graph_is_captured_again_where_the_order_changes(tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tiny.config(
        "inner.second_order_from=8", "meta_batch_size=4", "num_iterations=14", "log_every=100", "checkpoint_every=100"
    )
    captured = []

    def train_once(folder: str, cuda_graph: bool) -> Params:
        algorithm = build_algorithm(settings, Hardware("cpu"))
        learner = Learner(tiny.in_folder(folder).config("inner.second_order_from=8"), "custom", algorithm)

        def capture(compute: Any) -> Any:
            order, state = algorithm.inner.present_order, {k: clone(v) for k, v in algorithm.state_dict().items()}
            outputs = compute()
            algorithm.load_state_dict(state)
            captured.append(order)

            def replay() -> None:
                algorithm.inner.present_order = order  # a graph keeps what it was captured with
                for kept, new in zip(outputs, compute(), strict=True):
                    for name, value in new.items():
                        kept[name].copy_(value)

            return outputs, replay

        monkeypatch.setattr("maml.training.cuda_graph.capture", capture)
        learner.folder.open({"cpu": "Abacus"}, "", "MAML")
        try:
            execution = train([learner], Execution(1, None, False, cuda_graph=cuda_graph))
        finally:
            learner.folder.close("finished")
        assert execution.cuda_graph is cuda_graph, "it was given up"
        return clone(algorithm.theta)

    plain, replayed = train_once("plain", False), train_once("graph", True)
    assert captured == [1, 2]
    assert all(torch.equal(plain[name], value) for name, value in replayed.items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # the compiler would give up at it
def test_program_is_compiled_again_where_the_order_changes(tiny: TinyRuns) -> None:
    own = ("num_iterations=10", "inner.second_order_from=6", "inner.step_size=0.1", "precision=float64")
    eager = checkpoint_tensors(tiny.in_folder("eager").run(*own))
    folder = tiny.run(*own, "hardware.compile=true")
    assert checkpoint.load(folder / "checkpoint.pt")["execution"]["compile"] is True, "compiling has failed"
    compiled = checkpoint_tensors(folder)
    only_first = checkpoint_tensors(tiny.run("num_iterations=10", "inner.order=1", *own[2:]))
    assert all(torch.allclose(compiled[name], value, rtol=1e-6, atol=1e-9) for name, value in eager.items())
    assert not torch.allclose(compiled["theta.head.weight"], only_first["theta.head.weight"], rtol=1e-4)


@pytest.mark.parametrize("period", ["log_every", "checkpoint_every"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_loss_that_is_not_finite_stops_the_run_where_it_is_looked_at(tiny: TinyRuns, value: float, period: str) -> None:
    loop = Loop(tiny, 100, **{"log_every": 1000, "checkpoint_every": 1000, period: 5})

    def diverging(objective: object, tasks: dict[str, Tensor]) -> dict[str, Tensor]:
        metrics = Counting.meta_update(loop.algorithm, objective, tasks)
        return metrics | {"loss": torch.tensor(value)} if metrics["loss"] >= 7 else metrics

    loop.algorithm.meta_update = diverging
    with pytest.raises(MamlError, match=rf"loss={value} at iteration 10: training has diverged") as caught:
        loop()
    assert "Lower inner.step_size or outer.step_size, or clip the meta-gradient (outer.clip)" in str(caught.value)
    assert ("the last checkpoint in" in str(caught.value)) == (period == "checkpoint_every"), "there is no other"
    assert [line["iteration"] for line in loop.lines] == ([5] if period == "log_every" else [])
    assert loop.run.checkpoint_path.exists() == (period == "checkpoint_every")
    if period == "checkpoint_every":
        assert loop.saved["iteration"] == 5


def test_second_signal_does_not_wait(tiny: TinyRuns) -> None:
    loop = Loop(tiny, 100)

    def impatient(objective: object, tasks: dict[str, Tensor]) -> dict[str, Tensor]:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("still waiting")

    loop.algorithm.meta_update = impatient
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores SIGINT from its start
    try:
        with pytest.raises(KeyboardInterrupt) as stop:
            loop()
        assert not isinstance(stop.value, Interrupted)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_first_interrupt_is_answered_at_once(tiny: TinyRuns, capfd: pytest.CaptureFixture[str]) -> None:
    loop, said = Loop(tiny, 100), list[str]()

    def told(objective: object, tasks: dict[str, Tensor]) -> dict[str, Tensor]:
        if loop.algorithm.outer_state["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)
            said.append(capfd.readouterr().err.splitlines()[-1])
        return Counting.meta_update(loop.algorithm, objective, tasks)

    loop.algorithm.meta_update = told
    with pytest.raises(Interrupted):
        loop()
    assert said == ["stopping after this iteration; press Ctrl-C again to drop it"]
    assert loop.saved["iteration"] == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signal_while_compiling_stops_at_once(
    number: signal.Signals, tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loop(tiny, 100)

    def compiling(objective: object, tasks: dict[str, Tensor]) -> dict[str, Tensor]:
        monkeypatch.setattr("maml.training.loop.is_compiling", lambda: True)
        os.kill(os.getpid(), number)
        raise AssertionError("still compiling")

    loop.algorithm.meta_update = compiling
    with pytest.raises(KeyboardInterrupt) as stop:
        loop()
    assert isinstance(stop.value, Interrupted) == (number != signal.SIGINT)
    assert not loop.run.checkpoint_path.exists(), "no iteration is done"


def test_second_sigterm_changes_nothing(tiny: TinyRuns) -> None:
    loop = Loop(tiny, 100)

    def told_twice(objective: object, tasks: dict[str, Tensor]) -> dict[str, Tensor]:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        return Counting.meta_update(loop.algorithm, objective, tasks)

    loop.algorithm.meta_update = told_twice
    with pytest.raises(Interrupted):
        loop()
    assert loop.saved["iteration"] == 1


def test_signal_after_the_last_iteration_stops_the_run(tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(tiny, 10)
    save = loop.run.save_checkpoint

    def told_while_saving(*arguments: Any) -> None:
        save(*arguments)
        if arguments[0] == 10:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop.run, "save_checkpoint", told_while_saving)
    with pytest.raises(Interrupted, match="after iteration 10 of 10"):
        loop()


def test_loop_runs_outside_the_main_thread(tiny: TinyRuns) -> None:
    loop = Loop(tiny, 5)
    thread = threading.Thread(target=loop)
    thread.start()
    thread.join()
    assert loop.saved["iteration"] == 5


def test_progress_names_the_run(tiny: TinyRuns, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    loop = Loop(tiny, 5)
    loop()
    lines = capsys.readouterr().err.splitlines()
    name = f"custom {loop.run.run_id[:6]}, Counting"
    assert lines[0] == f"{name} 1/5  loss 1  accuracy 0.5"
    assert lines[-1].startswith(f"{name} 5/5  loss 5  accuracy 0.5")


def test_largest_entries_leave_out_parameters_without_any() -> None:
    state = {"theta": {"weight": torch.tensor([1.0, -3.0]), "none": torch.empty(0)}, "outer": {"none": torch.empty(0)}}
    assert _largest_entries(state) == {"theta": 3.0}


def test_largest_entry_of_parameters_with_minus_infinity_is_infinite() -> None:
    assert _largest_entries({"theta": {"weight": torch.tensor([1.0, -torch.inf])}}) == {"theta": torch.inf}
