"""The base class of domains: default numbers of examples, and the default workload."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from maml.config.compose import compose_experiment
from maml.config.schema import build, without_data
from maml.domain.sinusoid import Sinusoid
from maml.hardware.base import Execution, Hardware
from maml.hardware.workload import Workload
from maml.seeding import Stream
from maml.types import Split, Tasks
from tests.runs import ROOT
from tests.training.test_meta_gradient import FixedExamples

# Threads, task chunk, and whether long runs are compiled, on a CPU with five cores, as in the committed runs.
CHOSEN = {
    "sinusoid_10shot": (1, None, True),
    "sinusoid_sequence": (1, None, True),
    "omniglot_5way_1shot": (5, 8, False),
    "omniglot_5way_5shot": (5, 1, False),
    "omniglot_20way_1shot": (5, 2, False),
    "omniglot_20way_reptile": (5, 1, False),
    "cifar_fs_5way_1shot": (5, 1, False),
    "cifar_fs_5way_1shot_finetune": (5, 2, False),
    "mini_imagenet_5way_1shot": (5, 1, False),
    "point_navigation_maml": (1, 2, False),
    "point_navigation_oracle": (1, 40, False),
    "cheetah_velocity_maml": (1, 2, False),
    "ant_direction_maml": (1, 1, False),
    "ant_direction_pretrain": (1, 20, False),
}


class Recorded(Sinusoid):
    """Records the numbers of examples that each draw is asked for."""

    def draw_tasks(self, num_tasks: int, stream: Stream, split: Split, num_shots: int, num_query: int) -> Tasks:
        self.asked = (num_tasks, stream.key, split, num_shots, num_query)
        return super().draw_tasks(num_tasks, stream, split, num_shots, num_query)


@pytest.mark.parametrize(
    ("own_query", "given", "expected"),
    [
        (None, (None, None), (7, 7)),
        (4, (None, None), (7, 4)),
        (4, (2, None), (2, 2)),
        (4, (None, 3), (7, 3)),
        (None, (2, 3), (2, 3)),
    ],
)
def test_numbers_of_examples_not_given_are_the_domains(
    own_query: int | None, given: tuple[int | None, int | None], expected: tuple[int, int]
) -> None:
    domain = Recorded(num_shots=7, num_query=own_query)
    tasks = domain.sample_tasks(2, Stream(3), "val", *given)
    assert domain.asked == (2, Stream(3).child("val").key, "val", *expected)
    assert (tasks["support_x"].shape[1], tasks["query_x"].shape[1]) == expected


def test_new_domain_is_taken_for_one_of_small_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    domain = FixedExamples((3,), classes=False)
    assert domain.workload == Workload()
    assert Hardware().choose(domain.workload, 100, {}) == Execution(1, None, False)
    assert Hardware().choose(domain.workload, 5000, {}) == Execution(1, None, True)


@pytest.mark.parametrize("experiment", CHOSEN)
def test_execution_of_an_experiment_is_the_one_its_runs_had(experiment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(5)))
    domain = build(without_data(compose_experiment(experiment).domain))
    threads, chunk, compiled = CHOSEN[experiment]
    for num_iterations in (4999, 5000):
        expected = Execution(threads, chunk, compiled and num_iterations == 5000)
        assert Hardware("cpu").choose(domain.workload, num_iterations, {}) == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    rollouts = domain.on_policy
    expected = Execution(1 if threads == 1 and not rollouts else 5, None, False, cuda_graph=not rollouts, device="cuda")
    assert Hardware("cuda").choose(domain.workload, 5000, {}) == expected


@pytest.mark.parametrize("experiment", ["sinusoid_10shot", "point_navigation_maml"])
def test_domain_that_reads_nothing_is_the_same_without_data(experiment: str) -> None:
    config = compose_experiment(experiment).domain
    bare, domain = build(without_data(config)), build(config)
    assert type(bare) is type(domain)
    bare.check_available()
    first, second = (each.sample_tasks(2, Stream(0)) for each in (bare, domain))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_core_does_not_ask_which_domain_it_has() -> None:
    for module in ("hardware/base.py", "training/autotune.py", "evaluation.py", "paper/plan.py"):
        source = (Path(ROOT) / "maml" / module).read_text()
        assert "in_shape" not in source, module
        assert "isinstance(domain" not in source and "maml.domain.r" not in source, module
