"""Reptile (Nichol et al. 2018; docs/protocol.md#reptile): theta moves towards the weights after many inner steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from maml.algorithm.base import Algorithm, Parts
from maml.domain.base import Metrics
from maml.errors import MamlError
from maml.seeding import Stream
from maml.types import Count, Examples, Params, Tasks, expand, num_tasks


class Reptile(Algorithm):
    """theta <- theta + epsilon * mean_i(theta'_i - theta): ``outer=sgd`` on the "gradient" theta - mean_i theta'_i.

    Inner steps run on mini-batches that cycle through a task's support set, which is reshuffled for each pass. The
    state of the inner optimizer is kept from one meta-update to the next. In meta-test every task starts from it.

    Departure: the authors' code passes the optimizer's state from task to task. Here all tasks of a meta-batch start
    from the same state, and the mean of their final states is kept.

    Args:
        parts: the domain, model, optimizers and stream.
        num_examples: number of support examples per mini-batch in training.
        num_test_examples: number of support examples per mini-batch in meta-test.

    Raises:
        MamlError: if nothing in the domain adapts by gradient steps, or training takes none.
    """

    def __init__(self, parts: Parts, num_examples: Count, num_test_examples: Count) -> None:
        super().__init__(parts)
        self.domain.check_adaptation(self.name)
        if not self.inner.num_steps:
            raise MamlError(
                "algorithm=reptile moves theta to where inner steps lead, and inner.num_steps=0 takes none; set a "
                "number of steps"
            )
        self.num_examples, self.num_test_examples = num_examples, num_test_examples
        adapted = {name: self.theta[name] for name in self.inner.adapted_names(list(self.theta))}
        state = self.inner.init_state(expand(adapted, 1))
        self.set_initial(self.theta, {name: value[0].clone() for name, value in state.items()})

    def sample_tasks(self, count: int, stream: Stream) -> Tasks:
        """Draws a meta-batch, and which examples each mini-batch has.

        Mini-batches are drawn here, and not in the inner loop, because the compiler must not see the draws: the code
        that it made from their integer arithmetic wrote out of bounds (torch 2.13).
        """
        tasks = self.domain.sample_tasks(count, stream)
        support = self.domain.data(tasks, "support")
        keys = stream.child("minibatches").bits((count,))
        return tasks | {
            "minibatches": _draw_minibatches(Stream(keys), self.inner.num_steps, support.x.shape[1], self.num_examples)
        }

    def task_losses(self, params: Params, tasks: Tasks) -> tuple[Tensor, Metrics]:
        """<theta, theta - theta'_i>, with the second factor held constant: its gradient is theta - theta'_i.

        The logged loss is the query loss of theta'_i.
        """
        theta = self.theta_of(params)
        start = {name: value.detach() for name, value in theta.items()}
        state = {name: params[name] for name in self.buffers}
        *_, (adapted, state) = self._adapt_on_minibatches(start, tasks, tasks["minibatches"], None, state)
        adapted = {name: value.detach() for name, value in adapted.items()}
        query = self.domain.data(tasks, "query")
        losses, metrics = self.domain.outer_loss(self.model, adapted, query)
        products = [(value * (start[name] - adapted[name])).flatten(1).sum(1) for name, value in theta.items()]
        return torch.stack(products).sum(0), {"loss": losses} | metrics | state

    def adapt(
        self, params: Params, tasks: Tasks, num_steps: int, step_sizes: Sequence[float] | None = None
    ) -> Iterator[Params]:
        count = num_tasks(tasks)
        support = self.domain.data(tasks, "support")
        # All tasks of a bank have the same mini-batches, so that the result does not depend on the chunk size.
        stream = Stream(0, support.x.device).child("minibatches")
        minibatches = _draw_minibatches(stream, num_steps, support.x.shape[1], self.num_test_examples)
        minibatches = minibatches.expand(count, -1, -1)
        state = {name: params[name] for name in self.buffers}
        for adapted, _ in self._adapt_on_minibatches(self.theta_of(params), tasks, minibatches, step_sizes, state):
            yield adapted

    def _adapt_on_minibatches(
        self,
        params: Params,
        tasks: Tasks,
        minibatches: Tensor,
        step_sizes: Sequence[float] | None,
        state: Params,
    ) -> Iterator[tuple[Params, Params]]:
        """Takes one gradient step on each mini-batch.

        Args:
            params: initial parameters, name -> ``(T, ...)``.
            tasks: T tasks.
            minibatches: positions of support examples, ``(T, num_steps, num_examples)``.
            step_sizes: one step size per step; None uses the inner optimizer's own.
            state: the inner optimizer's initial state, name -> ``(T, ...)``.

        Yields:
            The parameters and the optimizer's state, before the first step and after each.
        """
        rows = torch.arange(len(minibatches), device=minibatches.device).unsqueeze(1)

        def loss(params: Params, step: int) -> Tensor:
            data: Examples = self.domain.data(tasks, "support", step)
            chosen = rows, minibatches[:, step]
            # num_shots=1 sums the loss over the mini-batch for every K, so that the gradients of meta-test have the
            # scale of the optimizer's second moments, which come from training.
            return self.domain.inner_loss(self.model, params, Examples(data.x[chosen], data.y[chosen], num_shots=1))

        num_steps = minibatches.shape[1]
        return self.inner.adapt(loss, params, num_steps, create_graph=False, step_sizes=step_sizes, state=state)


def _draw_minibatches(stream: Stream, num_steps: int, num_support: int, num_examples: int) -> Tensor:
    """Returns positions in the support set for each inner step, ``(..., num_steps, num_examples)``.

    The support set is passed over in a new order each time. A mini-batch may span several passes: 15 of 5 examples have
    each of them three times, as in the authors' code.
    """
    size = num_steps * num_examples
    passes = range(max(1, -(-size // num_support)))
    orders = torch.cat([stream.child(number).choice((), num_support, num_support) for number in passes], dim=-1)
    return orders[..., :size].unflatten(-1, (num_steps, num_examples))
