"""Running out of memory: smaller chunks, the same gradient, a clear error; and reuse of freed memory."""

from __future__ import annotations

import logging
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from maml.algorithm.maml import MAML
from maml.domain.sinusoid import Sinusoid
from maml.errors import MamlError, TooLarge
from maml.evaluation import Evaluation
from maml.hardware import memory
from maml.hardware.memory import halve_chunk_on_oom
from maml.inner.sgd import SGD
from maml.model.mlp import MLP
from maml.record import checkpoint
from maml.seeding import Stream
from maml.types import Params
from tests.algorithms import build_from, meta_gradient, step
from tests.runs import TinyRuns, checkpoint_tensors


def small_memory(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Makes the network run out of memory above ``most`` tasks. Returns a list that collects the numbers of tasks."""
    given: list[int] = []
    compute = MLP.__call__

    def limited(self: MLP, params: Params, x: Tensor, num_reference: int | None = None) -> Tensor:
        given.append(len(x))
        if len(x) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return compute(self, params, x, num_reference)

    monkeypatch.setattr(MLP, "__call__", limited)
    return given


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:132] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_chunk_is_halved_until_it_fits_and_stays_so(error: RuntimeError, caplog: pytest.LogCaptureFixture) -> None:
    def compute(chunk: int) -> str:
        if chunk > 3:
            raise error
        return "done"

    with caplog.at_level(logging.WARNING):
        assert halve_chunk_on_oom(compute, 25) == ("done", 3)
    assert [record.getMessage().split("=")[-1] for record in caplog.records] == ["12", "6", "3"]


def test_other_errors_are_raised_at_once() -> None:
    def compute(chunk: int) -> str:
        raise RuntimeError(f"shapes do not fit at {chunk}")

    with pytest.raises(RuntimeError, match="at 25"):
        halve_chunk_on_oom(compute, 25)


def _no_memory(chunk: int) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_capture_without_memory_is_not_halved_within(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "is_capturing", lambda: True)
    with pytest.raises(torch.OutOfMemoryError):
        halve_chunk_on_oom(_no_memory, 4)


def test_smaller_chunks_give_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = SGD(step_size=0.1, num_steps=2, order=2, adapt=["*"])
    algorithm = build_from(MAML, Sinusoid(), MLP((1,), 1, [20]), inner)
    tasks = algorithm.sample_tasks(7, Stream(1))
    computing = meta_gradient(algorithm)
    expected, loss = computing.gradient(algorithm.theta, tasks)
    given = small_memory(monkeypatch, most=2)
    gradient, again = computing.gradient(algorithm.theta, tasks)
    for name, value in expected.items():
        torch.testing.assert_close(gradient[name], value, rtol=1e-4, atol=1e-6)
    assert again["loss"].item() == pytest.approx(loss["loss"].item(), rel=1e-5)
    assert computing.execution.task_chunk == 1
    assert sorted(set(given), reverse=True) == [7, 3, 1]
    given.clear()
    computing.gradient(algorithm.theta, tasks)
    assert set(given) == {1}, "it does not try again what failed"


def test_one_task_that_does_not_fit_names_what_can_be_done(monkeypatch: pytest.MonkeyPatch) -> None:
    small_memory(monkeypatch, most=0)
    algorithm = build_from(MAML, Sinusoid(), MLP((1,), 1, [20]), SGD(0.1, 1, 2, ["*"]))
    with pytest.raises(MamlError, match=r"one task alone does not fit .* hardware.recompute=true, precision=bf16"):
        step(algorithm, algorithm.sample_tasks(4, Stream(1)))


def test_evaluation_shrinks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm = build_from(MAML, Sinusoid(), MLP((1,), 1, [20]), SGD(0.1, 1, 2, ["*"]))
    evaluation = Evaluation(num_tasks=9, num_steps=2)
    (expected,), *_ = evaluation(algorithm)
    small_memory(monkeypatch, most=4)
    (curve,), *_ = evaluation(algorithm)
    torch.testing.assert_close(curve.values, expected.values)


def test_run_records_the_chunk_that_it_ended_with(tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    few = ("num_iterations=10", "precision=float64")
    whole = tiny.in_folder("whole").run(*few)
    small_memory(monkeypatch, most=1)
    folder: Path = tiny.run(*few)
    assert checkpoint.load(folder / "checkpoint.pt")["execution"]["task_chunk"] == 1
    for name, value in checkpoint_tensors(whole).items():
        torch.testing.assert_close(checkpoint_tensors(folder)[name], value)


_FAULTS = """
import resource, torch
from maml.hardware.memory import keep_freed_memory
torch.set_num_threads(1)
keep_freed_memory()
for _ in range(10):  # until the heap stops growing
    torch.ones(2**24).sum()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24).sum()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


_OLD_GLIBC = """import ctypes
from types import SimpleNamespace
mallopt = ctypes.CDLL(None).mallopt
refuse = lambda option, value: 0 if (option, value > 2**25) == (-3, True) else mallopt(option, value)
ctypes.CDLL = lambda name: SimpleNamespace(mallopt=refuse)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
@pytest.mark.parametrize("before", ["", _OLD_GLIBC])
def test_freed_memory_is_reused(before: str) -> None:
    program = _FAULTS.replace("torch.set_num_threads(1)\n", f"torch.set_num_threads(1)\n{before}")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 5 * 2**24 * 4 / resource.getpagesize()  # without it, the pages of ten tensors


def test_memory_is_that_of_the_container_if_it_has_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "_CONTAINER_LIMITS", (str(limit),))
    ask = memory.machine_memory.__wrapped__
    whole = ask()
    for text, expected in (("max", whole), (str(2**30), 2**30), (str(2**62), whole)):
        limit.write_text(text)
        assert ask() == expected


def test_what_cannot_fit_is_refused_before_it_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "machine_memory", lambda: 8 * 2**30)
    memory.check_memory(8 * 2**30, "a thing")
    with pytest.raises(TooLarge, match=r"a thing takes at least 1,024 GiB, but this machine has 8 GiB"):
        memory.check_memory(2**40, "a thing")
    with pytest.raises(TooLarge, match=r"a draw of 1,000,000,000,000 random numbers"):
        Stream(0).bits((10**6, 10**6))
