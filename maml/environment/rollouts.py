"""Collects whole episodes of many tasks' policies, all environments at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from maml.environment.base import Environments
from maml.errors import Diverged
from maml.seeding import Stream

Policy = Callable[[Tensor], Tensor]
"""Observations ``(T, W, O)`` to the means of A actions and their log standard deviations, ``(T, W, 2A)``."""


class Episodes(NamedTuple):
    """What the policies of T tasks did: their episodes one behind the other, at most N timesteps in all.

    Attributes:
        observations: the observation before each action, ``(T, N, O)``.
        actions: as drawn, before any clipping, ``(T, N, A)``.
        outputs: outputs of the policy that drew them, ``(T, N, 2A)``.
        returns_to_go: discounted sum of this and all later rewards of the episode, ``(T, N)``.
        times: steps since the episode began, ``(T, N)``, int64.
        lengths: number of filled timesteps, ``(T,)``, int64; all later entries are zero.
        total_reward: undiscounted sum over all episodes, ``(T,)``.
        num_episodes: number of episodes, ``(T,)``, int64.
        num_unstable: number of episodes that ended because the simulation blew up, ``(T,)``, int64.
    """

    observations: Tensor
    actions: Tensor
    outputs: Tensor
    returns_to_go: Tensor
    times: Tensor
    lengths: Tensor
    total_reward: Tensor
    num_episodes: Tensor
    num_unstable: Tensor


@torch.no_grad()
def collect_episodes(
    environments: Environments,
    policy: Policy,
    goals: Tensor,
    stream: Stream,
    num_rollouts: int,
    horizon: int,
    discount: float,
) -> Episodes:
    """Collects whole episodes until each task has ``num_rollouts * horizon`` timesteps (docs/protocol.md#rollouts).

    They are those that one environment per task would give, episode after episode: as many are started at once as are
    needed in any case, and more where episodes ended early.

    Args:
        environments: those of the domain.
        policy: the policies of all tasks.
        goals: one per task, ``(T, G)``.
        stream: one for each task, its key ``(T,)``; an episode depends on it, its number and the policy.
        num_rollouts: R.
        horizon: H.
        discount: discount of future rewards.

    Raises:
        Diverged: if the policy's outputs are not finite.
    """
    count, device = goals.shape[0], goals.device
    wanted = num_rollouts * horizon
    capacity = wanted + horizon - 1  # the last episode may begin one step short of what is wanted
    dim, size = environments.observation_dim, environments.action_dim
    filled = Episodes(
        observations=torch.zeros(count, capacity, dim, device=device),
        actions=torch.zeros(count, capacity, size, device=device),
        outputs=torch.zeros(count, capacity, 2 * size, device=device),
        returns_to_go=torch.zeros(count, capacity, device=device),
        times=torch.zeros(count, capacity, dtype=torch.int64, device=device),
        lengths=torch.zeros(count, dtype=torch.int64, device=device),
        total_reward=torch.zeros(count, device=device),
        num_episodes=torch.zeros(count, dtype=torch.int64, device=device),
        num_unstable=torch.zeros(count, dtype=torch.int64, device=device),
    )
    while True:
        missing = (wanted - filled.lengths).clamp(min=0)
        needed = -(-missing // horizon)
        width = int(needed.max())
        if width == 0:
            longest = int(filled.lengths.max())
            return Episodes(*(value[:, :longest] if value.dim() > 1 else value for value in filled))
        _collect_wave(environments, policy, goals, stream, needed, width, horizon, discount, filled)


def _collect_wave(
    environments: Environments,
    policy: Policy,
    goals: Tensor,
    stream: Stream,
    needed: Tensor,
    width: int,
    horizon: int,
    discount: float,
    filled: Episodes,
) -> None:
    """Adds ``needed`` episodes of each task, ``(T,)``, the most of which is ``width``, to what is filled."""
    device = goals.device
    slots = torch.arange(width, device=device)
    task, slot = (slots < needed.unsqueeze(1)).nonzero(as_tuple=True)  # of M environments, task by task
    count = len(task)
    episode = filled.num_episodes[task] + slot
    own = Stream(stream.key[task]).child(episode)
    noise = own.child("actions").normal((horizon, environments.action_dim))

    observations = torch.zeros(count, horizon, environments.observation_dim, device=device)
    actions = torch.zeros_like(noise)
    outputs = torch.zeros(count, horizon, 2 * environments.action_dim, device=device)
    rewards = torch.zeros(count, horizon, device=device)
    lengths = torch.full((count,), horizon, device=device)
    unstable = torch.zeros(count, dtype=torch.bool, device=device)

    seen = torch.zeros(len(goals), width, environments.observation_dim, device=device)
    places = task * width + slot
    living = torch.arange(count, device=device)
    current = environments.reset(goals[task], own.child("reset"))
    for time in range(horizon):
        seen.view(-1, seen.shape[-1])[places[living]] = current
        output = policy(seen).flatten(0, 1)[places[living]]
        mean, log_std = output.chunk(2, dim=-1)
        action = torch.addcmul(mean, log_std.exp(), noise[living, time])
        if not bool(action.isfinite().all()):
            raise Diverged(
                f"the policy's action is not finite in {int((~action.isfinite()).any(-1).sum())} of {len(living)} "
                "environments: adaptation or the meta-update has diverged. Lower inner.step_size, in meta-test "
                "evaluation.step_size, or else outer.step_size or outer.max_kl"
            )
        step = environments.step(action, living)
        observations[living, time], actions[living, time], outputs[living, time] = current, action, output
        rewards[living, time] = step.rewards
        over = step.terminated | step.unstable
        current = step.observations
        if bool(over.any()):
            lengths[living[over]] = time + 1
            unstable[living[step.unstable]] = True
            living, current = living[~over], current[~over]
            if len(living) == 0:
                break

    returns = rewards.clone()
    for time in range(horizon - 2, -1, -1):
        returns[:, time] += discount * returns[:, time + 1]

    times = torch.arange(horizon, device=device).expand(count, -1)
    taken = times < lengths.unsqueeze(1)  # (M, H)
    # Where an episode begins: behind what the task holds already, and behind its earlier episodes of this wave.
    before = lengths.cumsum(0) - lengths
    first = torch.searchsorted(task, torch.arange(len(goals), device=device)).clamp(max=count - 1)
    begin = filled.lengths[task] + before - before[first][task]
    rows, columns = task.unsqueeze(1).expand_as(times)[taken], (begin.unsqueeze(1) + times)[taken]
    for name, value in {
        "observations": observations,
        "actions": actions,
        "outputs": outputs,
        "returns_to_go": returns,
        "times": times,
    }.items():
        getattr(filled, name)[rows, columns] = value[taken]
    filled.lengths.index_add_(0, task, lengths)
    filled.total_reward.index_add_(0, task, rewards.sum(1))
    filled.num_episodes.add_(needed)
    filled.num_unstable.index_add_(0, task, unstable.to(torch.int64))
