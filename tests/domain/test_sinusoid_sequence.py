"""Sinusoid sequences against a loop over their samples."""

from __future__ import annotations

import math

import torch

from maml.domain.sinusoid_sequence import SinusoidSequence
from maml.model.lstm import LSTM
from maml.seeding import Stream

MODEL = LSTM((10, 1), 1)


def test_sequences_lead_up_to_the_point_of_the_task() -> None:
    domain = SinusoidSequence(num_shots=3, num_query=4, sequence_length=6)
    tasks = domain.sample_tasks(2, Stream(1))
    data = domain.data(tasks, "query")
    assert (*data.x.shape[2:],) == domain.in_shape == (6, 1)
    assert (data.x.shape[:2], data.y.shape, data.num_shots) == ((2, 4), (2, 4, 1), 3)
    for task in range(2):
        amplitude, phase = tasks["amplitude"][task].item(), tasks["phase"][task].item()
        for example in range(4):
            last = tasks["query_x"][task, example].item()
            for position in range(6):
                expected = math.sin(last - 0.5 * (6 - position))
                assert math.isclose(data.x[task, example, position].item(), expected, abs_tol=1e-5)
            assert math.isclose(data.y[task, example].item(), amplitude * math.sin(last - phase), abs_tol=1e-5)


def test_sequences_alone_do_not_tell_the_target() -> None:
    domain = SinusoidSequence()
    tasks = domain.sample_tasks(2000, Stream(0))
    data = domain.data(tasks, "support")
    start, stop = (data.x[:, :, position].flatten() for position in (-2, -1))
    next_sample = 2 * math.cos(0.5) * stop - start  # exactly sin x at the query point
    torch.testing.assert_close(next_sample, torch.sin(tasks["support_x"]).flatten(), atol=1e-5, rtol=0)
    # A linear function of the last two samples fits one task exactly; no single one fits all tasks.
    features = torch.stack([data.x[:, :, -2], data.x[:, :, -1]], dim=2).squeeze(-1).double()
    targets = data.y.double()
    per_task_fit = features @ torch.linalg.lstsq(features, targets).solution
    shared_fit = features.flatten(0, 1) @ torch.linalg.lstsq(features.flatten(0, 1), targets.flatten(0, 1)).solution
    assert (per_task_fit - targets).square().mean() < 1e-6
    assert (shared_fit - targets.flatten(0, 1)).square().mean() > 1
