"""The networks of the neural statistician (Edwards and Storkey 2017): an encoder of sets and a decoder of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from maml.model.base import Model, glorot_uniform, image_shape, ones, zeros
from maml.model.functional import (
    add_seen,
    conv1x1,
    conv3x3,
    conv_transpose2x2,
    for_tasks,
    linear,
    normalize_layer,
)
from maml.model.normalization import norm_elu
from maml.seeding import Stream
from maml.types import Count, Params

_NUM_LEVELS, _CONVS_PER_LEVEL, _BLOCK_LAYERS = 3, 3, 3


class DiagonalNormal(NamedTuple):
    """Normal distributions with independent entries.

    Attributes:
        mean: ``(..., D)``.
        log_variance: as the mean.
    """

    mean: Tensor
    log_variance: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Returns a sample, made from standard normal numbers."""
        return torch.addcmul(self.mean, (0.5 * self.log_variance).exp(), noise)

    def kl(self, other: Self | None = None) -> Tensor:
        """Returns the divergence KL(self || other), ``(...)``; None is the standard normal distribution."""
        mean, log_variance = self
        if other is None:
            return 0.5 * (log_variance.exp() + mean.square() - 1 - log_variance).sum(-1)
        difference = log_variance - other.log_variance
        distance = (mean - other.mean).square() * (-other.log_variance).exp()
        return 0.5 * (difference.exp() + distance - 1 - difference).sum(-1)


