"""Distributions of actions against those of torch, and their derivatives against autograd, in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import hessian, jacobian
from torch.distributions import Distribution as TorchDistribution
from torch.distributions import kl_divergence

from maml.environment.distribution import Categorical, Distribution, Gaussian
from maml.seeding import Stream

KINDS: dict[str, Distribution] = {
    "gaussian": Gaussian(3),
    "categorical": Categorical(4),
    "one choice": Categorical(1),
}


def torchs(distribution: Distribution, outputs: Tensor) -> TorchDistribution:
    """Returns torch's distribution of actions ``(..., A)``."""
    if isinstance(distribution, Categorical):
        return torch.distributions.Categorical(logits=outputs)
    mean, log_std = outputs.chunk(2, dim=-1)
    return torch.distributions.Independent(torch.distributions.Normal(mean, log_std.exp()), 1)


def drawn(distribution: Distribution, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Returns two different outputs and actions, of 2 tasks and 5 timesteps, in float64."""
    shape = (2, 5, distribution.num_outputs)
    old, new = (Stream(seed + i).normal(shape).double() for i in range(2))
    noise = distribution.noise(Stream(torch.tensor([3, 4])), 5)
    return old, new, distribution.sample(old, noise.double())


@pytest.mark.parametrize("kind", KINDS)
def test_log_probability_and_divergence_are_torchs(kind: str) -> None:
    distribution = KINDS[kind]
    old, new, actions = drawn(distribution)
    assert actions.shape == (2, 5, distribution.action_dim)
    given = actions.squeeze(-1) if isinstance(distribution, Categorical) else actions
    torch.testing.assert_close(distribution.log_prob(new, actions), torchs(distribution, new).log_prob(given))
    expected = kl_divergence(torchs(distribution, old), torchs(distribution, new))
    torch.testing.assert_close(distribution.kl(old, new), expected)
    assert (expected > 0).all() or kind == "one choice"
    assert distribution.kl(old, old).abs().max() < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_fisher_is_the_hessian_of_the_weighted_divergence(kind: str) -> None:
    distribution = KINDS[kind]
    outputs, vector, _ = drawn(distribution)
    weights = Stream(9).uniform((2, 5)).double()
    product = distribution.fisher(outputs, weights)(vector)
    for task in range(2):
        for time in range(5):
            old = outputs[task, time]
            divergence = partial(_divergence, distribution, old)
            matrix = weights[task, time] * hessian(divergence, old)
            torch.testing.assert_close(product[task, time], matrix @ vector[task, time], rtol=1e-9, atol=1e-12)


def _divergence(distribution: Distribution, old: Tensor, new: Tensor) -> Tensor:
    return kl_divergence(torchs(distribution, old), torchs(distribution, new))


@pytest.mark.parametrize("kind", KINDS)
def test_log_probability_has_torchs_derivatives(kind: str) -> None:
    distribution = KINDS[kind]
    _, outputs, actions = drawn(distribution)
    action, output = actions[0, 0], outputs[0, 0]
    given = action.squeeze(-1) if isinstance(distribution, Categorical) else action
    for derivative in (jacobian, hessian):
        ours = derivative(lambda x: distribution.log_prob(x, action), output)
        expected = derivative(lambda x: torchs(distribution, x).log_prob(given), output)
        torch.testing.assert_close(ours, expected)


def test_log_probability_is_of_the_unclipped_action() -> None:
    outputs, actions = torch.tensor([[0.5, -0.5, 0.1, -0.2]]), torch.tensor([[3.0, -4.0]])
    gaussian = Gaussian(2)
    torch.testing.assert_close(gaussian.log_prob(outputs, actions), torchs(gaussian, outputs).log_prob(actions))


def test_choices_are_as_frequent_as_their_probabilities() -> None:
    scores = torch.tensor([0.5, -torch.inf, 2.0, -1.0])
    noise = Categorical(4).noise(Stream(0), 20_000)
    actions = Categorical(4).sample(scores.expand(20_000, 4), noise)
    assert actions.shape == (20_000, 1) and actions.dtype == torch.float32
    counts = torch.bincount(actions[:, 0].long(), minlength=4)
    expected = 20_000 * scores.softmax(-1)
    assert counts[1] == 0, "an impossible choice"
    assert ((counts - expected).abs() <= 5 * expected.sqrt()).all()


def test_extreme_noise_gives_a_possible_choice() -> None:
    scores = torch.zeros(2, 7)  # 1/7 seven times is not exactly 1
    below_one = torch.tensor([[0.0], [1 - 2.0**-53]], dtype=torch.float64)
    assert Categorical(7).sample(scores, below_one).tolist() == [[0.0], [6.0]]


def test_normal_numbers_have_mean_and_deviation() -> None:
    noise = Gaussian(2).noise(Stream(torch.arange(3)), 4)
    assert noise.shape == (3, 4, 2)
    sample = Gaussian(2).sample(torch.tensor([1.0, -2.0, 0.0, 0.5]).expand(3, 4, 4), noise)
    torch.testing.assert_close(sample, torch.tensor([1.0, -2.0]) + torch.tensor([0.0, 0.5]).exp() * noise)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_action_of_outputs_that_are_not_finite_is_not_finite(kind: str, broken: float) -> None:
    distribution = KINDS[kind]
    outputs = torch.zeros(2, distribution.num_outputs)
    outputs[1, 0] = broken
    sample = distribution.sample(outputs, distribution.noise(Stream(0), 2))
    assert sample[0].isfinite().all() and not sample[1].isfinite().all()
