"""The networks of the neural statistician, against PyTorch's layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from maml.errors import MamlError
from maml.model.functional import BATCH_NORM_EPS
from maml.model.statistician import DiagonalNormal, Statistician, per_image
from maml.seeding import Stream
from maml.types import Params

pytestmark = pytest.mark.usefixtures("float64")

SMALL = {"num_filters": 2, "context_size": 3, "latent_size": 2, "hidden_size": 4}


class PlainStatistician:
    """The same networks for one task, with PyTorch's functions of images ``(S, C, H, W)``.

    Args:
        params: the parameters, without a task axis. If they hold running statistics, these normalise, as in PyTorch's
            evaluation mode.
    """

    def __init__(self, params: Params) -> None:
        self.params = params
        self.batches: dict[str, Tensor] = {}

    def norm(self, layer: str, x: Tensor) -> Tensor:
        self.batches[f"{layer}.norm"] = x.detach()
        shift, scale = (self.params[f"{layer}.norm.{name}"] for name in ("shift", "scale"))
        mean, variance = (self.params.get(f"{layer}.norm.{name}") for name in ("mean", "variance"))
        return F.batch_norm(x, mean, variance, scale, shift, training=mean is None, eps=BATCH_NORM_EPS)

    def linear(self, layer: str, x: Tensor) -> Tensor:
        return F.linear(x, self.params[f"{layer}.weight"], self.params[f"{layer}.bias"])

    def encode(self, images: Tensor) -> Tensor:
        x = images
        for level in (1, 2, 3):
            for conv in (1, 2, 3):
                layer = f"encoder.level{level}.conv{conv}"
                x = F.conv2d(x, self.params[f"{layer}.weight"], stride=2 if conv == 3 else 1, padding=1)
                x = F.elu(self.norm(layer, x))
        return x.permute(0, 2, 3, 1).flatten(1)

    def embed(self, codes: Tensor) -> Tensor:
        return F.elu(self.norm("statistic.image", self.linear("statistic.image", codes)))

    def context(self, embedded_sets: list[Tensor]) -> list[Normal]:
        """Returns q(c | D) of each set, from the embedded images that it sees."""
        x = torch.stack([torch.cat([images.mean(0), torch.tensor([float(len(images))])]) for images in embedded_sets])
        for layer in ("statistic.set1", "statistic.set2"):
            x = F.elu(self.norm(layer, self.linear(layer, x)))
        return [normal(row) for row in self.linear("statistic.last", x)]

    def latents(self, network: str, entered: Tensor) -> list[Normal]:
        start = x = F.elu(entered)
        for layer in (f"{network}.block1", f"{network}.block2"):
            x = F.elu(self.norm(layer, self.linear(layer, x)))
        x = F.elu(self.norm(f"{network}.block3", self.linear(f"{network}.block3", x)) + start)
        return [normal(row) for row in self.linear(f"{network}.last", x)]

    def posterior(self, codes: Tensor, contexts: Tensor) -> list[Normal]:
        """Returns q(z | x, c) of each image, from its code and the context of its set."""
        entered = self.linear("inference.image", codes) + self.linear("inference.context", contexts)
        return self.latents("inference", entered)

    def prior(self, contexts: Tensor) -> list[Normal]:
        return self.latents("prior", self.linear("prior.context", contexts))

    def decode(self, latents: Tensor, contexts: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        """Returns logits, ``(S, C, H, W)``, from z and the context of each image."""
        x = F.elu(self.linear("decoder.latent", latents) + self.linear("decoder.context", contexts))
        height, width = sizes[3]
        x = self.linear("decoder.grow", x).unflatten(1, (height, width, -1)).permute(0, 3, 1, 2)
        for level in (3, 2, 1):
            height, width = sizes[level - 1]
            for conv in ("conv1", "conv2"):
                layer = f"decoder.level{level}.{conv}"
                x = F.elu(self.norm(layer, F.conv2d(x, self.params[f"{layer}.weight"], padding=1)))
            layer = f"decoder.level{level}.up"
            x = F.conv_transpose2d(x, self.params[f"{layer}.weight"].transpose(0, 1), stride=2)
            x = F.elu(self.norm(layer, x[:, :, :height, :width]))
        return F.conv2d(x, self.params["decoder.pixels.weight"], self.params["decoder.pixels.bias"])


def normal(row: Tensor) -> Normal:
    mean, log_variance = row.chunk(2)
    return Normal(mean, log_variance.exp().sqrt())


def with_noise(params: Params) -> Params:
    """Returns parameters of which none is 0 or 1, so that a forgotten one shows."""
    return {name: value + Stream(7).child(name).normal(value.shape, std=0.2) for name, value in params.items()}


def assert_equal(found: DiagonalNormal, expected: list[Normal]) -> None:
    torch.testing.assert_close(found.mean[0], torch.stack([each.mean for each in expected]))
    torch.testing.assert_close(found.log_variance[0].exp(), torch.stack([each.variance for each in expected]))


@pytest.mark.parametrize("in_shape", [(28, 28, 1), (9, 6, 2)])
def test_networks_equal_those_of_torch(in_shape: tuple[int, ...]) -> None:
    model = Statistician(in_shape, 6, **SMALL)
    params = with_noise(model.init(Stream(0)))
    x = Stream(1).uniform((1, 6, *in_shape))
    own, plain = {name: value.unsqueeze(0) for name, value in params.items()}, PlainStatistician(params)
    codes = model.encode(own, x)
    expected = plain.encode(x[0].permute(0, 3, 1, 2))
    torch.testing.assert_close(codes[0], expected)
    embedded, means = plain.embed(expected), model.embed(own, codes).unflatten(1, (2, 3)).mean(1)
    counts = torch.full((1, 3), 2.0)
    contexts = model.context(own, means, counts)
    assert_equal(contexts, plain.context([embedded[[number, number + 3]] for number in range(3)]))
    c, z = Stream(2).normal((1, 3, 3)), Stream(3).normal((1, 6, 2))
    spread = c[0].repeat(2, 1)
    assert torch.equal(per_image(c, 6)[0], spread)
    assert_equal(model.posterior(own, codes, c), plain.posterior(expected, spread))
    assert_equal(model.prior(own, c), plain.prior(c[0]))
    logits = model.decode(own, z, c)
    torch.testing.assert_close(logits[0].permute(0, 3, 1, 2), plain.decode(z[0], spread, model.sizes))
    assert logits.shape == x.shape


def test_default_networks_have_the_sizes_of_the_reimplementation() -> None:
    """Its 8,361,537 parameters, less the biases that normalisation cancels, and one more feature of a set."""
    params = Statistician((28, 28, 1), 1).init(Stream(0))
    num_cancelled = 6 * (64 + 128 + 256)  # six convolutions of each width
    size = sum(value.numel() for name, value in params.items() if not name.startswith("head"))
    assert size == 8_361_537 + 256 - num_cancelled


def test_divergences_are_those_of_torch() -> None:
    one, other = (DiagonalNormal(*Stream(seed).normal((2, 5, 7)).unbind(0)) for seed in (0, 1))
    p, q, standard = (
        Independent(Normal(mean, (log_variance / 2).exp()), 1)
        for mean, log_variance in (one, other, (torch.zeros(5, 7), torch.zeros(5, 7)))
    )
    torch.testing.assert_close(one.kl(other), kl_divergence(p, q))
    torch.testing.assert_close(other.kl(one), kl_divergence(q, p))
    torch.testing.assert_close(one.kl(), kl_divergence(p, standard))
    noise = Stream(2).normal((5, 7))
    torch.testing.assert_close(one.sample(noise), one.mean + noise * one.log_variance.exp().sqrt())


def test_vectors_are_refused() -> None:
    with pytest.raises(MamlError, match=r"model=statistician takes images \(height, width, channels\)"):
        Statistician((6,), 2)
