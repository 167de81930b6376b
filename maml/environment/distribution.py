"""Distributions of actions: what a policy's outputs mean, for actions of real numbers and for numbered choices."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from maml.seeding import Stream

Product = Callable[[Tensor], Tensor]
"""A matrix over the outputs of each observation, given as the function that multiplies it by vectors, ``(..., D)``."""


class Distribution(ABC):
    """The distribution of an action, given the D outputs of a policy for an observation.

    `log_prob` and `kl` are differentiable, twice, with respect to the outputs. The derivatives of all losses follow.

    Class attributes:
        actions: what an action is, in words.
        outputs: what the outputs are, in words.
        model: the option that chooses a model with such outputs.

    Attributes:
        action_dim: A, length of an action.
        num_outputs: D, number of outputs.
    """

    actions: str
    outputs: str
    model: str
    action_dim: int
    num_outputs: int

    @abstractmethod
    def noise(self, stream: Stream, horizon: int) -> Tensor:
        """Draws all random numbers of an episode, ``(H, ...)``; with M streams, ``(M, H, ...)``."""

    @abstractmethod
    def sample(self, outputs: Tensor, noise: Tensor) -> Tensor:
        """Returns an action for each row of outputs and noise, ``(..., A)``; it is not finite if the outputs are not.

        Args:
            outputs: the policy's outputs, ``(..., D)``.
            noise: one timestep's `noise` for each, ``(..., ...)``.
        """

    @abstractmethod
    def log_prob(self, outputs: Tensor, actions: Tensor) -> Tensor:
        """Returns log pi(a|o) of each action: ``(..., D)``, ``(..., A)`` -> ``(...)``."""

    @abstractmethod
    def kl(self, old: Tensor, new: Tensor) -> Tensor:
        """Returns KL(old || new) of the distributions of two outputs: ``(..., D)`` -> ``(...)``."""

    @abstractmethod
    def fisher(self, outputs: Tensor, weights: Tensor) -> Product:
        """Returns the product with the Fisher information, the Hessian of ``weights * kl(outputs, new)`` at outputs.

        Args:
            outputs: the policy's outputs, ``(..., D)``; they have no gradient.
            weights: weight of each row, ``(...)``.
        """


class Gaussian(Distribution):
    """Independent normal numbers. The outputs are A means, then A logarithms of standard deviations.

    Args:
        action_dim: A, length of an action.
    """

    actions = "real numbers"
    outputs = "means and standard deviations"
    model = "model=gaussian_policy"

    def __init__(self, action_dim: int) -> None:
        self.action_dim, self.num_outputs = action_dim, 2 * action_dim

    def noise(self, stream: Stream, horizon: int) -> Tensor:
        return stream.normal((horizon, self.action_dim))

    def sample(self, outputs: Tensor, noise: Tensor) -> Tensor:
        mean, log_std = outputs.chunk(2, dim=-1)
        return torch.addcmul(mean, log_std.exp(), noise)

    def log_prob(self, outputs: Tensor, actions: Tensor) -> Tensor:
        mean, log_std = outputs.chunk(2, dim=-1)
        standard = (actions - mean) * (-log_std).exp()
        return -(0.5 * standard.square() + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)

    def kl(self, old: Tensor, new: Tensor) -> Tensor:
        old_mean, old_log_std = old.chunk(2, dim=-1)
        mean, log_std = new.chunk(2, dim=-1)
        spread = (2 * old_log_std).exp() + (old_mean - mean).square()
        return (log_std - old_log_std + 0.5 * spread * (-2 * log_std).exp() - 0.5).sum(-1)

    def fisher(self, outputs: Tensor, weights: Tensor) -> Product:
        log_std = outputs.chunk(2, dim=-1)[1]
        # 1 / variance for the mean, 2 for the log standard deviation.
        metric = weights.unsqueeze(-1) * torch.cat([(-2 * log_std).exp(), torch.full_like(log_std, 2.0)], dim=-1)
        return lambda vector: metric * vector


class Categorical(Distribution):
    """One of N choices. The outputs are N scores, log-probabilities up to a constant; an action is the choice's number.

    Numbers go from 0 to N - 1. They are held as floats, as all actions are.

    Args:
        num_choices: N.
    """

    actions = "numbered choices"
    outputs = "a score for each choice"
    model = "model=categorical_policy"
    action_dim = 1

    def __init__(self, num_choices: int) -> None:
        self.num_outputs = num_choices

    def noise(self, stream: Stream, horizon: int) -> Tensor:
        return stream.uniform((horizon, 1), dtype=torch.float64)

    def sample(self, outputs: Tensor, noise: Tensor) -> Tensor:
        probabilities = outputs.double().softmax(-1)
        # Not `cumsum`: on a GPU it has no deterministic version for such numbers.
        up_to = torch.ones(self.num_outputs, self.num_outputs, dtype=torch.float64, device=outputs.device).tril()
        cumulative = (probabilities.unsqueeze(-2) * up_to).sum(-1)
        # The last sum is 1 up to rounding; it is left out, so that no number beyond the last is drawn.
        number = (cumulative[..., :-1] <= noise).sum(-1, keepdim=True).to(outputs.dtype)
        return number.where(cumulative[..., -1:].isfinite(), torch.nan)

    def log_prob(self, outputs: Tensor, actions: Tensor) -> Tensor:
        return outputs.log_softmax(-1).gather(-1, actions.long()).squeeze(-1)

    def kl(self, old: Tensor, new: Tensor) -> Tensor:
        old_logs, logs = old.log_softmax(-1), new.log_softmax(-1)
        return (old_logs.exp() * (old_logs - logs)).sum(-1)

    def fisher(self, outputs: Tensor, weights: Tensor) -> Product:
        probabilities = outputs.softmax(-1)

        def product(vector: Tensor) -> Tensor:
            mean = (probabilities * vector).sum(-1, keepdim=True)
            return weights.unsqueeze(-1) * probabilities * (vector - mean)

        return product
