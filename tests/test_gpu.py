"""The same numbers on a GPU as on a CPU."""

from __future__ import annotations

import pytest
import torch

from maml.algorithm.base import Parts
from maml.algorithm.maml import MAML
from maml.domain.point_navigation import PointNavigation
from maml.domain.sinusoid import Sinusoid
from maml.inner.sgd import SGD
from maml.model.gaussian_policy import GaussianPolicy
from maml.model.mlp import MLP
from maml.outer.adam import Adam
from maml.outer.trpo import TRPO
from maml.seeding import Stream

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
    losses = []
    for device in ("cpu", "cuda"):
        stream = Stream(0, device)
        inner = SGD(step_size=0.01, num_steps=2, order=2, adapt=["*"])
        parts = Parts(Sinusoid(), lambda *shapes: MLP((1,), 1, [40, 40]), inner, Adam(), stream.child("init"))
        algorithm = MAML(parts)
        losses.append(
            [algorithm.step(algorithm.domain.sample_tasks(4, stream.child(t)))["loss"].item() for t in range(20)]
        )
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
        metrics.append([algorithm.step(algorithm.sample_tasks(4, stream.child(t))) for t in range(3)])
    for cpu, gpu in zip(*metrics, strict=True):
        assert cpu["return"].item() == pytest.approx(gpu["return"].item(), rel=1e-2)
        assert cpu["kl"].item() == pytest.approx(gpu["kl"].item(), rel=0.05)
