"""No meta-learning: theta keeps its initial value."""

from __future__ import annotations

import torch

from maml.algorithm.random_init import RandomInit
from maml.config.compose import compose
from maml.domain.sinusoid import Sinusoid
from maml.inner.sgd import SGD
from maml.model.mlp import MLP
from maml.record.run_files import read_json
from maml.seeding import Stream
from tests import algorithms
from tests.algorithms import build_from
from tests.runs import TinyRuns, checkpoint_tensors


def test_no_iteration_changes_a_bit_of_theta() -> None:
    model = MLP((1,), 1, [6])
    inner = SGD(step_size=0.1, num_steps=1, order=2, adapt=["*"])
    algorithm = build_from(RandomInit, Sinusoid(), model, inner, seed=3)
    for iteration in range(3):
        tasks = algorithm.sample_tasks(4, Stream(iteration))
        _, metrics = algorithms.gradient(algorithm, algorithm.theta, tasks)
        assert algorithms.step(algorithm, tasks)["loss"] == metrics["loss"]
    drawn = model.init(Stream(3))
    assert all(torch.equal(algorithm.theta[name], value) for name, value in drawn.items())


def test_config_trains_for_no_iteration() -> None:
    assert compose(["algorithm=random_init"])[0].num_iterations == 0


def test_run_of_no_iteration_keeps_and_evaluates_theta_as_drawn(tiny: TinyRuns) -> None:
    none = tiny.run("algorithm=random_init", "num_iterations=0")
    report = read_json(none / "report.json")
    assert report is not None and report["iteration"] == 0
    assert len(report["curves"][0]["steps"]) == 3
    some = tiny.run("algorithm=random_init", "num_iterations=4")
    assert all(torch.equal(checkpoint_tensors(some)[name], value) for name, value in checkpoint_tensors(none).items())