class Statistician(Model):
    """The four networks of the neural statistician, with a shared encoder of images.

    A set of images has a context c, and each of its images a latent z. Layers are normalised, with scale and shift, and
    followed by ELU, but for the last of a network and those that c, z and images enter by.

    - The encoder: three levels of three 3x3 convolutions, the last with stride 2. Widths double from level to level.
    - The statistic network q(c | D): one layer per image, the mean over the set, the number of its images as one more
      feature, two layers, and a linear one.
    - The inference network q(z | x, c) and the prior p(z | c): linear maps of the image's code and of c, added; a
      residual block of three layers; a linear layer.
    - The decoder p(x | z, c), Bernoulli: linear maps of z and c, added; a linear layer; and the encoder mirrored, with
      2x2 transposed convolutions of stride 2.

    As a network for other algorithms, its features are those that the statistic network takes the mean of.

    Departure: the paper leaves sizes to an appendix; they are those of a public reimplementation. That code also
    normalises the outputs of the first three networks with one mean and variance for all entries, and lets
    the decoder's images shrink in a convolution without padding, where we cut them to the encoder's sizes.

    Args:
        in_shape: shape of one image: height, width, channels.
        out_dim: number of outputs for other algorithms.
        num_filters: width of the first level.
        context_size: number of entries of c.
        latent_size: number of entries of z.
        hidden_size: width of all linear layers.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_dim: int,
        num_filters: Count = 64,
        context_size: Count = 512,
        latent_size: Count = 16,
        hidden_size: Count = 256,
    ) -> None:
        self.out_dim, self.num_features = out_dim, hidden_size
        self.context_size, self.latent_size = context_size, latent_size
        height, width, self.num_channels = image_shape("statistician", in_shape)
        self.widths = [num_filters * 2**level for level in range(_NUM_LEVELS)]
        self.sizes = [(height, width)]
        for _ in range(_NUM_LEVELS):
            height, width = (height + 1) // 2, (width + 1) // 2
            self.sizes.append((height, width))
        self.code_size = self.widths[-1] * height * width

    def _linear_layers(self) -> dict[str, tuple[int, int]]:
        """Returns the outputs and inputs of all linear layers."""
        hidden, context, latent = self.num_features, self.context_size, self.latent_size
        block = {f"block{layer}": (hidden, hidden) for layer in range(1, _BLOCK_LAYERS + 1)}
        layers = {
            "statistic.image": (hidden, self.code_size),
            "statistic.set1": (hidden, hidden + 1),
            "statistic.set2": (hidden, hidden),
            "statistic.last": (2 * context, hidden),
            "inference.image": (hidden, self.code_size),
            "decoder.latent": (hidden, latent),
            "decoder.context": (hidden, context),
            "decoder.grow": (self.code_size, hidden),
            "head": (self.out_dim, hidden),
        }
        for network in ("inference", "prior"):
            layers |= {f"{network}.{name}": sizes for name, sizes in block.items()}
            layers |= {f"{network}.context": (hidden, context), f"{network}.last": (2 * latent, hidden)}
        return layers

    def _convolutions(self) -> dict[str, tuple[int, int, int]]:
        """Returns the filters, input channels and kernel size of all convolutions; those of size 2 are transposed."""
        layers = {}
        channels = self.num_channels
        for level, width in enumerate(self.widths, start=1):
            for conv in range(1, _CONVS_PER_LEVEL + 1):
                layers[f"encoder.level{level}.conv{conv}"] = (width, channels, 3)
                channels = width
        for level, width in reversed(list(enumerate(self.widths, start=1))):
            layers[f"decoder.level{level}.conv1"] = (width, channels, 3)
            layers[f"decoder.level{level}.conv2"] = (width, width, 3)
            layers[f"decoder.level{level}.up"] = (width, width, 2)
            channels = width
        return layers | {"decoder.pixels": (self.num_channels, channels, 1)}

    def init(self, stream: Stream) -> Params:
        """Draws Glorot-uniform weights; biases and shifts are 0, scales 1."""
        params: Params = {}
        for layer, (outputs, inputs) in self._linear_layers().items():
            params[f"{layer}.weight"] = glorot_uniform(stream.child(layer), (outputs, inputs), inputs, outputs)
            params[f"{layer}.bias"] = zeros(stream, outputs)
            if layer.rpartition(".")[2].startswith(("set", "block")) or layer == "statistic.image":
                params |= _init_norm(layer, stream, outputs)
        for layer, (filters, channels, size) in self._convolutions().items():
            # Each pixel of a transposed convolution with the stride of its size has one input pixel.
            area = 1 if size == 2 else size * size
            shape = (filters, channels, size, size)
            kernel = glorot_uniform(stream.child(layer), shape, area * channels, area * filters)
            # The channels are last in memory, as in the images.
            params[f"{layer}.weight"] = kernel.contiguous(memory_format=torch.channels_last)
            if layer == "decoder.pixels":
                params[f"{layer}.bias"] = zeros(stream, filters)
            else:
                params |= _init_norm(layer, stream, filters)
        return params

    def features(
        self, params: Params, x: Tensor, num_reference: int | None = None, seen: Params | None = None
    ) -> Tensor:
        return self.embed(params, self.encode(params, x, num_reference, seen), num_reference, seen)

    def encode(self, params: Params, x: Tensor, num_reference: int | None = None, seen: Params | None = None) -> Tensor:
        """Returns the codes of images, ``(T, S, code_size)``; the arguments are those of `features`."""
        for layer in (name for name in self._convolutions() if name.startswith("encoder")):
            x = conv3x3(x, params[f"{layer}.weight"], stride=2 if layer.endswith(f"conv{_CONVS_PER_LEVEL}") else 1)
            x = _norm_elu(params, layer, x, num_reference, seen)
        return x.flatten(2)

    def embed(
        self, params: Params, codes: Tensor, num_reference: int | None = None, seen: Params | None = None
    ) -> Tensor:
        """Returns what the statistic network takes the mean of, ``(T, S, num_features)``, from the images' codes."""
        return _layer(params, "statistic.image", codes, num_reference, seen)

    def context(self, params: Params, means: Tensor, counts: Tensor, seen: Params | None = None) -> DiagonalNormal:
        """Returns q(c | D) of sets.

        Args:
            params: as in `features`.
            means: the means of `embed` over the images of each set, ``(T, N, num_features)``.
            counts: number of these images, ``(T, N)``.
            seen: as in `features`.
        """
        x = torch.cat([means, counts.unsqueeze(2)], 2)
        for layer in ("statistic.set1", "statistic.set2"):
            x = _layer(params, layer, x, None, seen)
        return _split(_linear(params, "statistic.last", x))

    def posterior(self, params: Params, codes: Tensor, context: Tensor, seen: Params | None = None) -> DiagonalNormal:
        """Returns q(z | x, c) of images.

        Args:
            params: as in `features`.
            codes: the images' codes, ``(T, K * N, code_size)``, K blocks with one image of each of N sets.
            context: c of each set, ``(T, N, context_size)``.
            seen: as in `features`.
        """
        x = _linear(params, "inference.image", codes)
        x = x + per_image(_linear(params, "inference.context", context), x.shape[1])
        return self._latent(params, "inference", x, seen)

    def prior(self, params: Params, context: Tensor, seen: Params | None = None) -> DiagonalNormal:
        """Returns p(z | c), ``(T, N, latent_size)``; the arguments are those of `posterior`."""
        return self._latent(params, "prior", _linear(params, "prior.context", context), seen)

    def _latent(self, params: Params, network: str, x: Tensor, seen: Params | None) -> DiagonalNormal:
        start = x = F.elu(x)
        for layer in range(1, _BLOCK_LAYERS + 1):
            name = f"{network}.block{layer}"
            x = _linear(params, name, x)
            if layer < _BLOCK_LAYERS:
                x = _norm_elu(params, name, x, None, seen)
        x = F.elu(normalize_layer(params, f"{name}.norm", x, None, seen) + start)
        return _split(_linear(params, f"{network}.last", x))

    def decode(self, params: Params, latent: Tensor, context: Tensor, seen: Params | None = None) -> Tensor:
        """Returns the logits of the pixels' probabilities p(x = 1 | z, c), ``(T, K * N, H, W, C)``.

        Args:
            params: as in `features`.
            latent: z of each image, ``(T, K * N, latent_size)``, in the order of `posterior`.
            context: c of each set, ``(T, N, context_size)``.
            seen: as in `features`.
        """
        x = _linear(params, "decoder.latent", latent)
        x = F.elu(x + per_image(_linear(params, "decoder.context", context), x.shape[1]))
        x = _linear(params, "decoder.grow", x).unflatten(2, (*self.sizes[-1], self.widths[-1]))
        for level in range(_NUM_LEVELS, 0, -1):
            for name in ("conv1", "conv2", "up"):
                layer = f"decoder.level{level}.{name}"
                if name == "up":
                    height, width = self.sizes[level - 1]
                    x = conv_transpose2x2(x, params[f"{layer}.weight"])[:, :, :height, :width]
                else:
                    x = conv3x3(x, params[f"{layer}.weight"])
                x = _norm_elu(params, layer, x, None, seen)
        bias = for_tasks(params["decoder.pixels.bias"], len(x))
        return conv1x1(x, params["decoder.pixels.weight"]) + bias[:, None, None, None]


