"""The benchmarks: equal gradients; ratios, bars, floors and exponents; folders of processors; tiny runs."""

from __future__ import annotations

import contextlib
import csv
import importlib
import itertools
import math
import re
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure as Canvas

from maml.errors import MamlError
from tests.runs import ROOT

SINUSOID = ("sinusoid_10shot", ["meta_batch_size=3", "inner.num_steps=2"])
IMAGES = ("omniglot_5way_1shot", ["meta_batch_size=2", "model.num_filters=4", "inner.num_steps=2"])
POOLED = ("cifar_fs_5way_1shot", ["meta_batch_size=2", "model.num_filters=4", "domain.num_query=2", "outer.clip=1e-3"])
PEERS = ("learn2learn", "higher", "torchopt", "jax")
needs_clone = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="revisions are in a clone, not in a bundle")


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
        assert not missing[peer].startswith("fails here")
        pytest.skip(f"{peer}: {missing[peer]}")
    assert errors[peer][0] < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_peer_that_fails_in_one_precision_is_missing(
    implementations: ModuleType, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    class Changed(implementations.Ours):  # type: ignore[name-defined]
        def __init__(self, problem: Any) -> None:
            super().__init__(problem)
            self.fails = problem.dtype == dtype

        def gradient(self, tasks: Any) -> Any:
            if self.fails:
                raise AttributeError("no such function\nin this version")
            return super().gradient(tasks)

    monkeypatch.setitem(implementations.IMPLEMENTATIONS, "jax", Changed)
    _, ready, errors, missing = implementations.prepare(["loop", "jax"], *SINUSOID)
    assert missing == {"jax": "fails here (no such function)"}
    assert [*ready] == [*errors] == ["loop"]


def test_library_that_cannot_be_imported_says_why(
    implementations: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old_library.py").write_text("from math import no_such_name")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(implementations.Unavailable, match=r"not importable .*no_such_name"):
        implementations._library("old_library")


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


def test_every_round_is_printed_when_it_is_measured(
    script: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    printed: list[str] = []

    def elsewhere() -> float:
        printed.append(capsys.readouterr().out)
        return 0.25

    ticks = itertools.count()
    seconds = script("benchmark").time_in_turns(
        {"ours": lambda: None}, 2, lambda: float(next(ticks)), elsewhere={"previous": elsewhere}, title="sinusoid"
    )
    assert seconds == {"previous": [0.25, 0.25], "ours": [1.0, 1.0]}
    assert printed == ["", "sinusoid, round 1 of 2: previous 250 ms, ours 1000 ms\n"]


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("AMD EPYC 7763 64-Core Processor", "amd_epyc_7763"),
        ("AMD EPYC", "amd_epyc"),
        ("AMD EPYC (family 26, model 2)", "amd_epyc_family_26_model_2"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz (family 6, model 85)", "intel_xeon_family_6_model_85"),
        ("Intel(R) Xeon(R) Processor", "intel_xeon"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", "intel_xeon"),
        ("Intel(R) Core(TM) i7-8700K CPU @ 3.70GHz", "intel_core_i7_8700k"),
        ("NVIDIA H100 80GB HBM3", "nvidia_h100_80gb_hbm3"),
        ("", "unknown"),
    ],
)
def test_hardware_slug_names_the_kind_of_processor(script: Callable[[str], Any], name: str, slug: str) -> None:
    assert script("benchmark").hardware_slug(name) == slug


def test_committed_tables_lie_in_the_folder_of_their_processor(script: Callable[[str], Any]) -> None:
    benchmark = script("benchmark")
    tables = [*(ROOT / benchmark.RESULTS).glob("*/*.md")]
    assert tables
    for path in tables:
        hardware = benchmark.read_conditions(path.read_text())["hardware"]
        name = re.search(r", gpu (.*)", hardware) or re.search(r", cpu (.*), cores", hardware)
        assert name is not None and benchmark.hardware_slug(name[1]) == path.parent.name, path


def test_committed_overview_is_up_to_date(script: Callable[[str], Any]) -> None:
    benchmark = script("benchmark")
    folder = ROOT / benchmark.RESULTS
    assert (folder / "README.md").read_text() == benchmark.overview(folder)


def test_overview_has_a_row_per_processor_and_a_column_per_benchmark(
    script: Callable[[str], Any], tmp_path: Path
) -> None:
    for name, commit in {
        "a/training": "0123456789",
        "b/training": "abcdefghij-dirty",
        "b/scaling": "9876543210",
    }.items():
        path = tmp_path / f"{name}.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"# Title\n\n- command: python a: b\n- commit: {commit}\n\nText.\n")
    assert script("benchmark").overview(tmp_path).split("\n\n", 2)[2].splitlines() == [
        "| folder | scaling | training |",
        "| --- | ---: | ---: |",
        "| a |  | [0123456](a/training.md) |",
        "| b | [9876543](b/scaling.md) | [abcdefg-dirty](b/training.md) |",
    ]


def previous_revision(script: Callable[[str], Any], revision: str | None) -> Any:
    options = Namespace(name="meta_gradient", device="cpu", threads=1, previous=revision)
    return script("previous").Previous(options)


@needs_clone
@pytest.mark.parametrize("method", ["gradient", "iterate"])
def test_previous_revision_times_its_own_code_in_turns(script: Callable[[str], Any], method: str) -> None:
    previous = previous_revision(script, "HEAD")
    with previous.process("ours", *SINUSOID[:1], method, SINUSOID[1]) as turn:
        seconds = [turn() for _ in range(2)]
    assert len(str(previous)) == 40 and all(0 < value < 1 for value in seconds)


STUB = """
import maml
import torch

class Problem:
    def __init__(self, *_):
        self.tasks = None

class Recorded:
    def __init__(self, problem): pass

    def gradient(self, tasks):
        print("call, TF32:", torch.backends.cudnn.allow_tf32)

    def iterate(self, problem, number):
        self.gradient(problem.tasks)

IMPLEMENTATIONS = {"ours": Recorded}
"""


@pytest.mark.parametrize(("method", "calls"), [("gradient", 1), ("iterate", 6)])
def test_previous_revision_warms_up_as_the_present_one_and_without_tf32(
    tmp_path: Path, method: str, calls: int
) -> None:
    for name, text in {"scripts/implementations.py": STUB, "maml/__init__.py": ""}.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    worker = [sys.executable, str(ROOT / "scripts" / "previous_worker.py"), str(tmp_path)]
    done = subprocess.run(
        [*worker, "cpu", "1", "sinusoid_10shot", "ours", method], input="", capture_output=True, text=True, check=True
    )
    assert done.stdout == "ready\n" and done.stderr.splitlines() == ["call, TF32: False"] * calls


def test_problem_is_computed_without_tf32(implementations: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    implementations.Problem(*SINUSOID)
    assert not torch.backends.cudnn.allow_tf32


@needs_clone
def test_previous_revision_that_cannot_be_measured_says_why(script: Callable[[str], Any]) -> None:
    module = script("previous")
    with (
        pytest.raises(module.Unavailable, match=r"cannot be measured: KeyError: 'no such one'"),
        previous_revision(script, "HEAD").process("no such one", *SINUSOID[:1], "gradient"),
    ):
        pass
    with (
        pytest.raises(module.Unavailable, match="this clone has no revision no-such-tag"),
        previous_revision(script, "no-such-tag").process("ours", *SINUSOID[:1], "gradient"),
    ):
        pass


@needs_clone
def test_previous_revision_whose_process_ends_is_an_error(
    script: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    processes: list[subprocess.Popen[str]] = []

    class Noted(subprocess.Popen[str]):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            processes.append(self)

    revision = previous_revision(script, "HEAD")
    monkeypatch.setattr(script("previous").subprocess, "Popen", Noted)
    with (
        pytest.raises(RuntimeError, match="ended during its turn: it ended without a message; run the benchmark again"),
        revision.process("ours", *SINUSOID[:1], "gradient", SINUSOID[1]) as turn,
    ):
        processes[-1].kill()
        processes[-1].wait()
        turn()


def test_previous_revision_is_by_default_the_newest_tag_or_the_commit_of_the_table(
    script: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script("previous")
    monkeypatch.setattr(module, "hardware_folder", lambda device: "some_processor")
    answers = {
        "describe": "v1.0",
        "show": "# Title\n\n- command: python\n- commit: 0123456-dirty\n",
        "rev-parse": "",
    }
    asked: list[str] = []

    def git(*arguments: str) -> str:
        asked.append(arguments[-1])
        return answers[arguments[0]]

    monkeypatch.setattr(module, "git", git)
    previous_revision(script, None)
    answers["describe"] = ""
    previous_revision(script, None)
    answers["show"] = ""
    assert str(previous_revision(script, None)).startswith("unavailable: no tag, and no committed table")
    shown = "HEAD:results/benchmarks/some_processor/meta_gradient.md"
    asked = [name for name in asked if not name.startswith("--")]
    assert asked == ["v1.0^{commit}", shown, "0123456^{commit}", shown]


def test_meta_gradient_shows_ratios_to_others_with_their_bars(
    script: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, floor, previous = script("bench_meta_gradient"), script("floor"), script("previous")
    monkeypatch.setattr(floor.Rates, "measure", classmethod(lambda cls, device: cls(1e11, 1e10)))
    monkeypatch.setattr(module, "peak_memory", lambda *_: (1.0, 2.0))
    monkeypatch.setattr(module, "ProcessPoolExecutor", lambda count, _: ThreadPoolExecutor(count))

    @contextlib.contextmanager
    def process(*_: Any) -> Iterator[Callable[[], float]]:
        yield lambda: 1e-9  # far faster than the present code

    def fails_in_float32(problem: Any) -> Any:
        if problem.dtype == torch.float32:
            raise TypeError("no such dtype")
        return script("implementations").Ours(problem)

    monkeypatch.setattr(previous.Previous, "process", process)
    monkeypatch.setitem(script("implementations").IMPLEMENTATIONS, "jax", fails_in_float32)
    options = ["--experiments", "sinusoid_10shot", "--peers", "jax", "--compile", "--rounds", "1", "--previous", "HEAD"]
    module.main([*options, "--out", str(tmp_path)])
    found = {row["implementation"]: row for row in rows(tmp_path, "meta_gradient")}
    assert [*found] == ["ours", "loop", "loop, fused norm", "jax", "previous"]
    assert found["jax"]["note"] == "fails here (no such dtype)"
    assert 0 < float(found["ours"]["times_previous"]) < 0.95 and float(found["previous"]["times_previous"]) == 1
    page = written(tmp_path, "meta_gradient.md").read_text()
    (ours,) = (line for line in page.splitlines() if line.startswith("| ours |"))
    assert "(>= 10) |" in ours and "missed (>= 0.95) |" in ours
    assert (tmp_path / "README.md").read_text() == script("benchmark").overview(tmp_path)


def test_exponent_of_a_power_law_is_found(script: Callable[[str], Any]) -> None:
    exponent = script("bench_scaling").exponent
    assert exponent([(x, 3e-3 * x**1.7) for x in (1, 2, 4, 8)]) == pytest.approx(1.7)
    assert exponent([(5, 0.2), (50, 0.2)]) == pytest.approx(0.0)


def test_names_of_cuda_kernels_are_short(script: Callable[[str], Any]) -> None:
    short_name = script("floor").short_name
    copy = "gpu_kernel_impl_nocast<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)::{lambda()#3}>"
    product = "at::native::BinaryFunctor<float, float, float, at::native::binary_internal::MulFunctor<float> >"
    names = {
        "aten::bmm": "aten::bmm",
        f"void at::native::elementwise_kernel<128, 2, at::native::{copy}>(int)": (
            "elementwise_kernel direct_copy_kernel_cuda"
        ),
        f"void at::native::vectorized_elementwise_kernel<4, {product}, std::array<char*, 3ul> >(int)": (
            "vectorized_elementwise_kernel MulFunctor"
        ),
        "void gemv2T_kernel_val<int, float>(float)": "gemv2T_kernel_val",
    }
    assert {name: short_name(name) for name in names} == names


def test_floor_counts_products_and_covers_intervals(script: Callable[[str], Any]) -> None:
    floor = script("floor")
    a, b = torch.ones(3, 4), torch.ones(4, 5)
    cost = floor.Cost.of(lambda: (a @ b).relu() + 1)
    assert (cost.operations, cost.bytes) == (2 * 3 * 4 * 5, 4 * (12 + 20 + 15))
    assert cost.seconds(floor.Rates(operations=1.0, bytes=1e9)) == 120
    assert cost.seconds(floor.Rates(operations=1e9, bytes=1.0)) == 188
    assert floor.union_length([(3.0, 4.0), (0.0, 2.0), (1.0, 2.5), (1.2, 1.4)]) == pytest.approx(3.5)


def written(folder: Path, name: str) -> Path:
    """Returns the only file of a name, which lies in the folder of this machine's processor."""
    (path,) = folder.glob(f"*/{name}")
    return path


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    found = list(csv.DictReader(written(folder, f"{name}.csv").read_text().splitlines()))
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
    path = written(tmp_path, "scaling.png")
    assert len(found) == 2 * 2 * 2 and path.stat().st_size > 1000
    drawn = path.read_bytes()
    path.unlink()
    module.main(["--redraw", "--out", str(tmp_path)])
    assert path.read_bytes() == drawn


@pytest.mark.parametrize("values", [["5"], ["5", "5"]])
def test_scaling_of_one_value_is_refused(
    script: Callable[[str], Any], capsys: pytest.CaptureFixture[str], values: list[str]
) -> None:
    with pytest.raises(SystemExit):
        script("bench_scaling").main(["--values", *values])
    assert "--values needs two different values" in capsys.readouterr().err


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
    options = ["--experiments", "sinusoid_10shot", "--peers", "jax", "--rounds", "1", "--previous", "no-such-tag"]
    module.main([*options, "--out", str(tmp_path)])
    notes = {row["implementation"]: row["note"] for row in rows(tmp_path, "training")}
    assert notes.pop("previous").startswith("unavailable: this clone has no revision no-such-tag; ")
    assert notes == {"ours as trained": "", "loop": "", "jax": "not installed"}
    assert "| jax | not installed |" in written(tmp_path, "training.md").read_text()


def test_evaluation_warms_both_up_before_the_timing(
    script: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, calls = script("bench_evaluation"), []
    monkeypatch.setattr(module, "check", lambda *_: None)
    monkeypatch.setattr(module, "evaluate_batched", lambda *_: calls.append("ours"))
    monkeypatch.setattr(module, "evaluate_in_loop", lambda *_: calls.append("loop"))

    def time_in_turns(runs: Any, *_: Any, **__: Any) -> dict[str, list[float]]:
        assert calls == [*runs] == ["ours", "loop"]
        return {name: [1.0] for name in runs}

    monkeypatch.setattr(module, "time_in_turns", time_in_turns)
    module.measure("sinusoid_10shot", 2, 1, torch.device("cpu"))


@pytest.mark.slow  # the loop takes twenty seconds
def test_evaluation_of_the_loop_agrees(script: Callable[[str], Any], tmp_path: Path) -> None:
    module = script("bench_evaluation")
    experiments = ["--experiments", "sinusoid_10shot", "omniglot_5way_1shot"]
    module.main([*experiments, "--tasks", "4", "--rounds", "1", "--out", str(tmp_path)])
    assert [row["implementation"] for row in rows(tmp_path, "evaluation")] == ["ours", "loop"] * 2


def test_time_to_accuracy_has_a_state_for_each_processor_and_commit(
    script: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script("bench_time_to_accuracy")
    monkeypatch.setattr(module, "hardware_folder", lambda device: f"some_{device}")
    found = [
        module.default_state(device, {"commit": commit}).name
        for device, commit in (("cpu", "0123456789"), ("cpu", "0123456789-dirty"), ("cuda", "abcdefghij"))
    ]
    assert found == [
        "time_to_accuracy_some_cpu_0123456.pt",
        "time_to_accuracy_some_cpu_0123456-dirty.pt",
        "time_to_accuracy_some_cuda_abcdefg.pt",
    ]


def test_time_to_accuracy_goes_on_from_its_state(script: Callable[[str], Any], tmp_path: Path) -> None:
    module = script("bench_time_to_accuracy")
    state = tmp_path / "state.pt"
    call = ["--experiment", "sinusoid_10shot", "--every", "2", "--tasks", "2", "--minutes", "0.0005"]
    call += ["--out", str(tmp_path), "--state", str(state), "hardware.compile=false"]
    module.main([*call, "--accuracy", "1e9"])
    first = rows(tmp_path, "time_to_accuracy")
    assert "Not reached yet" in written(tmp_path, "time_to_accuracy.md").read_text()
    module.main([*call, "--accuracy", "1e9"])
    both = rows(tmp_path, "time_to_accuracy")
    assert both[: len(first)] == first and len(both) > len(first)
    assert [int(row["iteration"]) for row in both] == [2 * (index + 1) for index in range(len(both))]
    seconds = [float(row["seconds"]) for row in both]
    assert seconds == sorted(seconds) and seconds[0] > 0
    with pytest.raises(MamlError, match="move it away to start again"):
        module.main([*call, "--accuracy", "0.001"])
    state.unlink()
    module.main([*call, "--accuracy", "0.001"])  # reached, because the metric is a squared error
    assert "Reached after 2 iterations" in written(tmp_path, "time_to_accuracy.md").read_text()
