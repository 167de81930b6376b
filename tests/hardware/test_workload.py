"""The workload that a domain states, and what a machine makes of it."""

from __future__ import annotations

import os

import pytest
import torch

from maml.config.compose import compose_experiment
from maml.config.schema import build_without_data
from maml.hardware import base
from maml.hardware.base import Execution, Hardware
from maml.hardware.workload import Workload
from tests.training.test_meta_gradient import FixedExamples

# Threads, task chunk, and whether long runs are compiled, on a CPU with five cores. It is what the committed runs had,
# but for the threads of rollouts, which change no number, and for the chunk of Omniglot 5-way 5-shot, which was 1.
CHOSEN = {
    "sinusoid_10shot": (1, None, True),
    "sinusoid_sequence": (1, None, True),
    "omniglot_5way_1shot": (5, 8, False),
    "omniglot_5way_5shot": (5, 2, False),
    "omniglot_20way_1shot": (5, 2, False),
    "omniglot_20way_reptile": (5, 1, False),
    "cifar_fs_5way_1shot": (5, 1, False),
    "cifar_fs_5way_1shot_finetune": (5, 2, False),
    "mini_imagenet_5way_1shot": (5, 1, False),
    "point_navigation_maml": (5, 2, False),
    "point_navigation_oracle": (5, 40, False),
    "cheetah_velocity_maml": (5, 2, False),
    "ant_direction_maml": (5, 1, False),
    "ant_direction_pretrain": (5, 20, False),
}


def test_new_domain_is_taken_for_one_of_small_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    domain = FixedExamples((3,), classes=False)
    assert domain.workload == Workload()
    assert Hardware().choose(domain.workload, 100, {}) == Execution(1, None, False)
    assert Hardware().choose(domain.workload, 5000, {}) == Execution(1, None, True)


@pytest.mark.parametrize("experiment", CHOSEN)
def test_execution_of_an_experiment_is_the_one_its_runs_had(experiment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(5)))
    monkeypatch.setattr(base, "onednn_is_faster", lambda: False)
    monkeypatch.setattr(base, "library", lambda: object())
    domain = build_without_data(compose_experiment(experiment).domain)
    threads, chunk, compiled = CHOSEN[experiment]
    for num_iterations in (4999, 5000):
        compiles, is_image = compiled and num_iterations == 5000, domain.workload.measure_chunk
        expected = Execution(threads, chunk, compiles, kernels=is_image, thread_chunks=domain.on_policy)
        assert Hardware("cpu").choose(domain.workload, num_iterations, {}) == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    rollouts = domain.on_policy
    expected = Execution(threads, None, False, cuda_graph=not rollouts, device="cuda")
    assert Hardware("cuda").choose(domain.workload, 5000, {}) == expected
