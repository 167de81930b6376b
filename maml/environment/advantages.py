"""Advantages over a linear baseline (docs/protocol.md#advantages; Duan et al. 2016)."""

from __future__ import annotations

import torch
from torch import Tensor

from maml.environment.rollouts import Episodes
from maml.hardware import distributed

_MAX_OBSERVATION = 10.0
_TIME_UNIT = 100.0  # timesteps
_RIDGE = 1e-5
_MAX_FITS = 5


def advantages(episodes: Episodes, pooled: bool) -> Tensor:
    """Returns the standardised advantage of each action, ``(T, N)``; 0 for padding.

    The baseline is fitted to the same episodes, separately for each task and gradient step. The value at the end of an
    episode is 0, for every kind of end.

    Args:
        episodes: episodes of T tasks.
        pooled: whether all tasks share one baseline, one mean and one standard deviation.
    """
    times = torch.arange(episodes.times.shape[1], device=episodes.times.device)
    taken = times < episodes.lengths.unsqueeze(1)
    result = torch.zeros_like(episodes.returns_to_go)
    each = torch.eye(len(taken), dtype=torch.bool, device=taken.device).unsqueeze(-1)
    groups = [taken] if pooled else [taken & task for task in each]
    total = distributed.all_reduce_sum if pooled else list  # all tasks: also those of the other processes
    for group in groups:
        inputs = features(episodes.observations[group], episodes.times[group])
        returns = episodes.returns_to_go[group].double()
        gram, moments = total([inputs.T @ inputs, inputs.T @ returns])
        advantage = returns - inputs @ fit_baseline(gram, moments)
        count, added = total([torch.full_like(moments[0], len(advantage)), advantage.sum()])
        advantage = advantage - added / count
        (squares,) = total([advantage.square().sum()])
        advantage = advantage / ((squares / count).sqrt() + 1e-8)
        result[group] = advantage.to(result.dtype)
    return result


def features(observations: Tensor, times: Tensor) -> Tensor:
    """Returns the baseline's inputs, ``(..., 2 O + 4)``, float64: o, o^2, t, t^2, t^3 and 1, with o clipped."""
    clipped = observations.double().clamp(-_MAX_OBSERVATION, _MAX_OBSERVATION)
    time = times.double().unsqueeze(-1) / _TIME_UNIT
    return torch.cat([clipped, clipped.square(), time, time**2, time**3, torch.ones_like(time)], dim=-1)


def num_features(observation_dim: int) -> int:
    """Returns the number of the baseline's inputs for observations of a length."""
    return 2 * observation_dim + 4


def fit_baseline(gram: Tensor, moments: Tensor) -> Tensor:
    """Returns the coefficients of a least-squares fit, with the smallest ridge that gives finite coefficients.

    Args:
        gram: X^T X of the inputs, ``(F, F)``.
        moments: X^T y, ``(F,)``.
    """
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for attempt in range(_MAX_FITS):
        # Not lstsq: on a CPU its pivots depend on uninitialised memory, and it crashes on a NaN.
        coefficients = torch.linalg.solve_ex(gram + _RIDGE * 10**attempt * identity, moments).result
        if coefficients.isfinite().all():
            break
    return coefficients
