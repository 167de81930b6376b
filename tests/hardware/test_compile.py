"""The compiled meta-gradient."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from maml.algorithm.maml import MAML
from maml.domain.sinusoid import Sinusoid
from maml.hardware import compile
from maml.inner.sgd import SGD
from maml.model.mlp import MLP
from maml.seeding import Stream
from maml.types import num_tasks
from tests.algorithms import build_from, meta_gradient
from tests.runs import ROOT


def sinusoid() -> MAML:
    inner = SGD(step_size=0.01, num_steps=1, order=2, adapt=["*"])
    return build_from(MAML, Sinusoid(), MLP((1,), 1, [6]), inner)


def chunk_sums(algorithm: MAML) -> compile.ChunkGradient:
    return lambda params, tasks: meta_gradient(algorithm).sums(params, tasks, num_tasks(tasks))


def test_compiled_gradient_equals_eager_on_new_tasks() -> None:
    algorithm = sinusoid()
    first, second = (algorithm.domain.sample_tasks(3, Stream(seed)) for seed in (1, 2))
    compiled = compile.CompiledFunction(chunk_sums(algorithm))
    compiled(algorithm.theta, first)
    for ours, expected in zip(
        compiled(algorithm.theta, second), chunk_sums(algorithm)(algorithm.theta, second), strict=True
    ):
        assert list(ours) == list(expected)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_failing_compiler_is_announced_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("no C++ compiler\nlong story")

    monkeypatch.setattr(compile, "make_fx", broken)
    algorithm = sinusoid()
    tasks = algorithm.domain.sample_tasks(3, Stream(1))
    compiled = compile.CompiledFunction(chunk_sums(algorithm))
    with caplog.at_level(logging.WARNING):
        results = [compiled(algorithm.theta, tasks) for _ in range(2)]
    assert [record.message for record in caplog.records] == [
        "compiling failed, so the run goes on without it (slower, same mathematics): no C++ compiler"
    ]
    (ours, _), (expected, _) = results[1], chunk_sums(algorithm)(algorithm.theta, tasks)
    assert all(torch.equal(ours[name], value) for name, value in expected.items())


def test_compiling_is_announced_once(capsys: pytest.CaptureFixture[str]) -> None:
    algorithm = sinusoid()
    compiled = compile.CompiledFunction(chunk_sums(algorithm))
    for seed in (1, 2):
        compiled(algorithm.theta, algorithm.domain.sample_tasks(3, Stream(seed)))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("compiling, about ")
    assert line.endswith(" the first time, then mostly from a cache")


_COMPILE = """
import torch
from maml.hardware.compile import CompiledFunction
compiled = CompiledFunction(lambda params, tasks: ({"a": params["a"] * tasks["x"].sin().sum()}, {}))
compiled({"a": torch.ones(7)}, {"x": torch.arange(5.0)})
print(compiled.failed)
"""


@pytest.mark.slow
def test_library_that_a_killed_compiler_left_half_written_is_made_again(tmp_path: Path) -> None:
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", _COMPILE], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == "False", done.stderr
        libraries = list(tmp_path.rglob("*.main.so"))
        assert libraries
        for library in libraries:
            library.write_bytes(b"")


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="without /proc, compilers are not found")
def test_interrupted_compilation_leaves_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    compilers = list[subprocess.Popen[bytes]]()

    def interrupted(*args: object) -> None:
        assert compile.is_compiling()
        compilers.append(subprocess.Popen(["sleep", "60"]))
        raise KeyboardInterrupt

    monkeypatch.setattr(compile, "make_fx", interrupted)
    algorithm = sinusoid()
    with subprocess.Popen(["sleep", "60"]) as other:
        with pytest.raises(KeyboardInterrupt):
            compile.CompiledFunction(chunk_sums(algorithm))(
                algorithm.theta, algorithm.domain.sample_tasks(3, Stream(1))
            )
        assert compilers[0].wait(timeout=10) < 0
        assert other.poll() is None, "a process that was there before goes on"
        other.kill()
    assert not compile.is_compiling()
