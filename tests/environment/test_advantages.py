"""The baseline and the advantages against NumPy, one task at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from maml.environment.advantages import advantages, features, fit_baseline
from maml.environment.rollouts import Episodes

EPISODES = [[7, 4, 7], [7, 7], [1, 2, 5, 7, 3]]  # episode lengths of each task


def make_episodes(dtype: torch.dtype = torch.float64) -> Episodes:
    """Returns rollouts of three tasks with unequal lengths; some observations exceed the clipping bound."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([sum(task) for task in EPISODES])
    longest = int(lengths.max()) + 2  # two timesteps more than any task has
    taken = torch.arange(longest) < lengths.unsqueeze(1)
    observations = 6 * torch.randn(3, longest, 2, generator=generator, dtype=torch.float64)
    times = torch.zeros(3, longest, dtype=torch.int64)
    for row, task in zip(times, EPISODES, strict=True):
        row[: sum(task)] = torch.cat([torch.arange(length) for length in task])
    returns = torch.tensor([[-5.0], [40.0], [0.0]]) + torch.randn(3, longest, generator=generator, dtype=torch.float64)
    unused: dict[str, Any] = dict.fromkeys(["actions", "outputs", "total_reward", "num_episodes", "num_unstable"])
    return Episodes(
        observations=(observations * taken.unsqueeze(-1)).to(dtype),
        returns_to_go=(returns * taken).to(dtype),
        times=times,
        lengths=lengths,
        **unused,
    )


def plain_features(observation: np.ndarray, time: int) -> list[float]:
    clipped = np.clip(observation, -10, 10)
    t = time / 100
    return [*clipped, *clipped**2, t, t**2, t**3, 1.0]


def plain_advantages(episodes: Episodes, tasks: list[int]) -> list[np.ndarray]:
    """Returns the advantages of tasks that share one baseline and one standardisation."""
    rows, targets = [], []
    for task in tasks:
        for step in range(int(episodes.lengths[task])):
            observation = episodes.observations[task, step].double().numpy()
            rows.append(plain_features(observation, int(episodes.times[task, step])))
            targets.append(episodes.returns_to_go[task, step].item())
    x, y = np.array(rows), np.array(targets)
    baseline = x @ np.linalg.solve(x.T @ x + 1e-5 * np.eye(x.shape[1]), x.T @ y)
    advantage = y - baseline
    standard = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    return np.split(standard, np.cumsum([int(episodes.lengths[task]) for task in tasks])[:-1])


def test_features_are_the_papers() -> None:
    observations = torch.tensor([[1.5, -20.0], [0.0, 11.0]])
    times = torch.tensor([0, 150])
    ours = features(observations, times)
    assert ours.dtype == torch.float64
    expected = [plain_features(o.double().numpy(), int(t)) for o, t in zip(observations, times, strict=True)]
    assert np.allclose(ours.numpy(), expected, rtol=1e-15, atol=0)
    assert ours[1].tolist() == [0.0, 10.0, 0.0, 100.0, 1.5, 2.25, 3.375, 1.0]


def test_baseline_is_the_ridge_regression() -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    targets = torch.randn(50, generator=generator, dtype=torch.float64)
    x, y = inputs.numpy(), targets.numpy()
    expected = np.linalg.solve(x.T @ x + 1e-5 * np.eye(6), x.T @ y)
    assert np.allclose(fit_baseline(inputs.T @ inputs, inputs.T @ targets).numpy(), expected, rtol=1e-10, atol=1e-12)


def test_baseline_of_collinear_features_is_finite() -> None:
    inputs = torch.ones(20, 5, dtype=torch.float64)
    targets = torch.full((20,), 3.0, dtype=torch.float64)
    coefficients = fit_baseline(inputs.T @ inputs, inputs.T @ targets)
    assert torch.allclose(inputs @ coefficients, targets, rtol=1e-6)
    assert coefficients.abs().max() < 1


@pytest.mark.parametrize("failures", [1, 4, 5])
def test_ridge_grows_where_the_fit_is_not_finite(failures: int, monkeypatch: pytest.MonkeyPatch) -> None:
    solve, ridges = torch.linalg.solve_ex, []

    def solve_with_failures(gram: Tensor, moments: Tensor) -> Any:
        ridges.append(gram[0, 0].item())
        return solve(gram, moments if len(ridges) > failures else torch.full_like(moments, torch.nan))

    monkeypatch.setattr(torch.linalg, "solve_ex", solve_with_failures)
    # The first feature is 0, so gram[0, 0] is the ridge.
    inputs = torch.tensor([[0.0, 1.0], [0.0, 2.0]], dtype=torch.float64)
    targets = torch.tensor([1.0, 2.0], dtype=torch.float64)
    coefficients = fit_baseline(inputs.T @ inputs, inputs.T @ targets)
    assert np.allclose(ridges, [1e-5 * 10**attempt for attempt in range(min(failures + 1, 5))])
    assert bool(coefficients.isfinite().all()) == (failures < 5), "five failures in a row give up"


@pytest.mark.parametrize("pooled", [False, True])
def test_advantages_equal_those_of_plain_loops(pooled: bool) -> None:
    episodes = make_episodes()
    ours = advantages(episodes, pooled)
    groups = [[0, 1, 2]] if pooled else [[0], [1], [2]]
    for group in groups:
        for task, expected in zip(group, plain_advantages(episodes, group), strict=True):
            steps = int(episodes.lengths[task])
            assert np.allclose(ours[task, :steps].numpy(), expected, rtol=1e-8, atol=1e-8)
            assert not ours[task, steps:].any()


def test_advantages_have_mean_zero_and_standard_deviation_one() -> None:
    episodes = make_episodes(torch.float32)
    ours = advantages(episodes, pooled=False)
    assert ours.dtype == torch.float32
    filled = torch.arange(ours.shape[1]) < episodes.lengths.unsqueeze(1)
    for values in (*(row[taken] for row, taken in zip(ours, filled, strict=True)), advantages(episodes, True)[filled]):
        assert abs(values.mean().item()) < 1e-6
        assert values.std(correction=0).item() == pytest.approx(1.0, abs=1e-5)


def test_baseline_is_fitted_to_the_rollouts_it_is_used_on() -> None:
    """Returns that are linear in the features give no advantage, except for a single changed timestep."""
    episodes = make_episodes()
    inputs = features(episodes.observations, episodes.times)
    explained = inputs @ torch.linspace(-2.0, 3.0, inputs.shape[-1], dtype=torch.float64)
    explained[0, 5] += 1.0
    ours = advantages(episodes._replace(returns_to_go=explained), pooled=False)[0, : sum(EPISODES[0])]
    assert ours.argmax() == 5
    assert ours[5] > 3 * ours[ours != ours[5]].abs().mean()


def test_same_rollouts_have_the_same_advantages_to_the_bit() -> None:
    first = advantages(make_episodes(), pooled=False)
    for _ in range(10):
        assert torch.equal(advantages(make_episodes(), pooled=False), first)


def test_tasks_have_baselines_of_their_own_unless_pooled() -> None:
    episodes = make_episodes()
    changed = episodes._replace(returns_to_go=episodes.returns_to_go.clone())
    changed.returns_to_go[2] *= -3
    for pooled in (False, True):
        before, after = advantages(episodes, pooled)[:2], advantages(changed, pooled)[:2]
        assert torch.equal(before, after) != pooled