def per_image(values: Tensor, num_images: int) -> Tensor:
    """Returns the value of each image's set: ``(T, N, ...)`` -> ``(T, K * N, ...)``."""
    tasks, sets, *rest = values.shape
    return values.unsqueeze(1).expand(tasks, num_images // sets, sets, *rest).flatten(1, 2)


def _init_norm(layer: str, stream: Stream, size: int) -> Params:
    return {f"{layer}.norm.scale": ones(stream, size), f"{layer}.norm.shift": zeros(stream, size)}


def _linear(params: Params, layer: str, x: Tensor) -> Tensor:
    return linear(x, params[f"{layer}.weight"], params[f"{layer}.bias"])


def _layer(params: Params, layer: str, x: Tensor, num_reference: int | None, seen: Params | None) -> Tensor:
    return _norm_elu(params, layer, _linear(params, layer, x), num_reference, seen)


def _norm_elu(params: Params, layer: str, x: Tensor, num_reference: int | None, seen: Params | None) -> Tensor:
    if num_reference is not None or f"{layer}.norm.mean" in params:
        return F.elu(normalize_layer(params, f"{layer}.norm", x, num_reference, seen))
    moments: list[Tensor] = []
    y = norm_elu(x, params[f"{layer}.norm.shift"], params[f"{layer}.norm.scale"], moments)
    if seen is not None:
        mean, variance = moments
        add_seen(seen, f"{layer}.norm", mean, variance, x)
    return y


def _split(outputs: Tensor) -> DiagonalNormal:
    mean, log_variance = outputs.chunk(2, dim=-1)
    return DiagonalNormal(mean, log_variance)
