"""The benchmarks: equal gradients of all implementations; ratios, bars, floors and exponents; tiny runs."""

from __future__ import annotations

import csv
import importlib
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure as Canvas

from tests.runs import ROOT

SINUSOID = ("sinusoid_10shot", ["meta_batch_size=3", "inner.num_steps=2"])
IMAGES = ("omniglot_5way_1shot", ["meta_batch_size=2", "model.num_filters=4", "inner.num_steps=2"])
POOLED = ("cifar_fs_5way_1shot", ["meta_batch_size=2", "model.num_filters=4", "domain.num_query=2", "outer.clip=1e-3"])
PEERS = ("learn2learn", "higher", "torchopt", "jax")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports a script, which imports other scripts of its folder."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module


@pytest.fixture
def implementations(script: Callable[[str], Any]) -> ModuleType:
    return script("implementations")


@pytest.mark.parametrize("case", [SINUSOID, IMAGES, POOLED], ids=["sinusoid", "images", "pooled"])
def test_ours_and_loops_have_one_gradient_and_take_one_step(
    implementations: ModuleType, case: tuple[str, list[str]]
) -> None:
    names = ["ours", "loop", "loop, fused norm"]
    problem, ready, errors, missing = implementations.prepare(names, *case)
    assert [*missing] == ([] if problem.is_image else ["loop, fused norm"])
    assert all(error[0] < 1e-12 and error[1] < 1e-3 for error in errors.values())
    before = {name: dict(way.gradient(problem.tasks)) for name, way in ready.items()}
    after = {}
    for name, way in ready.items():
        way.step(problem.sample(1))
        after[name] = dict(way.gradient(problem.tasks))
    assert implementations.relative_error(after["loop"], before["loop"]) > 1e-2  # theta has changed
    # In float32, Adam makes a full step even if a gradient is only rounding noise, as for biases.
    assert all(implementations.relative_error(gradient, after["loop"]) < 0.05 for gradient in after.values())


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("case", [SINUSOID, IMAGES], ids=["sinusoid", "images"])
@pytest.mark.filterwarnings("default")  # other libraries may warn
def test_peer_has_the_loops_gradient_or_is_not_installed(
    implementations: ModuleType, case: tuple[str, list[str]], peer: str
) -> None:
    _, ready, errors, missing = implementations.prepare([peer], *case)
    assert ready.keys() ^ missing.keys() == {peer}
    if missing:
        pytest.skip(f"{peer}: {missing[peer]}")
    assert errors[peer][0] < 1e-12


