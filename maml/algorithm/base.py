"""The interface of an algorithm: how theta is learnt from a meta-batch, and how it adapts to a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from maml.algorithm.best import NUM_RECENT_RETURNS, init_best
from maml.domain.base import Domain, Metrics
from maml.errors import MamlError
from maml.inner.base import Inner, Loss
from maml.model.base import Model
from maml.outer.base import Objective, Outer, OuterState
from maml.pictures import Picture
from maml.seeding import Stream
from maml.types import MatrixVectorProduct, Params, Tasks, expand

MakeModel = Callable[[Sequence[int], int], Model]
"""Builds the model f_theta from the shape of one input and the number of outputs."""


@dataclass(frozen=True)
class Parts:
    """The parts that every algorithm is built from.

    Attributes:
        domain: the source of tasks and data.
        make_model: builds f_theta. It is a function because some algorithms need other inputs or outputs than the
            domain's.
        inner: the inner optimizer, which adapts theta to a task.
        outer: the outer optimizer, which makes the meta-update.
        stream: draws the initial parameters; theta lives on its device.
    """

    domain: Domain[Any]
    make_model: MakeModel
    inner: Inner
    outer: Outer
    stream: Stream


class Algorithm(ABC):
    """Learns theta. Most subclasses only define the loss of each task, `task_losses`.

    An algorithm computes on T tasks at once. Its parameters always have a leading task axis, ``(T, ...)``: one copy
    for each task, unless it ``shares_weights``. An algorithm does not know which tasks are computed together, how many
    seeds and processes there are, or whether the computation is compiled; `maml.training.meta_gradient` decides that.

    Class attributes:
        differentiates_adaptation: whether the meta-gradient is taken through adaptation. Only then ``inner.order``
            matters, and the inner optimizer's own parameters (step sizes, an LSTM) can be learnt.
        trained_as: the address of the class whose training runs this class shares, because the two differ in meta-test
            only; None if it has runs of its own. A subclass does not inherit it, because it may train in another way.
        learns_from_rollouts: whether it can learn from data that depends on theta, as rollouts do.
        shares_weights: whether `task_losses` gets one copy of the parameters for all tasks, because nothing adapts in
            training. Their leading axis is then 1, or the number of seeds, and a layer computes the examples of all
            tasks as one batch. Losses and metrics still have the task axis.
        sums_over_tasks: whether the meta-update follows from a sum over the tasks of a meta-batch. Only then processes
            can share the tasks.
        fixes_ways: whether each class of a training task has its own output, so that tasks of meta-test cannot have
            more classes. Algorithms that compare images with the support images have no such limit.
        draws_dropout: whether `sample_tasks` draws what the model drops. Only then the model can have dropout.

    Attributes:
        theta: the meta-learnt parameters, those of the model and of the inner optimizer, without a task axis.
        buffers: other tensors that training changes (running statistics, an optimizer's state), by name.
        outer_state: the state of the outer optimizer.
        best: the best theta so far, its buffers and its score (`maml.algorithm.best`); empty if only the last theta is
            kept.
    """

    differentiates_adaptation = False
    trained_as: str | None = None
    learns_from_rollouts = False
    shares_weights = False
    sums_over_tasks = True
    fixes_ways = True
    draws_dropout = False

    def __init__(self, parts: Parts) -> None:
        self.domain, self.inner, self.outer = parts.domain, parts.inner, parts.outer
        self.stream = parts.stream
        if self.domain.on_policy and not self.learns_from_rollouts:
            raise MamlError(
                f"{type(self).__name__} learns from labelled examples, {type(self.domain).__name__} gives rollouts; "
                "choose algorithm=maml, pretrain, oracle, random_init or context_vector"
            )
        if self.outer.needs_policy and not self.domain.on_policy:
            raise MamlError(
                f"{type(self.outer).__name__} limits how far a policy moves, but {type(self.domain).__name__} has no "
                "policy; choose outer=adam, or an RL domain"
            )
        self.model = parts.make_model(self.domain.in_shape, self.domain.out_dim)
        self.domain.check_model(self.model)
        if self.model.dropout and not self.draws_dropout:
            raise MamlError(
                f"model.dropout={self.model.dropout}, but {type(self).__name__} drops no values of the network in "
                "training; set it to 0, or choose algorithm=matching, prototypical or siamese"
            )
        if self.inner.second_order_from and not (self.differentiates_adaptation and self.inner.num_steps):
            raise MamlError(
                f"inner.second_order_from={self.inner.second_order_from} changes how the meta-gradient goes through "
                f"inner steps, but that of {type(self).__name__} goes through none; set it to null"
            )
        if self.differentiates_adaptation and self.inner.order == 2:
            self.model.check_second_derivative()
        self.set_initial(self.model.init(self.stream))

    @property
    def name(self) -> str:
        """The algorithm's name on the console and in ``run.json``."""
        return type(self).__name__

    @property
    def adaptation_steps(self) -> int:
        """The number of gradient steps to a task in training; validation during training takes as many."""
        return 0 if self.shares_weights else self.inner.num_steps

    def set_initial(self, params: Params, buffers: Params | None = None) -> None:
        """Sets the state from which training starts.

        Args:
            params: the model's initial parameters, without a task axis.
            buffers: other tensors that training changes; None is none.

        Raises:
            MamlError: if no parameter adapts, a parameter and a buffer have one name, or the inner optimizer has
                parameters of its own to learn and this algorithm has no gradient for them.
        """
        self.inner.adapted_names(list(params))  # fails here, before training, if ``inner.adapt`` matches nothing
        learnt = self.inner.init_learned(params, self.stream.child("inner"))
        if not isinstance(learnt, dict) or not all(name.startswith("inner.") for name in learnt):
            raise MamlError(
                f"{type(self.inner).__name__}.init_learned has to return a dictionary of tensors whose names start "
                "with 'inner.'; other names are parameters of the model"
            )
        if learnt and not self.differentiates_adaptation:
            raise MamlError(
                f"{type(self).__name__} does not differentiate through adaptation, so it cannot learn "
                f"{next(iter(learnt))}, as {type(self.inner).__name__} does; choose inner=sgd, or algorithm=maml"
            )
        if taken := (buffers or {}).keys() & (params | learnt).keys():
            raise MamlError(
                f"the network has a parameter {min(taken)!r}, a name that {type(self).__name__} has for a value of its "
                "own; give it another name"
            )
        self.theta: Params = params | learnt
        self.buffers: Params = buffers or {}
        self.outer_state: OuterState = self.outer.init_state(self.theta)
        self.best: Params = init_best(self.theta, NUM_RECENT_RETURNS) if self.domain.selected_by else {}

    def keep_best_of_validation(self) -> None:
        """Makes training keep the theta that is best on validation tasks; call it before training.

        Raises:
            MamlError: if the domain chooses its best theta in another way.
        """
        if self.domain.selected_by:
            raise MamlError(
                f"validate_every is for supervised domains: {type(self.domain).__name__} keeps the theta with the best "
                "average training return by itself; set validate_every=null"
            )
        self.best = init_best(self.theta | self.buffers, num_recent=1)

    def check_validation(self) -> None:
        """Checks that there are validation tasks; a domain that was built without its data has none.

        Raises:
            MamlError: if not.
        """
        try:
            self.domain.sample_tasks(1, self.stream.child("validation"), "val")
        except MamlError as error:
            raise MamlError(
                f"validate_every measures tasks of validation with the ways and shots of training: {error}. Change "
                "that, or set validate_every=null"
            ) from error

    def sample_tasks(self, count: int, stream: Stream) -> Tasks:
        """Draws a meta-batch of ``count`` tasks, a pure function of the stream."""
        return self.domain.sample_tasks(count, stream)

    @abstractmethod
    def task_losses(self, params: Params, tasks: Tasks) -> tuple[Tensor, Metrics]:
        """Computes the loss of each task. The meta-gradient is the gradient of the mean loss with respect to theta.

        Args:
            params: theta and the buffers, name -> ``(T, ...)``.
            tasks: T tasks.

        Returns:
            The losses, ``(T,)``, and further metrics by name, each ``(T,)``. A metric named ``loss`` is logged instead
            of the losses; with TRPO, which lowers the losses themselves, it is refused. For every buffer there must be
            a metric with its name, which holds the buffer's new value for each task, ``(T, ...)``; the buffer becomes
            the mean over tasks.
        """

    def collect(self, params: Params, tasks: Tasks) -> None:
        """Collects the rollouts that `task_losses` needs, and adds them to the tasks.

        Args:
            params: theta and the buffers, name -> ``(T, ...)``.
            tasks: T tasks of an on-policy domain; changed in place.
        """
        self.domain.collect(tasks, self.model, self.theta_of(params), 0)

    def curvature(self, params: Params, tasks: Tasks) -> MatrixVectorProduct:
        """Returns each task's Hessian of the KL divergence from the policy of ``params``, at ``params``.

        Args:
            params: theta and the buffers, name -> ``(T, ...)``.
            tasks: T tasks with their rollouts.

        Returns:
            A function that multiplies each task's Hessian by a vector, name -> ``(T, ...)``.

        Raises:
            MamlError: if the algorithm has no such policy.
        """
        raise self._no_policy()

    def kl_gradients(self, params: Params, tasks: Tasks) -> Params:
        """Returns the gradient of each task's KL divergence from the policy that collected its rollouts.

        Args:
            params: theta of the new policies and the buffers, name -> ``(T, ...)``.
            tasks: T tasks with their rollouts.

        Returns:
            The gradients with respect to each task's copy of theta, name -> ``(T, ...)``.

        Raises:
            MamlError: if the algorithm has no such policy.
        """
        raise self._no_policy()

    def _no_policy(self) -> MamlError:
        return MamlError(f"{type(self).__name__} does not know how far a policy moves; choose outer=adam")

    def meta_update(self, objective: Objective, tasks: Tasks) -> dict[str, Tensor]:
        """Updates theta, the buffers and the outer optimizer's state in place.

        Args:
            objective: the meta-objective on this meta-batch.
            tasks: the meta-batch.

        Returns:
            The mean metrics, 0-dim tensors.
        """
        metrics = self.outer.step(objective, self.theta, self.outer_state)
        for name, value in self.buffers.items():
            value.copy_(metrics.pop(name))
        return metrics

    @staticmethod
    def meta_updates(algorithms: Sequence[Any], objective: Objective, tasks: Tasks) -> list[dict[str, Tensor]]:
        """Makes the `meta_update` of several seeds in one computation, if not ``sums_over_tasks``.

        Without an override, seeds of such an algorithm cannot be trained at once.

        Args:
            algorithms: S algorithms that differ in the seed only.
            objective: computes gradients of single tasks, and nothing else.
            tasks: the meta-batches of all seeds, seed by seed, ``(S B, ...)``.

        Returns:
            The mean metrics of each seed, 0-dim tensors.
        """
        raise NotImplementedError

    def check_result(self) -> None:  # noqa: B027, most algorithms check nothing
        """Checks, after the last iteration, that training has reached what the algorithm asks for.

        Raises:
            MamlError: if not. The trained state is saved, and ``mode=eval`` evaluates it.
        """

    def adapt(
        self, params: Params, tasks: Tasks, num_steps: int, step_sizes: Sequence[float] | None = None
    ) -> Iterator[Params]:
        """Yields each task's parameters after 0, 1, ..., ``num_steps`` gradient steps on its support data.

        In an on-policy domain, the parameters of each step collect rollouts before they are yielded.

        Args:
            params: theta and the buffers, name -> ``(T, ...)``.
            tasks: T tasks; rollouts are added in place.
            num_steps: number of gradient steps.
            step_sizes: one step size per step; None uses the inner optimizer's own.
        """
        for step, adapted in enumerate(self.inner_steps(params, tasks, num_steps, step_sizes, create_graph=False)):
            self.domain.collect(tasks, self.model, adapted, step)
            yield adapted

    def inner_steps(
        self, params: Params, tasks: Tasks, num_steps: int, step_sizes: Sequence[float] | None, create_graph: bool
    ) -> Iterator[Params]:
        """Yields the same parameters as `adapt`, but collects nothing: the tasks already hold their data.

        Args:
            params: theta and the buffers, name -> ``(T, ...)``.
            tasks: T tasks with their data.
            num_steps: number of gradient steps.
            step_sizes: one step size per step; None uses the inner optimizer's own.
            create_graph: whether second derivatives with respect to ``params`` are needed.
        """
        loss = self.support_loss(tasks)
        for adapted, _ in self.inner.adapt(loss, self.theta_of(params), num_steps, create_graph, step_sizes):
            yield adapted

    def support_loss(self, tasks: Tasks) -> Loss:
        """Returns the loss that inner steps lower: that of each task's support data at the step.

        Args:
            tasks: T tasks; in an on-policy domain, they need the data of a step when it is taken.
        """
        # Examples are the same at every step, so they are gathered once. Rollouts differ from step to step.
        examples = None if self.domain.on_policy else self.domain.data(tasks, "support")

        def loss(params: Params, step: int) -> Tensor:
            data = self.domain.data(tasks, "support", step) if examples is None else examples
            return self.domain.inner_loss(self.model, params, data)

        return loss

    def params_per_task(self, num_tasks: int, theta: Params | None = None) -> Params:
        """Returns theta and the buffers, one copy for each task: name -> ``(T, ...)``.

        Args:
            num_tasks: T.
            theta: parameters and buffers without a task axis, instead of the algorithm's own of the same names; None
                replaces none.
        """
        return expand(self.theta | self.buffers | (theta or {}), num_tasks)

    def measure(self, params: Params, tasks: Tasks, step: int) -> Metrics:
        """Returns the evaluation metrics per task, ``(T,)``; those of the domain, unless a subclass has more.

        Args:
            params: what `adapt` has yielded after ``step`` gradient steps.
            tasks: T tasks with their data.
            step: number of gradient steps.
        """
        support, query = (self.domain.data(tasks, role, step) for role in ("support", "query"))
        return self.domain.measure(self.model, params, support, query, step)

    def pictures(self, params: Params, tasks: Tasks, num_steps: int) -> dict[str, Picture]:
        """Returns pictures of what was learnt, by name, drawn after meta-test; none, unless a subclass has some.

        Args:
            params: theta and the buffers, name -> ``(T, ...)``.
            tasks: the first T tasks of the bank.
            num_steps: number of gradient steps of meta-test.
        """
        return {}

    def theta_of(self, params: Params) -> Params:
        """Returns the entries of ``params`` that belong to theta, without the buffers."""
        return {name: params[name] for name in self.theta}

    def state_dict(self) -> dict[str, Params]:
        """Returns every tensor that training changes, by group and name."""
        groups = {"theta": self.theta, "outer": self.outer_state, "buffers": self.buffers, "best": self.best}
        return {name: tensors for name, tensors in groups.items() if tensors}

    def load_state_dict(self, state: Mapping[str, Params]) -> None:
        """Restores a `state_dict` in place.

        Raises:
            MamlError: if the state belongs to another algorithm or model.
        """
        current = _by_full_name(self.state_dict())
        saved = {self._present_name(name): value for name, value in _by_full_name(state).items()}
        if current.keys() != saved.keys():
            raise MamlError(
                "the checkpoint does not fit this algorithm and model: it "
                f"lacks {sorted(current.keys() - saved.keys()) or 'nothing'} and "
                f"has {sorted(saved.keys() - current.keys()) or 'nothing'} besides; give the settings it was trained "
                "with"
            )
        for name, value in current.items():
            if value.shape != saved[name].shape:
                raise MamlError(
                    f"the checkpoint's {name} has shape {tuple(saved[name].shape)}, but this model's has "
                    f"{tuple(value.shape)}; use a domain with the inputs and outputs that it was trained on"
                )
            value.copy_(saved[name])

    def _present_name(self, name: str) -> str:
        """Returns the present name of a saved tensor. In older checkpoints it may end with a parameter's old name."""
        groups = name.split(".")
        endings = (".".join(groups[start:]) for start in range(1, len(groups)))
        present = ((ending, self.model.renamed(ending)) for ending in endings)
        return next((name.removesuffix(old) + new for old, new in present if old != new), name)


def _by_full_name(state: Mapping[str, Params]) -> Params:
    """Returns the tensors of all groups by ``group.name``."""
    return {f"{group}.{name}": value for group, tensors in state.items() for name, value in tensors.items()}
