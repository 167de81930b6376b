"""On a GPU: the same numbers as on a CPU, whole iterations as graphs, and what happens without memory."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator
from typing import Literal

import pytest
import torch

from maml.algorithm.base import Parts
from maml.algorithm.maml import MAML
from maml.domain.base import Role
from maml.domain.point_navigation import PointNavigation
from maml.domain.sinusoid import Sinusoid
from maml.environment.distribution import Categorical
from maml.errors import Interrupted
from maml.hardware.base import Execution
from maml.hardware.kernels import use_kernels
from maml.inner.sgd import SGD
from maml.model.conv4 import Conv4
from maml.model.gaussian_policy import GaussianPolicy
from maml.model.mlp import MLP
from maml.outer.adam import Adam
from maml.outer.trpo import TRPO
from maml.record import checkpoint
from maml.seeding import Stream
from maml.training.cuda_graph import CudaGraphIteration
from maml.training.iteration import Iteration
from maml.types import Examples, Tasks
from tests import algorithms
from tests.runs import TinyRuns, assert_same_run, before_iteration, checkpoint_tensors
from tests.training.test_meta_gradient import NUM_WAYS, SMALL, FixedExamples, make

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def test_streams_draw_the_same_numbers_on_both_devices() -> None:
    cpu, gpu = (Stream(3, device).child("tasks") for device in ("cpu", "cuda"))
    assert torch.equal(cpu.bits((1000,)), gpu.bits((1000,)).cpu())
    assert torch.equal(cpu.uniform((1000,), -5.0, 5.0), gpu.uniform((1000,), -5.0, 5.0).cpu())
    assert torch.equal(cpu.choice((50,), 1100, 5), gpu.choice((50,), 1100, 5).cpu())


def test_training_on_a_gpu_follows_the_cpu() -> None:
    losses: list[list[float]] = []
    for device in ("cpu", "cuda"):
        stream = Stream(0, device)
        inner = SGD(step_size=0.01, num_steps=2, order=2, adapt=["*"])
        parts = Parts(Sinusoid(), lambda *shapes: MLP((1,), 1, [40, 40]), inner, Adam(), stream.child("init"))
        algorithm = MAML(parts)
        losses.append([])
        for t in range(20):
            tasks = algorithm.domain.sample_tasks(4, stream.child(t))
            losses[-1].append(algorithms.step(algorithm, tasks)["loss"].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_meta_rl_on_a_gpu_follows_the_cpu() -> None:
    metrics = []
    for device in ("cpu", "cuda"):
        stream = Stream(0, device)
        inner = SGD(step_size=0.1, num_steps=1, order=2, adapt=["*"])
        domain = PointNavigation(num_shots=5, horizon=20)
        parts = Parts(
            domain,
            lambda in_shape, out_dim: GaussianPolicy(in_shape, out_dim, [20, 20], activation="tanh"),
            inner,
            TRPO(),
            stream.child("init"),
        )
        algorithm = MAML(parts)
        metrics.append([algorithms.step(algorithm, algorithm.sample_tasks(4, stream.child(t))) for t in range(3)])
    for cpu, gpu in zip(*metrics, strict=True):
        assert cpu["return"].item() == pytest.approx(gpu["return"].item(), rel=1e-2)
        assert cpu["kl"].item() == pytest.approx(gpu["kl"].item(), rel=0.05)


class FixedImages(FixedExamples):
    """The same in float32."""

    def data(self, tasks: Tasks, role: Role, step: int = 0) -> Examples:
        given = super().data(tasks, role, step)
        return given._replace(x=given.x.float())


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("num_seeds", [1, 2])
def test_captured_iterations_follow_the_plain_ones(images: bool, num_seeds: int) -> None:
    device = torch.device("cuda", 0)

    def build() -> Iteration:
        streams = [Stream(seed, device) for seed in range(num_seeds)]
        algorithms = []
        for stream in streams:
            domain = FixedImages(SMALL, classes=True) if images else Sinusoid()
            parts = Parts(
                domain,
                lambda *shapes: Conv4(SMALL, NUM_WAYS, 8, "stride") if images else MLP((1,), 1, [40, 40]),
                SGD(step_size=0.01, num_steps=2, order=2, adapt=["*", "!*.shift"]),
                Adam(),
                stream.child("init"),
            )
            algorithms.append(MAML(parts))
        return Iteration(algorithms, streams, 4, Execution(1, None, False, cuda_graph=True, device="cuda"))

    plain, captured = build(), CudaGraphIteration(build())
    for number in range(1, 21):
        expected, its = plain(number), captured(number)
        for mine, theirs in zip(its, expected, strict=True):
            assert mine["loss"].item() == pytest.approx(theirs["loss"].item(), rel=1e-2)
    assert captured.replay is not None, "it was given up"


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """Switches our kernels on and off; they are off after the test. What other tests could not compile is forgotten."""
    monkeypatch.setattr("maml.hardware.kernels._programs", {})
    yield use_kernels
    use_kernels(False)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("chunk", [None, 1, 3])
@pytest.mark.parametrize("pooling", ["stride", "max"])
def test_kernels_of_a_gpu_give_the_plain_meta_gradient(
    pooling: Literal["stride", "max"],
    chunk: int | None,
    kernels: Callable[[bool], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    algorithm, theta, tasks = make(SMALL, True, Conv4(SMALL, NUM_WAYS, 6, pooling), num_steps=2, order=2)
    theta, tasks = ({name: value.cuda() for name, value in tensors.items()} for tensors in (theta, tasks))
    kernels(False)
    expected, _ = algorithms.gradient(algorithm, theta, tasks, chunk)
    expected_metrics = algorithms.evaluate(algorithm, theta, tasks)
    kernels(True)
    found, _ = algorithms.gradient(algorithm, theta, tasks, chunk)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(algorithms.evaluate(algorithm, theta, tasks), expected_metrics, rtol=1e-9, atol=1e-9)
    assert "cannot compile" not in caplog.text


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("chunk", [1, 3])
def test_run_with_kernels_of_a_gpu_is_not_given_up(
    chunk: int, tiny_images: TinyRuns, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_images.run("hardware=gpu", "hardware.kernels=true", f"hardware.task_chunk={chunk}")
    assert checkpoint.load(folder / "checkpoint.pt")["execution"]["kernels"]
    assert (folder / "report.json").exists()
    assert "cannot compile" not in caplog.text


@pytest.mark.parametrize("order", [(), ("inner.second_order_from=20",)])
def test_run_on_a_gpu_is_captured_and_resumes(
    order: tuple[str, ...], tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (*order, "hardware=gpu", "hardware.deterministic=true", "hardware.num_threads=auto")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        before_iteration(patch, 2, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        tiny.run(*settings)
    folder = tiny.run(*settings)
    assert checkpoint.load(folder / "checkpoint.pt")["execution"]["cuda_graph"], "it was given up"
    assert_same_run(folder, tiny.in_folder("whole").run(*settings))


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_run_in_less_precision_learns(precision: str, tiny_images: TinyRuns) -> None:
    folder = tiny_images.run("hardware=gpu", f"precision={precision}")
    assert all(torch.isfinite(value).all() for value in checkpoint_tensors(folder).values())


def test_memory_that_does_not_suffice_halves_the_chunk(tiny_images: TinyRuns) -> None:
    gc.collect()  # graphs of earlier tests keep their memory until they are deleted
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved() + 256 * 2**20
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    try:
        folder = tiny_images.run(
            "hardware=gpu", "hardware.task_chunk=all", "meta_batch_size=64", "model.num_filters=64", "num_iterations=3"
        )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert checkpoint.load(folder / "checkpoint.pt")["execution"]["task_chunk"] < 64


def test_choices_of_a_policy_are_the_same_on_both_devices() -> None:
    outputs, distribution = Stream(0).normal((1000, 5)), Categorical(5)
    noise = distribution.noise(Stream(1), 1000)
    choices = distribution.sample(outputs, noise)
    torch.use_deterministic_algorithms(True)  # it refuses operations without a deterministic version
    try:
        assert torch.equal(distribution.sample(outputs.cuda(), noise.cuda()).cpu(), choices)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(choices.unique()) == 5