def test_another_gradient_is_refused(implementations: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubled(implementations.Ours):  # type: ignore[name-defined]
        def gradient(self, tasks: Any) -> Any:
            return {name: 2 * value for name, value in super().gradient(tasks).items()}

    monkeypatch.setitem(implementations.IMPLEMENTATIONS, "ours", Doubled)
    with pytest.raises(RuntimeError, match="another meta-gradient"):
        implementations.prepare(["ours"], *SINUSOID)


def test_float32_is_checked_on_single_tasks(implementations: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """An implementation may be wrong on one task, near a ReLU's kink, but not on all tasks."""
    spoilt = {0}

    class Kinked(implementations.Ours):  # type: ignore[name-defined]
        def __init__(self, problem: Any) -> None:
            super().__init__(problem)
            self.problem = problem

        def gradient(self, tasks: Any) -> Any:
            first = self.problem.tasks["amplitude"]
            bad = any(torch.equal(tasks["amplitude"][0], first[index]) for index in spoilt)
            factor = 1.1 if bad and self.problem.dtype == torch.float32 else 1.0
            return {name: factor * value for name, value in super().gradient(tasks).items()}

    monkeypatch.setitem(implementations.IMPLEMENTATIONS, "ours", Kinked)
    _, _, errors, _ = implementations.prepare(["ours"], *SINUSOID)
    assert errors["ours"][1] < 1e-5
    spoilt |= {1, 2}
    with pytest.raises(RuntimeError, match=r"1\.0e-01 in torch\.float32"):
        implementations.prepare(["ours"], *SINUSOID)


def test_relative_error_is_of_all_parameters_as_one_vector(implementations: ModuleType) -> None:
    reference = {"a": torch.tensor([3.0]).double(), "b": torch.tensor([4.0]).double()}
    gradient = {"a": torch.tensor([3.0]), "b": torch.tensor([4.5])}
    assert implementations.relative_error(gradient, reference) == pytest.approx(0.1)
    assert implementations.relative_error({"a": gradient["a"]}, reference) == math.inf


def test_verdict_says_met_or_missed(script: Callable[[str], Any]) -> None:
    verdict = script("benchmark").verdict
    assert verdict(1.5, 1.4) == "met (>= 1.4)"
    assert verdict(1399.0, 1500.0, " it/s") == "missed (>= 1,500 it/s)"
    assert verdict(1.5, 2.0, at_most=True) == "met (<= 2)"
    assert verdict(2.5, 2.0, at_most=True) == "missed (<= 2)"
    assert verdict(1.5, None) == ""


def test_turns_are_taken_and_ratios_compare_neighbours(script: Callable[[str], Any]) -> None:
    benchmark = script("benchmark")
    turns: list[str] = []
    runs = {name: lambda name=name: turns.append(name) for name in ("a", "b")}
    seconds = benchmark.time_in_turns(runs, 3, clock=lambda: float(len(turns)), min_seconds=1.0)
    assert turns == ["a", "b"] * 3 and seconds == {"a": [1.0] * 3, "b": [1.0] * 3}
    # In the second round the machine is ten times as slow for both.
    assert benchmark.times_as_fast([1.0, 10.0, 1.0], [2.0, 20.0, 3.0]) == (2.0, 2.0, 3.0)
    assert benchmark.times_as_fast([], [2.0]) is None


def test_exponent_of_a_power_law_is_found(script: Callable[[str], Any]) -> None:
    exponent = script("bench_scaling").exponent
    assert exponent([(x, 3e-3 * x**1.7) for x in (1, 2, 4, 8)]) == pytest.approx(1.7)
    assert exponent([(5, 0.2), (50, 0.2)]) == pytest.approx(0.0)


def test_floor_counts_products_and_covers_intervals(script: Callable[[str], Any]) -> None:
    floor = script("floor")
    a, b = torch.ones(3, 4), torch.ones(4, 5)
    cost = floor.Cost.of(lambda: (a @ b).relu() + 1)
    assert (cost.operations, cost.bytes, cost.calls) == (2 * 3 * 4 * 5, 4 * (12 + 20 + 15), 1)
    assert cost.seconds(floor.Rates(operations=1.0, bytes=1e9)) == 120
    assert cost.seconds(floor.Rates(operations=1e9, bytes=1.0)) == 188
    assert floor.union_length([(3.0, 4.0), (0.0, 2.0), (1.0, 2.5), (1.2, 1.4)]) == pytest.approx(3.5)


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    found = list(csv.DictReader((folder / f"{name}.csv").read_text().splitlines()))
    assert all(row["commit"] and row["command"] and row["hardware"] for row in found)
    return found


def test_scaling_writes_table_and_plot(
    script: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script("bench_scaling")
    few = {what: module.SWEEPS["sinusoid_10shot"][what] for what in ("shots", "width")}
    monkeypatch.setitem(module.SWEEPS, "sinusoid_10shot", few)
    monkeypatch.setattr(module, "time_in_turns", partial(module.time_in_turns, min_seconds=0.0))
    arguments = ["--experiments", "sinusoid_10shot", "--values", "1", "2", "--rounds", "1", "--out", str(tmp_path)]
    module.main(arguments)
    found = rows(tmp_path, "scaling")
    assert {row["varied"] for row in found} == {"shots", "width"}
    assert len(found) == 2 * 2 * 2 and (tmp_path / "scaling.png").stat().st_size > 1000
    drawn = (tmp_path / "scaling.png").read_bytes()
    (tmp_path / "scaling.png").unlink()
    module.main(["--redraw", "--out", str(tmp_path)])
    assert (tmp_path / "scaling.png").read_bytes() == drawn


def test_scaling_plot_has_logarithmic_axes_with_numbers_and_one_legend(
    script: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canvases: list[Canvas] = []
    monkeypatch.setattr(Canvas, "savefig", lambda self, *_, **__: canvases.append(self))
    medians = {"ours": [(5, 0.001), (80, 0.003)], "loop": [(5, 0.02), (80, 0.06)]}
    script("bench_scaling").plot(
        {("sinusoid_10shot", what): medians for what in ("shots", "width")}, tmp_path / "a.png"
    )
    (canvas,) = canvases
    first, second = canvas.axes
    canvas.draw_without_rendering()
    assert {text.get_text() for text in first.get_yticklabels()} >= {"1", "2", "5", "10", "20", "50"}
    assert [text.get_text() for text in first.get_xticklabels()] == ["5", "80"]
    assert (first.get_ylabel(), second.get_xlabel()) == ("sinusoid_10shot\nms per meta-gradient", "width")
    assert "all axes are logarithmic" in canvas.get_suptitle()
    assert first.get_title() == "exponent\nours 0.40, loop 0.40"
    (legend,) = canvas.legends
    assert [text.get_text() for text in legend.get_texts()] == ["ours", "loop"]


@pytest.mark.filterwarnings("default")  # other libraries may warn
def test_training_shows_who_is_missing(
    script: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, ways, floor = script("bench_training"), script("implementations"), script("floor")
    monkeypatch.setattr(floor.Rates, "measure", classmethod(lambda cls, device: cls(1e11, 1e10)))
    monkeypatch.setitem(ways.IMPLEMENTATIONS, "ours as trained", ways.Ours)  # compiling takes a minute

    def absent(problem: Any) -> None:
        ways._library("no_such_library")

    monkeypatch.setitem(ways.IMPLEMENTATIONS, "jax", absent)
    module.main(["--experiments", "sinusoid_10shot", "--peers", "jax", "--rounds", "1", "--out", str(tmp_path)])
    notes = {row["implementation"]: row["note"] for row in rows(tmp_path, "training")}
    assert notes == {"ours as trained": "", "loop": "", "jax": "not installed"}
    assert "| jax | not installed |" in (tmp_path / "training.md").read_text()


def test_evaluation_of_the_loop_agrees(script: Callable[[str], Any], tmp_path: Path) -> None:
    module = script("bench_evaluation")
    experiments = ["--experiments", "sinusoid_10shot", "omniglot_5way_1shot"]
    module.main([*experiments, "--tasks", "4", "--rounds", "1", "--out", str(tmp_path)])
    assert [row["implementation"] for row in rows(tmp_path, "evaluation")] == ["ours", "loop"] * 2


def test_time_to_accuracy_goes_on_from_its_state(script: Callable[[str], Any], tmp_path: Path) -> None:
    module = script("bench_time_to_accuracy")
    state = tmp_path / "state.pt"
    call = ["--experiment", "sinusoid_10shot", "--every", "2", "--tasks", "2", "--minutes", "0.0005"]
    call += ["--out", str(tmp_path), "--state", str(state), "hardware.compile=false"]
    module.main([*call, "--accuracy", "1e9"])
    first = rows(tmp_path, "time_to_accuracy")
    assert "Not reached yet" in (tmp_path / "time_to_accuracy.md").read_text()
    module.main([*call, "--accuracy", "1e9"])
    both = rows(tmp_path, "time_to_accuracy")
    assert both[: len(first)] == first and len(both) > len(first)
    assert [int(row["iteration"]) for row in both] == [2 * (index + 1) for index in range(len(both))]
    seconds = [float(row["seconds"]) for row in both]
    assert seconds == sorted(seconds) and seconds[0] > 0
    with pytest.raises(RuntimeError, match="move it away to start again"):
        module.main([*call, "--accuracy", "0.001"])
    state.unlink()
    module.main([*call, "--accuracy", "0.001"])  # reached, because the metric is a squared error
    assert "Reached after 2 iterations" in (tmp_path / "time_to_accuracy.md").read_text()
