"""Collects whole episodes with the policies of many tasks, in all environments at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from maml.environment.base import Environments
from maml.errors import Diverged
from maml.hardware import distributed
from maml.seeding import Stream

Policy = Callable[[Tensor], Tensor]
"""Maps observations, ``(T, W, O)``, to the outputs that the environments' `Distribution` takes, ``(T, W, D)``."""

DrawEpisodes = Callable[[int, int], tuple[Tensor, Stream]]
"""Maps two episode numbers to the goals, ``(M, G)``, and the streams of the episodes from the first to the second.

The streams' key is ``(M,)``. The second episode does not count, as in a range.
"""


class Episodes(NamedTuple):
    """Episodes of T tasks. The episodes of a task are concatenated, to at most N timesteps; the rest is zero.

    Attributes:
        observations: the observation before each action, ``(T, N, O)``.
        actions: actions as drawn, before clipping, ``(T, N, A)``.
        outputs: outputs of the policy that drew the actions, ``(T, N, D)``.
        returns_to_go: discounted sum of this reward and all later rewards of the episode, ``(T, N)``.
        times: number of steps since the episode began, ``(T, N)``, int64.
        lengths: number of timesteps of all episodes together, ``(T,)``, int64.
        total_reward: undiscounted sum of the rewards of all episodes, ``(T,)``.
        num_episodes: number of episodes, ``(T,)``, int64.
        num_unstable: number of episodes that ended because the simulation became unstable, ``(T,)``, int64.
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

    The result is the same as with one environment per task, episode after episode. The episodes that are needed in any
    case are started at once; where episodes end early, more are started.

    Args:
        environments: the domain's environments.
        policy: computes the policies of all tasks.
        goals: one goal for each task, ``(T, G)``.
        stream: one stream for each task: its key is ``(T,)``. An episode depends on the stream, the episode's number
            and the policy only.
        num_rollouts: R, number of rollouts per task.
        horizon: H, number of timesteps after which an episode ends.
        discount: discount of the rewards.

    Raises:
        Diverged: if the policy's outputs are not finite.
    """
    wanted = num_rollouts * horizon
    # The last episode may begin one timestep before the wanted number.
    filled = _no_episodes(environments, goals, wanted + horizon - 1)
    while True:
        missing = (wanted - filled.lengths).clamp(min=0)
        if not bool(missing.any()):
            return _cut_padding(filled)
        needed = -(-missing // horizon)
        wave = _run_wave(environments, policy, goals, stream, filled.num_episodes, needed, horizon)
        _append(filled, wave, needed, discount)


@torch.no_grad()
def collect_single_episodes(
    environments: Environments, policy: Policy, draw: DrawEpisodes, num_timesteps: int, horizon: int, discount: float
) -> Episodes:
    """Collects whole episodes, each with its own goal, until all of them together have ``num_timesteps`` timesteps.

    The result is the same as with one environment that is reset with the next goal whenever an episode ends. It is
    computed as in `collect_episodes`. The processes of a run share the episodes and count the timesteps of all of them.

    Args:
        environments: the domain's environments.
        policy: computes the one policy, for any number T of episodes.
        draw: gives each episode its goal and its stream.
        num_timesteps: number of timesteps, summed over all processes.
        horizon: H, number of timesteps after which an episode ends.
        discount: discount of the rewards.

    Returns:
        This process's episodes, as T tasks with one episode each.

    Raises:
        Diverged: if the policy's outputs are not finite.
    """
    rank, num_processes = distributed.rank(), distributed.world_size()
    parts, started, missing = list[Episodes](), 0, num_timesteps
    while missing > 0:
        count = -(-missing // horizon)
        begin, end = (started + share * count // num_processes for share in (rank, rank + 1))
        goals, stream = draw(begin, end)
        part = _no_episodes(environments, goals, horizon)
        if begin < end:
            one_each = torch.ones(end - begin, dtype=torch.int64, device=goals.device)
            wave = _run_wave(environments, policy, goals, stream, part.num_episodes, one_each, horizon)
            _append(part, wave, one_each, discount)
        (collected,) = distributed.all_reduce_sum([part.lengths.sum()])
        parts.append(part)
        started, missing = started + count, missing - int(collected)
    return _cut_padding(Episodes(*map(torch.cat, zip(*parts, strict=True))))


def _no_episodes(environments: Environments, goals: Tensor, capacity: int) -> Episodes:
    """Returns space for ``capacity`` timesteps of each task, without episodes."""
    count, dim, device, distribution = len(goals), environments.observation_dim, goals.device, environments.distribution
    return Episodes(
        observations=torch.zeros(count, capacity, dim, device=device),
        actions=torch.zeros(count, capacity, distribution.action_dim, device=device),
        outputs=torch.zeros(count, capacity, distribution.num_outputs, device=device),
        returns_to_go=torch.zeros(count, capacity, device=device),
        times=torch.zeros(count, capacity, dtype=torch.int64, device=device),
        lengths=torch.zeros(count, dtype=torch.int64, device=device),
        total_reward=torch.zeros(count, device=device),
        num_episodes=torch.zeros(count, dtype=torch.int64, device=device),
        num_unstable=torch.zeros(count, dtype=torch.int64, device=device),
    )


def _cut_padding(filled: Episodes) -> Episodes:
    """Returns the episodes without the timesteps that no task has."""
    longest = int(filled.lengths.max())
    return Episodes(*(value[:, :longest] if value.dim() > 1 else value for value in filled))


class _Wave(NamedTuple):
    """M episodes that ran side by side, sorted by task, each with space for H timesteps; what is not filled is zero.

    Attributes:
        task: the number of each episode's task, ``(M,)``.
        observations: as in `Episodes`, ``(M, H, O)``.
        actions: ``(M, H, A)``.
        outputs: ``(M, H, D)``.
        rewards: ``(M, H)``.
        lengths: number of timesteps, ``(M,)``.
        unstable: whether the simulation became unstable, ``(M,)``.
    """

    task: Tensor
    observations: Tensor
    actions: Tensor
    outputs: Tensor
    rewards: Tensor
    lengths: Tensor
    unstable: Tensor


def _run_wave(
    environments: Environments,
    policy: Policy,
    goals: Tensor,
    stream: Stream,
    started: Tensor,
    needed: Tensor,
    horizon: int,
) -> _Wave:
    """Runs ``needed`` episodes of each task, ``(T,)``, of which ``started`` have run before."""
    device, distribution = goals.device, environments.distribution
    width = int(needed.max())
    slots = torch.arange(width, device=device)
    task, slot = (slots < needed.unsqueeze(1)).nonzero(as_tuple=True)  # M entries, sorted by task
    count = len(task)
    own = Stream(stream.key[task]).child(started[task] + slot)
    noise = distribution.noise(own.child("actions"), horizon)
    wave = _Wave(
        task=task,
        observations=torch.zeros(count, horizon, environments.observation_dim, device=device),
        actions=torch.zeros(count, horizon, distribution.action_dim, device=device),
        outputs=torch.zeros(count, horizon, distribution.num_outputs, device=device),
        rewards=torch.zeros(count, horizon, device=device),
        lengths=torch.full((count,), horizon, device=device),
        unstable=torch.zeros(count, dtype=torch.bool, device=device),
    )
    seen = torch.zeros(len(goals), width, environments.observation_dim, device=device)
    places = task * width + slot
    living = torch.arange(count, device=device)
    current = environments.reset(goals[task], own.child("reset"))
    for time in range(horizon):
        seen.view(-1, seen.shape[-1])[places[living]] = current
        output = policy(seen).flatten(0, 1)[places[living]]
        action = distribution.sample(output, noise[living, time])
        if not bool(action.isfinite().all()):
            raise Diverged(
                f"the policy's action is not finite in {int((~action.isfinite()).any(-1).sum())} of {len(living)} "
                "environments: adaptation or the meta-update has diverged. Lower inner.step_size, in meta-test "
                "evaluation.step_size, or else outer.step_size or outer.max_kl"
            )
        # Recorded before the step, because environments may change their observations and the actions in place.
        wave.observations[living, time], wave.actions[living, time] = current, action
        wave.outputs[living, time] = output
        step = environments.step(action, living)
        wave.rewards[living, time] = step.rewards
        blown_up = step.unstable.bool()  # as a mask: numbers 0 and 1 would be indices
        over = step.terminated.bool() | blown_up
        current = step.observations
        if bool(over.any()):
            wave.lengths[living[over]] = time + 1
            wave.unstable[living[blown_up]] = True
            living, current = living[~over], current[~over]
            if len(living) == 0:
                break
    return wave


def _append(filled: Episodes, wave: _Wave, needed: Tensor, discount: float) -> None:
    """Puts a wave's episodes, ``needed`` of each task, behind the timesteps that each task has."""
    horizon, task, lengths, device = wave.rewards.shape[1], wave.task, wave.lengths, wave.rewards.device
    returns = wave.rewards.clone()
    for time in range(horizon - 2, -1, -1):
        returns[:, time] += discount * returns[:, time + 1]

    times = torch.arange(horizon, device=device).expand(len(task), -1)
    taken = times < lengths.unsqueeze(1)  # (M, H)
    # An episode is put after the task's timesteps so far, and after the task's earlier episodes of this wave.
    before = lengths.cumsum(0) - lengths
    first = torch.searchsorted(task, torch.arange(len(needed), device=device)).clamp(max=len(task) - 1)
    begin = filled.lengths[task] + before - before[first][task]
    rows, columns = task.unsqueeze(1).expand_as(times)[taken], (begin.unsqueeze(1) + times)[taken]
    for name, value in {
        "observations": wave.observations,
        "actions": wave.actions,
        "outputs": wave.outputs,
        "returns_to_go": returns,
        "times": times,
    }.items():
        getattr(filled, name)[rows, columns] = value[taken]
    filled.lengths.index_add_(0, task, lengths)
    filled.total_reward.index_add_(0, task, wave.rewards.sum(1))
    filled.num_episodes.add_(needed)
    filled.num_unstable.index_add_(0, task, wave.unstable.to(torch.int64))
