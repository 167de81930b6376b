"""The device of a run: what auto chooses, what a checkpoint keeps, and that none of it changes a result."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from maml.domain.base import without_data
from maml.domain.cifar_fs import CifarFS
from maml.domain.classification import FewShotClassification
from maml.domain.mini_imagenet import MiniImagenet
from maml.domain.omniglot import Omniglot
from maml.domain.point_navigation import PointNavigation
from maml.domain.sinusoid import Sinusoid
from maml.errors import Interrupted, MamlError
from maml.hardware import base
from maml.hardware.base import Execution, Hardware, usable_cores
from maml.record import checkpoint
from tests.hardware.test_distributed import metrics
from tests.runs import TinyRuns, before_iteration, checkpoint_tensors

VECTORS = Sinusoid()


def images(num_ways: int, num_shots: int, kind: type[FewShotClassification] = Omniglot, **options: Any) -> Any:
    with without_data():
        return kind(num_ways=num_ways, num_shots=num_shots, data_dir="", cache_dir="", **options)


@pytest.fixture(autouse=True)
def _switches() -> Iterator[None]:
    yield
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def three_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    monkeypatch.setattr(base, "onednn_is_faster", lambda: False)
    monkeypatch.setattr(base, "library", lambda: object())


@pytest.mark.usefixtures("three_cores")
@pytest.mark.parametrize(
    ("domain", "num_iterations", "expected"),
    [
        (VECTORS, 100, Execution(1, None, False)),
        (VECTORS, 70_000, Execution(1, None, True)),
        (images(5, 1), 60_000, Execution(3, 8, False, kernels=True)),
        (images(5, 5), 60_000, Execution(3, 2, False, kernels=True)),
        (images(20, 5), 60_000, Execution(3, 1, False, kernels=True)),
        (images(5, 1, MiniImagenet), 60_000, Execution(3, 1, False, kernels=True)),
        (images(5, 1, CifarFS), 60_000, Execution(3, 2, False, kernels=True)),
        (images(5, 1, CifarFS, num_query=15), 60_000, Execution(3, 1, False, kernels=True)),
        (PointNavigation(), 100_000, Execution(3, 2, False, thread_chunks=True)),
        (PointNavigation(num_shots=100), 500, Execution(3, 1, False, thread_chunks=True)),
    ],
)
def test_auto_suits_the_domain(domain: Any, num_iterations: int, expected: Execution) -> None:
    assert Hardware().choose(domain.workload, num_iterations, {}) == expected


@pytest.mark.usefixtures("three_cores")
def test_what_is_asked_for_wins_over_auto_and_over_the_checkpoint() -> None:
    earlier = Execution(2, 4, True).as_dict()
    asked = Hardware(num_threads=5, task_chunk="all", compile=False)
    assert asked.choose(images(5, 1).workload, 60_000, {}) == Execution(5, None, False, kernels=True)
    assert asked.choose(images(5, 1).workload, 60_000, earlier) == Execution(5, None, False)
    assert Hardware().choose(images(5, 1).workload, 60_000, earlier) == Execution(2, 4, True)
    assert Hardware(task_chunk=7).choose(images(5, 1).workload, 60_000, earlier) == Execution(2, 7, True)


def test_run_that_moves_to_a_gpu_is_cut_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    earlier = Hardware(device="cpu").choose(images(5, 1).workload, 60_000, {}).as_dict()
    assert Hardware(device="cpu").choose(images(5, 1).workload, 60_000, earlier).task_chunk == 8
    assert Hardware(device="cuda").choose(images(5, 1).workload, 60_000, earlier).task_chunk is None


def test_resumed_run_keeps_the_chunk_of_its_checkpoint(tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        before_iteration(patch, 5, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        tiny.run("hardware.task_chunk=3", "num_iterations=10")
    chunks = []
    before_iteration(monkeypatch, 1, lambda meta_gradient: chunks.append(meta_gradient.execution.task_chunk))
    folder = tiny.run("num_iterations=10")
    assert chunks == [3]
    assert checkpoint.load(folder / "checkpoint.pt")["execution"]["task_chunk"] == 3


def test_absent_gpu_is_refused_and_auto_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MamlError, match="sees no CUDA device"):
        Hardware(device="cuda")
    assert Hardware(device="auto").device.type == "cpu"


def test_present_gpu_is_taken_by_auto_and_left_alone_by_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Hardware(device="auto").device.type == "cuda"
    assert Hardware(device="cpu").device.type == "cpu"
    assert Hardware().choose(images(5, 1).workload, 60_000, {}).task_chunk is None
    assert not Hardware().choose(VECTORS.workload, 60_000, {}).compile


def test_iterations_on_a_gpu_are_launched_as_graphs_but_for_rl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Hardware().choose(images(5, 1).workload, 60_000, {}).cuda_graph
    assert not Hardware(cuda_graph=False).choose(images(5, 1).workload, 60_000, {}).cuda_graph
    assert not Hardware().choose(PointNavigation(num_shots=5, horizon=20).workload, 100, {}).cuda_graph
    assert not Hardware(device="cpu").choose(images(5, 1).workload, 60_000, {}).cuda_graph
    with pytest.raises(MamlError, match=r"hardware.cuda_graph=true needs a GPU"):
        Hardware(device="cpu", cuda_graph=True)


def test_processes_of_a_machine_share_its_cores_and_have_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(9)))
    monkeypatch.setattr(base, "_CONTAINER_QUOTAS", ())
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert Hardware(device="cpu").choose(images(5, 1).workload, 60_000, {}).num_threads == 2
    assert Hardware().device == torch.device("cuda", 3)
    monkeypatch.delenv("WORLD_SIZE")  # then the others were left over
    assert Hardware(device="cpu").choose(images(5, 1).workload, 60_000, {}).num_threads == 9
    assert Hardware().device == torch.device("cuda", 0)


def test_cores_are_those_of_the_container_if_it_has_fewer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    one, quota, period = (tmp_path / name for name in ("cpu.max", "quota", "period"))
    monkeypatch.setattr(base, "_CONTAINER_QUOTAS", ((str(one),), (str(quota), str(period))))
    assert usable_cores() == 64
    for text, cores in (("max 100000", 64), ("200000 100000\n", 2), ("150000 100000", 2), ("10000 100000", 1)):
        one.write_text(text)
        assert usable_cores() == cores
    one.unlink()
    period.write_text("100000\n")
    for text, cores in (("-1\n", 64), ("300000\n", 3)):
        quota.write_text(text)
        assert usable_cores() == cores


def test_processes_of_a_resumed_run_share_the_cores_and_one_alone_keeps_its_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(base, "usable_cores", lambda: 8)
    earlier = Hardware(device="cpu").choose(images(5, 1).workload, 60_000, {}).as_dict()
    assert earlier["num_threads"] == 8
    monkeypatch.setattr(base, "usable_cores", lambda: 4)
    for processes, expected in (("1", 8), ("2", 2), ("4", 1)):
        monkeypatch.setenv("WORLD_SIZE", processes)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert Hardware(device="cpu").choose(images(5, 1).workload, 60_000, earlier).num_threads == expected


def test_recomputing_is_as_the_user_says_also_of_a_resumed_run() -> None:
    earlier = Hardware(device="cpu").choose(VECTORS.workload, 100, {}).as_dict()
    assert not earlier["recompute"]
    assert Hardware(device="cpu", recompute=True).choose(VECTORS.workload, 100, earlier).recompute


def test_switches_are_set_and_reset() -> None:
    Hardware(device="cpu", deterministic=True).apply(Execution(2, None, False))
    assert torch.get_num_threads() == 2
    assert torch.are_deterministic_algorithms_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    assert not fills, "it takes a kernel for each tensor"
    Hardware(device="cpu").apply(Execution(1, None, False))
    assert torch.get_num_threads() == 1
    assert not torch.are_deterministic_algorithms_enabled()


def test_description_names_the_machine() -> None:
    described = Hardware(device="cpu").describe()
    assert described["device"] == "cpu"
    assert described["cpu"]
    assert described["cores"] >= 1


CPUINFO = "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (2 * CPUINFO, "AMD EPYC (family 26, model 2)"),  # two processors with one name are of different speed
        ("model name : Cortex: A76\n", "Cortex: A76"),
        ("CPU implementer : 0x41\n", "aarch64"),
    ],
)
def test_processor_is_named_with_family_and_model(text: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert Hardware(device="cpu").describe()["cpu"] == expected


@pytest.mark.parametrize(
    "setting", ["hardware.task_chunk=1", "hardware.task_chunk=2", "hardware.num_threads=2", "hardware.recompute=true"]
)
def test_hardware_changes_no_gradient(each_domain: TinyRuns, setting: str) -> None:
    """After one iteration, Adam's running mean is a tenth of the meta-gradient."""
    few = ("num_iterations=1", "evaluation.num_tasks=2")
    mine = checkpoint_tensors(each_domain.run(*few, "hardware.task_chunk=all"))["outer.mean"]
    theirs = checkpoint_tensors(each_domain.in_folder("other").run(*few, setting))["outer.mean"]
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * mine.abs().max().item())


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # the compiler would give up at it
def test_compiling_changes_no_result(tiny: TinyRuns) -> None:
    few = ("num_iterations=20", "log_every=1", "evaluation.num_tasks=2")
    mine = tiny.run(*few, "hardware.compile=false")
    theirs = tiny.in_folder("other").run(*few, "hardware.compile=true")
    losses = [[line["loss"] for line in metrics(folder)] for folder in (mine, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert checkpoint.load(theirs / "checkpoint.pt")["execution"]["compile"], "it did not fall back"


def test_onednn_is_for_reinforcement_learning() -> None:
    with pytest.raises(MamlError, match=r"hardware\.onednn=true is for reinforcement learning on a CPU"):
        Hardware(device="cpu", onednn=True).check(Sinusoid(num_shots=5).workload)
    Hardware(device="cpu", onednn=True).check(PointNavigation(num_shots=5, horizon=20).workload)


def test_recomputing_is_for_supervised_domains() -> None:
    with pytest.raises(MamlError, match="recompute=true is for supervised domains"):
        Hardware(device="cpu", recompute=True).choose(PointNavigation(num_shots=5, horizon=20).workload, 100, {})


@pytest.mark.parametrize("name", ["compile", "cuda_graph", "recompute"])
def test_setting_for_fixed_shapes_is_refused_in_rl_before_anything_is_chosen(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    hardware = Hardware(**{name: True})  # type: ignore[arg-type]
    hardware.check(images(5, 1).workload)
    with pytest.raises(MamlError, match=rf"hardware\.{name}=true is for supervised domains"):
        hardware.check(PointNavigation(num_shots=5, horizon=20).workload)
