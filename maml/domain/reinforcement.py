"""Reinforcement learning (section 4.2): a task is a goal, its data are rollouts of the policy, its loss REINFORCE's."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import gymnasium
import torch
from torch import Tensor

from maml.domain.base import Domain, Metrics, Role
from maml.environment.advantages import advantages
from maml.environment.base import Environments, TellGoal
from maml.environment.rollouts import collect_episodes
from maml.hardware.workload import Workload
from maml.model.base import Model
from maml.seeding import Stream
from maml.types import Count, Discount, MatrixVectorProduct, Params, Split, Tasks

# Timesteps of a chunk on a CPU, so that a hidden layer's values stay in its cache.
_CHUNK_TIMESTEPS = 4000


class Rollouts(NamedTuple):
    """Rollouts of T tasks, their episodes one behind the other.

    Attributes:
        observations: in front of each action, ``(T, N, O)``.
        actions: as drawn, ``(T, N, A)``.
        outputs: outputs of the policy that drew them: A means, then A log standard deviations, ``(T, N, 2A)``.
        advantages: advantages of the actions, standardised, ``(T, N)``.
        weights: weight of each timestep in the mean over its task, ``(T, N)``: 1 / timesteps, 0 where there is none.
        returns: undiscounted, mean over episodes, ``(T,)``.
        lengths: timesteps per episode, mean, ``(T,)``.
        num_unstable: episodes that ended because the simulation blew up, ``(T,)``.
    """

    observations: Tensor
    actions: Tensor
    outputs: Tensor
    advantages: Tensor
    weights: Tensor
    returns: Tensor
    lengths: Tensor
    num_unstable: Tensor


@dataclass(kw_only=True, eq=False)
class Reinforcement(Domain[Rollouts]):
    """Tasks that differ in a goal, on one kind of environment; a subclass says which, and how goals are drawn.

    A subclass is a dataclass too, ``@dataclass(kw_only=True, eq=False)``: its fields are its options, beside those
    here.

    The model gives, for each observation, the means of A actions and then their log standard deviations.

    Args:
        num_shots: K, rollouts per task and gradient step: episodes are collected until they have K * horizon timesteps.
        horizon: H, timesteps after which an episode ends.
        discount: discount of future rewards in training and adaptation; reported returns are undiscounted.
        oracle: tells the policy the goal, behind each observation.
        pooled: in training, one baseline and one standardisation for all tasks of a meta-batch, which then may have few
            rollouts each.
        num_goals: number of goals to train on, drawn once; None draws fresh ones for every meta-batch.
    """

    num_shots: Count = 20
    horizon: Count = 200
    discount: Discount = 0.99
    oracle: bool = False
    pooled: bool = False
    num_goals: Count | None = None

    headline = "return"
    larger_is_better = True
    on_policy = True
    selected_by = "return"

    def __post_init__(self) -> None:
        environments = self.make_environments()
        self.environments = TellGoal(environments) if self.oracle else environments
        self.in_shape = (self.environments.observation_dim,)
        self.out_dim = 2 * self.environments.action_dim

    @property
    def workload(self) -> Workload:
        """Rollouts differ in length, and cores simulate: chunks fit a CPU's cache, and nothing is compiled."""
        chunk = max(1, _CHUNK_TIMESTEPS // (self.num_shots * self.horizon))
        # Environments are stepped together: the more at once, the faster.
        return Workload(task_chunk=chunk, fixed_shapes=False, threads_pay="beside_gpu", whole_bank=True)

    @abstractmethod
    def make_environments(self) -> Environments:
        """Makes the environments to step; they tell no oracle the goal."""

    @abstractmethod
    def draw_goals(self, count: int, stream: Stream) -> Tensor:
        """Draws goals, ``(count, G)``, a pure function of the stream; the first are the same whatever the count."""

    @abstractmethod
    def test_goals(self, count: int) -> Tensor:
        """Returns the goals of meta-test, ``(count, G)``: those of the authors, as far as they go."""

    @abstractmethod
    def make_single(self, goal: Tensor, render_mode: str | None = None) -> gymnasium.Env:
        """Makes the environment of one goal, ``(G,)``, that Gymnasium's tools take; it tells no oracle the goal."""

    def draw_tasks(self, num_tasks: int, stream: Stream, split: Split, num_shots: int, num_query: int) -> Tasks:
        """Draws goals and the streams of each task's rollouts; test goals are always the same."""
        if split == "test":
            goals = self.test_goals(num_tasks).to(stream.device)
        elif split == "train" and self.num_goals is not None:
            fixed = self.draw_goals(self.num_goals, Stream(0, stream.device).child("goals"))
            goals = fixed[torch.arange(num_tasks, device=stream.device) % self.num_goals]
        else:
            goals = self.draw_goals(num_tasks, stream.child("goals"))
        constants = {"num_rollouts": num_shots, "pooled": int(self.pooled and split == "train")}
        return {"goals": goals, "keys": stream.child("keys").bits((num_tasks,))} | {
            name: torch.full((num_tasks,), value, device=stream.device) for name, value in constants.items()
        }

    def collect(self, tasks: Tasks, model: Model, params: Params, step: int) -> None:
        """Rolls out each task's policy in it."""
        params = {name: value.detach() for name, value in params.items()}
        goals = tasks["goals"]
        episodes = collect_episodes(
            self.environments,
            lambda observations: model(params, observations),
            goals,
            Stream(tasks["keys"]).child("step").child(step),
            int(tasks["num_rollouts"][0]),
            self.horizon,
            self.discount,
        )
        times = torch.arange(episodes.times.shape[1], device=goals.device)
        lengths = episodes.lengths.unsqueeze(1)
        rollouts = Rollouts(
            observations=episodes.observations,
            actions=episodes.actions,
            outputs=episodes.outputs,
            advantages=advantages(episodes, pooled=bool(tasks["pooled"][0])),
            weights=(times < lengths) / lengths,
            returns=episodes.total_reward / episodes.num_episodes,
            lengths=episodes.lengths / episodes.num_episodes,
            num_unstable=episodes.num_unstable.to(episodes.total_reward.dtype),
        )
        tasks |= {f"step_{step}.{name}": value for name, value in rollouts._asdict().items()}

    def data(self, tasks: Tasks, role: Role, step: int = 0) -> Rollouts:
        """Returns what was collected at ``step``: the update and the evaluation see the same, whatever the role."""
        return Rollouts(*(tasks[f"step_{step}.{name}"] for name in Rollouts._fields))

    def subsample_timesteps(self, tasks: Tasks, every: int) -> Tasks:
        if every == 1:
            return tasks
        fewer = dict(tasks)
        for name, value in tasks.items():
            if value.dim() > 1 and name.startswith("step_"):
                fewer[name] = value[:, ::every]
        for name, value in fewer.items():
            if name.endswith(".weights"):
                fewer[name] = value / value.sum(1, keepdim=True)
        return fewer

    def rollout_metrics(self, tasks: Tasks) -> tuple[Metrics, Metrics]:
        """Returns the ``return`` after the last gradient step, and that of each step before."""
        last = max(int(name.split(".")[0].removeprefix("step_")) for name in tasks if name.endswith(".returns"))
        before = {f"return_step_{step}": tasks[f"step_{step}.returns"] for step in range(last)}
        rollouts = self.data(tasks, "query", last)
        unstable = [tasks[f"step_{step}.num_unstable"] for step in range(last + 1)]
        return (
            before | {"return": rollouts.returns, "episode_length": rollouts.lengths},
            {"num_unstable": torch.stack(unstable).sum(0)},
        )

    def inner_loss(self, model: Model, params: Params, data: Rollouts) -> Tensor:
        """-mean over timesteps of log pi(a|o) * A (eq. 4, with the advantage in place of the reward)."""
        return _reinforce(model(params, data.observations), data)

    def outer_loss(self, model: Model, params: Params, data: Rollouts) -> tuple[Tensor, Metrics]:
        """-mean(ratio * A), the ratio to the policy that collected the rollouts, whose KL divergence is ``kl``.

        Departure: the authors average the divergence over the timesteps of all tasks together, we over each task's own
        first; they differ where episodes end early, by a few percent of timesteps.
        """
        outputs = model(params, data.observations)
        ratio = (log_prob(outputs, data.actions) - log_prob(data.outputs, data.actions)).exp()
        loss = -(data.weights * ratio * data.advantages).sum(1)
        return loss, {"kl": (data.weights * kl_divergence(data.outputs, outputs)).sum(1)}

    def measure(self, model: Model, params: Params, support: Rollouts, query: Rollouts, step: int) -> Metrics:
        """The mean undiscounted return."""
        return {"return": query.returns}

    def inner_hessian(self, model: Model, params: Params, data: Rollouts) -> MatrixVectorProduct:
        """Returns the Hessian of `inner_loss` at the parameters, per task."""
        linearized = model.linearize(params, data.observations)
        outputs = linearized.outputs.detach().requires_grad_()
        with torch.enable_grad():
            loss = _reinforce(outputs, data).sum()
            (delta,) = torch.autograd.grad(loss, outputs, create_graph=True)

        def output_hessian(change: Tensor) -> Tensor:
            return torch.autograd.grad(delta, outputs, change, retain_graph=True)[0]

        return linearized.hessian(delta.detach(), output_hessian)

    def fisher(self, model: Model, params: Params, data: Rollouts) -> MatrixVectorProduct:
        """Returns the Hessian of the mean KL divergence from the policy of the parameters, at them, per task."""
        linearized = model.linearize(params, data.observations)
        log_std = linearized.outputs.detach().chunk(2, dim=-1)[1]
        # Of a Gaussian: 1 / variance for its mean, 2 for its log standard deviation.
        metric = data.weights.unsqueeze(-1) * torch.cat([(-2 * log_std).exp(), torch.full_like(log_std, 2.0)], dim=-1)
        return lambda vector: linearized.vjp(metric * linearized.jvp(vector))


def log_prob(outputs: Tensor, actions: Tensor) -> Tensor:
    """Returns log pi(a|o) of each action: ``(..., 2A)``, ``(..., A)`` -> ``(...)``."""
    mean, log_std = outputs.chunk(2, dim=-1)
    standard = (actions - mean) * (-log_std).exp()
    return -(0.5 * standard.square() + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)


def kl_divergence(old: Tensor, new: Tensor) -> Tensor:
    """Returns KL(old || new) of the Gaussians of two outputs ``(..., 2A)``, ``(...)``."""
    old_mean, old_log_std = old.chunk(2, dim=-1)
    mean, log_std = new.chunk(2, dim=-1)
    spread = (2 * old_log_std).exp() + (old_mean - mean).square()
    return (log_std - old_log_std + 0.5 * spread * (-2 * log_std).exp() - 0.5).sum(-1)


def _reinforce(outputs: Tensor, data: Rollouts) -> Tensor:
    return -(data.weights * log_prob(outputs, data.actions) * data.advantages).sum(1)
