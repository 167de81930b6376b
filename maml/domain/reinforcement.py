"""Reinforcement learning (section 4.2): a task is a goal, its data are rollouts, its inner loss is REINFORCE's."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import gymnasium
import torch
from torch import Tensor

from maml.domain.base import Domain, Metrics, Role
from maml.environment.advantages import advantages, num_features
from maml.environment.base import Environments, TellGoal
from maml.environment.rollouts import Episodes, collect_episodes, collect_single_episodes
from maml.errors import MamlError, TooLarge
from maml.hardware import distributed
from maml.hardware.memory import check_memory
from maml.hardware.workload import Workload
from maml.model.base import Model
from maml.model.linearized import Linearized
from maml.seeding import Stream
from maml.status import announce
from maml.types import Count, Discount, MatrixVectorProduct, Params, Split, Tasks, expand

# Number of timesteps in a chunk of tasks on a CPU: the values of a hidden layer then stay in its cache.
_CHUNK_TIMESTEPS = 4000


class Rollouts(NamedTuple):
    """Rollouts of T tasks. The episodes of a task are concatenated to N timesteps, padded at the end.

    Attributes:
        observations: the observation before each action, ``(T, N, O)``.
        actions: actions as drawn, ``(T, N, A)``.
        outputs: outputs of the policy that drew the actions, ``(T, N, D)``; see `Distribution`.
        advantages: standardised advantages of the actions, ``(T, N)``.
        weights: weight of each timestep, ``(T, N)``; 0 for padding. It is 1 / number of timesteps of the task, so that
            a weighted sum is the mean over the task. With ``goal_per="episode"`` it is T / number of timesteps of all
            tasks, so that the mean of the weighted sums is the mean over all timesteps.
        returns: undiscounted return, mean over episodes, ``(T,)``.
        lengths: number of timesteps per episode, mean over episodes, ``(T,)``.
        num_unstable: number of episodes that ended because the simulation became unstable, ``(T,)``.
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
    """Tasks that differ in a goal, on one kind of environment. A subclass defines both.

    A subclass is a dataclass too, ``@dataclass(kw_only=True, eq=False)``. Its fields are options in addition to the
    options below.

    For each observation, the model returns the outputs that the environments' `Distribution` of actions takes.

    Args:
        num_shots: K, number of rollouts per task and gradient step. Episodes are collected until there are K * horizon
            timesteps.
        horizon: H, number of timesteps after which an episode ends.
        discount: discount of rewards in training; reported returns are undiscounted.
        oracle: whether the policy is told the goal, at the end of each observation.
        pooled: whether, in training, all tasks of a meta-batch share one baseline and one standardisation. Each task
            then needs few rollouts only.
        num_goals: number of goals to train on, drawn once, the same for all seeds; None draws new goals for every
            meta-batch.
        goal_per: how long a goal lasts in training (docs/protocol.md#rollouts). ``task``: until its task has
            K * horizon timesteps. ``episode``: for one episode, and the timesteps of all episodes of a meta-batch are
            counted together. This needs ``pooled`` and an algorithm that does not adapt in training.

    Raises:
        MamlError: if goals change with every episode and nothing is pooled.
    """

    num_shots: Count = 20
    horizon: Count = 200
    discount: Discount = 0.99
    oracle: bool = False
    pooled: bool = False
    num_goals: Count | None = None
    goal_per: Literal["task", "episode"] = "task"

    headline = "return"
    larger_is_better = True
    on_policy = True
    selected_by = "return"

    def __post_init__(self) -> None:
        if self.goal_per == "episode" and not self.pooled:
            raise MamlError(
                "domain.goal_per=episode gives each goal one episode, too little for a baseline of its own; set "
                "domain.pooled=true, or domain.goal_per=task"
            )
        environments = self.make_environments()
        self.environments = TellGoal(environments) if self.oracle else environments
        self.in_shape = (self.environments.observation_dim,)
        self.distribution = self.environments.distribution
        self._check_baseline(self.environments.observation_dim)
        self.out_dim = self.distribution.num_outputs

    @property
    def workload(self) -> Workload:
        """Rollouts differ in length, so nothing is compiled. Chunks fit a CPU's cache, and each thread has its own."""
        chunk = max(1, _CHUNK_TIMESTEPS // (self.num_shots * self.horizon))
        # Environments are stepped together, so more tasks at once are faster.
        return Workload(task_chunk=chunk, fixed_shapes=False, threads="tasks", whole_bank=True)

    def least_elements(self, num_shots: int, num_query: int) -> int:
        """Rollouts hold an observation, an action and its distribution for each timestep."""
        return num_shots * self.horizon * (self.in_shape[0] + self.out_dim + self.distribution.action_dim)

    def check_adaptation(self, algorithm: str) -> None:
        if self.goal_per == "episode":
            raise MamlError(
                f"{algorithm} adapts to a task's goal, but domain.goal_per=episode draws a new goal for every episode; "
                "set domain.goal_per=task, or choose algorithm=pretrain or oracle"
            )

    def _check_baseline(self, observation_dim: int) -> None:
        """Refuses observations that are too long for the linear baseline, a matrix over its inputs."""
        try:
            check_memory(
                8 * num_features(observation_dim) ** 2, f"the baseline of {observation_dim:,} observed numbers"
            )
        except TooLarge as error:
            raise TooLarge(
                f"{error}; make the observations of {type(self).__name__} shorter, pictures for example with "
                "gymnasium.wrappers.ResizeObservation and GrayscaleObservation"
            ) from error

    def check_model(self, model: Model) -> None:
        """Checks that the outputs are those of the actions' distribution, and depend on one observation only."""
        wanted = self.distribution
        if model.distribution not in (None, type(wanted)):
            raise MamlError(
                f"the actions of {type(self).__name__} are {wanted.actions}, so a model has to give {wanted.outputs}, "
                f"but {type(model).__name__} gives {model.distribution.outputs}; choose {wanted.model}"
            )
        params = expand(model.init(Stream(0)), 1)
        with torch.no_grad():
            observations = Stream(1).normal((1, 3, *self.in_shape))
            together, alone = model(params, observations), model(params, observations[:, :1])
        if (together[:, :1] - alone).abs().max() > 1e-3 * together.abs().max():
            raise MamlError(
                f"what {type(model).__name__} gives for an observation depends on the others beside it, as with batch "
                "normalisation, so an action has no probability of its own; choose a model without it "
                "(model.normalization=none; with model=module, take the layer out of the module)"
            )

    @abstractmethod
    def make_environments(self) -> Environments:
        """Makes the environments, without the goal in the observations; `oracle` adds it."""

    @abstractmethod
    def draw_goals(self, count: int, stream: Stream) -> Tensor:
        """Draws goals, ``(count, G)``, a pure function of the stream. Goal i does not depend on ``count``."""

    @abstractmethod
    def test_goals(self, count: int) -> Tensor:
        """Returns the goals of meta-test, ``(count, G)``. The first ones are the authors', if they published them."""

    @abstractmethod
    def make_single(self, goal: Tensor, render_mode: str | None = None) -> gymnasium.Env:
        """Makes one Gymnasium environment with one goal, ``(G,)``, without the goal in the observations."""

    def draw_tasks(self, num_tasks: int, stream: Stream, split: Split, num_shots: int, num_query: int) -> Tasks:
        """Draws goals, and a random key for each task's rollouts. Test goals are always the same."""
        constants = {"num_rollouts": num_shots, "pooled": int(self.pooled and split == "train")}
        if split == "train" and self.goal_per == "episode":
            # How many episodes there are depends on the policy, so `collect` draws their goals.
            constants["stream"] = int(stream.key)
            draws = {}
        else:
            goals, keys = self._draw_goals_and_keys(num_tasks, stream, split)
            draws = {"goals": goals, "keys": keys}
        return draws | {
            name: torch.full((num_tasks,), value, device=stream.device) for name, value in constants.items()
        }

    def _draw_goals_and_keys(self, count: int, stream: Stream, split: Split) -> tuple[Tensor, Tensor]:
        """Returns goals, ``(count, G)``, and keys of random streams, ``(count,)``. Neither depends on ``count``."""
        if split == "test":
            goals = self.test_goals(count).to(stream.device)
        elif split == "train" and self.num_goals is not None:
            fixed = self.draw_goals(self.num_goals, Stream(0, stream.device).child("goals"))
            order = stream.child("goals").choice((), self.num_goals, self.num_goals)
            goals = fixed[order[torch.arange(count, device=stream.device) % self.num_goals]]
        else:
            goals = self.draw_goals(count, stream.child("goals"))
        return goals, stream.child("keys").bits((count,))

    def collect(self, tasks: Tasks, model: Model, params: Params, step: int) -> None:
        """Collects rollouts of each task's policy.

        With ``goal_per="episode"`` in training, the parameters of all tasks have to be equal. The tasks are then
        replaced by one task for each episode, of which there are as many as the meta-batch needs.
        """
        params = {name: value.detach() for name, value in params.items()}
        pooled = bool(tasks["pooled"][0])
        if "stream" in tasks:
            episodes = self._collect_single_episodes(tasks, model, params)
            tasks.clear()
            own = [torch.full_like(episodes.lengths[0], len(episodes.lengths)), episodes.lengths.sum()]
            count, num_timesteps = distributed.all_reduce_sum(own)
            share = count / num_timesteps
        else:
            episodes = collect_episodes(
                self.environments,
                lambda observations: model(params, observations),
                tasks["goals"],
                Stream(tasks["keys"]).child("step").child(step),
                int(tasks["num_rollouts"][0]),
                self.horizon,
                self.discount,
            )
            share = 1 / episodes.lengths.unsqueeze(1)
        times = torch.arange(episodes.times.shape[1], device=episodes.times.device)
        rollouts = Rollouts(
            observations=episodes.observations,
            actions=episodes.actions,
            outputs=episodes.outputs,
            advantages=advantages(episodes, pooled),
            weights=(times < episodes.lengths.unsqueeze(1)) * share,
            returns=episodes.total_reward / episodes.num_episodes,
            lengths=episodes.lengths / episodes.num_episodes,
            num_unstable=episodes.num_unstable.to(episodes.total_reward.dtype),
        )
        tasks |= {f"step_{step}.{name}": value for name, value in rollouts._asdict().items()}

    def _collect_single_episodes(self, tasks: Tasks, model: Model, params: Params) -> Episodes:
        """Collects the episodes of a meta-batch, each with its own goal; each is a task of the result."""
        stream = Stream(int(tasks["stream"][0]), tasks["stream"].device)
        theta = {name: value[0] for name, value in params.items()}
        (num_rollouts,) = distributed.all_reduce_sum([tasks["num_rollouts"].sum()])

        def draw(begin: int, end: int) -> tuple[Tensor, Stream]:
            goals, keys = self._draw_goals_and_keys(end, stream, "train")
            return goals[begin:], Stream(keys[begin:]).child("step").child(0)

        return collect_single_episodes(
            self.environments,
            lambda observations: model(expand(theta, len(observations)), observations),
            draw,
            int(num_rollouts) * self.horizon,
            self.horizon,
            self.discount,
        )

    def data(self, tasks: Tasks, role: Role, step: int = 0) -> Rollouts:
        """Returns the rollouts that were collected at ``step``. They are the same for both roles."""
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
                fewer[name] = value * (tasks[name].sum(1, keepdim=True) / value.sum(1, keepdim=True))
        return fewer

    def rollout_metrics(self, tasks: Tasks) -> tuple[Metrics, Metrics]:
        """Averages the returns before and after each gradient step; sums the unstable episodes."""
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
        return self._reinforce(model(params, data.observations), data)

    def outer_loss(self, model: Model, params: Params, data: Rollouts) -> tuple[Tensor, Metrics]:
        """-mean(ratio * A), with the ratio to the policy that collected the rollouts; ``kl`` is the divergence from it.

        Departure: the authors average the divergence over the timesteps of all tasks at once. Here it is averaged over
        each task, then over tasks. The two differ if episodes end early, by a few percent of timesteps.
        """
        outputs = model(params, data.observations)
        log_prob = self.distribution.log_prob
        ratio = (log_prob(outputs, data.actions) - log_prob(data.outputs, data.actions)).exp()
        loss = -(data.weights * ratio * data.advantages).sum(1)
        return loss, {"kl": (data.weights * self.distribution.kl(data.outputs, outputs)).sum(1)}

    def measure(self, model: Model, params: Params, support: Rollouts, query: Rollouts, step: int) -> Metrics:
        """The mean undiscounted return."""
        if count := int(query.num_unstable.sum()):
            announce(
                f"{count} episodes after {step} gradient steps blew up or gave numbers that are not finite; they end "
                "early, so the return cannot be compared with others"
            )
        return {"return": query.returns}

    def inner_hessian(self, model: Model, params: Params, data: Rollouts) -> MatrixVectorProduct:
        """Returns the Hessian of `inner_loss` at the parameters, per task."""
        linearized, delta, output_hessian = self._linearized_reinforce(model, params, data)
        return linearized.hessian(delta, output_hessian)

    def inner_derivatives(self, model: Model, params: Params, data: Rollouts) -> tuple[Params, MatrixVectorProduct]:
        """Returns the gradient and the Hessian of `inner_loss` at the parameters, per task."""
        linearized, delta, output_hessian = self._linearized_reinforce(model, params, data)
        return linearized.vjp(delta), linearized.hessian(delta, output_hessian)

    def kl_gradient(self, model: Model, params: Params, data: Rollouts) -> Params:
        """Returns the gradient of the mean KL divergence from the policy that collected the rollouts, per task."""
        linearized = model.linearize(params, data.observations)
        outputs = linearized.outputs.detach().requires_grad_()
        with torch.enable_grad():
            kl = (data.weights * self.distribution.kl(data.outputs, outputs)).sum()
            (delta,) = torch.autograd.grad(kl, outputs)
        return linearized.vjp(delta)

    def fisher(self, model: Model, params: Params, data: Rollouts) -> MatrixVectorProduct:
        """Returns the Hessian of the mean KL divergence from the policy of ``params``, at ``params``, per task."""
        linearized = model.linearize(params, data.observations)
        product = self.distribution.fisher(linearized.outputs.detach(), data.weights)
        return lambda vector: linearized.vjp(product(linearized.jvp(vector)))

    def _reinforce(self, outputs: Tensor, data: Rollouts) -> Tensor:
        return -(data.weights * self.distribution.log_prob(outputs, data.actions) * data.advantages).sum(1)

    def _linearized_reinforce(
        self, model: Model, params: Params, data: Rollouts
    ) -> tuple[Linearized, Tensor, Callable[[Tensor], Tensor]]:
        """Returns the model's derivatives, and the inner loss's gradient and Hessian with respect to the outputs."""
        linearized = model.linearize(params, data.observations)
        outputs = linearized.outputs.detach().requires_grad_()
        with torch.enable_grad():
            loss = self._reinforce(outputs, data).sum()
            (delta,) = torch.autograd.grad(loss, outputs, create_graph=True)

        def output_hessian(change: Tensor) -> Tensor:
            return torch.autograd.grad(delta, outputs, change, retain_graph=True)[0]

        return linearized, delta.detach(), output_hessian
