"""The convolutional network of Vinyals et al. (2016) with four modules, with the paper's changes (section 5.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from maml.environment.distribution import Categorical
from maml.errors import MamlError
from maml.hardware.kernels import kernels_apply
from maml.model.base import DROPOUT, Model, glorot_uniform, image_shape, ones, zeros
from maml.model.functional import (
    ACTIVATIONS,
    Activation,
    add_seen,
    conv3x3,
    for_tasks,
    max_pool,
    normalize,
    running_or_batch_statistics,
)
from maml.model.normalization import Windows, norm_relu
from maml.seeding import Stream
from maml.types import Count, Decay, Params, PositiveFloat

_NUM_MODULES = 4
# The kinds of pooling that a kernel can do together with normalisation.
_WINDOWS: dict[str, Windows] = {"stride": "none", "max": "max", "max_keep_odd": "max_keep_odd"}


class Conv4(Model):
    """Four modules of [3x3 convolution, batch normalisation, activation, pooling], then one linear layer.

    Padding is one pixel on every side. The authors' TensorFlow pads even sizes at the bottom and right only; turning
    every image by 180 degrees maps one onto the other, and Omniglot's tasks turn their classes at random.

    Args:
        in_shape: shape of one image: height, width, channels.
        out_dim: number of classes.
        num_filters: number of filters in every module.
        pooling: how each module halves its images: ``stride`` convolves with stride 2 (Omniglot); ``max`` takes the
            maximum of 2x2 pixels; ``max_keep_odd`` does so too, but keeps the last row and column of an odd size
            (Reptile); ``mean`` averages 2x2 pixels.
        head: input of the last layer: ``mean`` averages the last module's output over space (Omniglot); ``flatten``
            takes all of it.
        head_std: standard deviation of the last layer's normal initial weights; None is Glorot uniform.
        activation: activation function of every module; the paper's is ``relu``.
        norm_scale: whether normalisation learns a scale in addition to its shift; the authors' does not.
        dropout: share of the values after each module that training drops; only for algorithms that compare embeddings.

    Raises:
        MamlError: if the images are too small for four halvings.
    """

    distribution = Categorical

    def __init__(
        self,
        in_shape: Sequence[int],
        out_dim: int,
        num_filters: Count = 64,
        pooling: Literal["stride", "max", "max_keep_odd", "mean"] = "stride",
        head: Literal["mean", "flatten"] = "mean",
        head_std: PositiveFloat | None = None,
        activation: Activation = "relu",
        norm_scale: bool = False,
        dropout: Decay = 0.0,
    ) -> None:
        height, width, self.num_channels = image_shape("conv4", in_shape)
        sizes = []
        for _ in range(_NUM_MODULES):
            up = pooling in ("stride", "max_keep_odd")
            height, width = (height + up) // 2, (width + up) // 2
            sizes.append((height, width, num_filters))
        if height * width == 0:
            raise MamlError(f"images of {in_shape[0]}x{in_shape[1]} are too small to be halved {_NUM_MODULES} times")
        self.num_features = num_filters * (height * width if head == "flatten" else 1)
        self.out_dim, self.num_filters = out_dim, num_filters
        self.pooling, self.head, self.head_std = pooling, head, head_std
        self.activation = ACTIVATIONS[activation]
        self.norm_scale, self.dropout = norm_scale, dropout
        self._shapes = {f"{DROPOUT}conv{i}": size for i, size in enumerate(sizes, start=1)}
        self._windows = _WINDOWS.get(pooling) if activation == "relu" else None

    def init(self, stream: Stream) -> Params:
        """Draws Glorot-uniform kernels and the head; biases and shifts are 0 (authors' code)."""
        params: Params = {}
        channels, filters = self.num_channels, self.num_filters
        for i in range(1, _NUM_MODULES + 1):
            kernel = glorot_uniform(stream.child(f"conv{i}"), (filters, channels, 3, 3), 9 * channels, 9 * filters)
            # The channels are last in memory, as in the windows that these are multiplied by.
            params[f"conv{i}.weight"] = kernel.contiguous(memory_format=torch.channels_last)
            params[f"conv{i}.bias"] = zeros(stream, filters)
            params[f"norm{i}.shift"] = zeros(stream, filters)
            if self.norm_scale:
                params[f"norm{i}.scale"] = ones(stream, filters)
            channels = filters
        shape = (self.out_dim, self.num_features)
        params["head.weight"] = (
            glorot_uniform(stream.child("head"), shape, self.num_features, self.out_dim)
            if self.head_std is None
            else stream.child("head").normal(shape, std=self.head_std)
        )
        params["head.bias"] = zeros(stream, self.out_dim)
        return params

    def draw_dropout(self, num_examples: int, stream: Stream) -> Params:
        if not self.dropout:
            return {}
        return {
            name: stream.child(name).uniform((num_examples, *shape)) >= self.dropout
            for name, shape in self._shapes.items()
        }

    def _drop(self, x: Tensor, params: Params, module: int) -> Tensor:
        """Drops values of a module's output, if the parameters say which."""
        kept = params.get(f"{DROPOUT}conv{module}")
        return x if kept is None else x * (kept.to(x.dtype) / (1 - self.dropout))

    def features(
        self, params: Params, x: Tensor, num_reference: int | None = None, seen: Params | None = None
    ) -> Tensor:
        for i in range(1, _NUM_MODULES + 1):
            stride = 2 if self.pooling == "stride" else 1
            x = conv3x3(x, params[f"conv{i}.weight"], stride)
            is_plain = num_reference is None and f"norm{i}.mean" not in params
            if self._windows and is_plain and kernels_apply(x):
                # The bias cancels, because the batch's mean is subtracted.
                moments: list[Tensor] | None = None if seen is None else []
                y = norm_relu(x, params[f"norm{i}.shift"], params.get(f"norm{i}.scale"), self._windows, moments)
                if seen is not None and moments:
                    bias = for_tasks(params[f"conv{i}.bias"], len(x))
                    add_seen(seen, f"norm{i}", moments[0] + bias, moments[1], x)
                x = self._drop(y, params, i)
                continue
            # The bias is subtracted from the mean instead of added to every pixel; with the batch's mean it cancels.
            shape = (x.shape[0], 1, 1, 1, -1)
            bias = for_tasks(params[f"conv{i}.bias"], len(x)).reshape(shape)
            mean, variance = running_or_batch_statistics(params, f"norm{i}", x, num_reference)
            if f"norm{i}.mean" not in params:
                mean = mean + bias
            if seen is not None:
                add_seen(seen, f"norm{i}", mean, variance, x)
            scale = params.get(f"norm{i}.scale")
            # Without a scale (which may be negative), normalisation and activation are monotone, so pooling first is
            # equivalent, and a quarter of the values is normalised.
            early = scale is None
            if self.pooling in ("max", "max_keep_odd") and early:
                x = max_pool(x, keep_odd=self.pooling == "max_keep_odd")
            x = normalize(x, mean - bias, variance, params[f"norm{i}.shift"], scale)
            x = self.activation(x)
            if self.pooling in ("max", "max_keep_odd") and not early:
                x = max_pool(x, keep_odd=self.pooling == "max_keep_odd")
            elif self.pooling == "mean":
                height, width = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
                x = x[:, :, :height, :width].unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean((3, 5))
            x = self._drop(x, params, i)
        return x.mean((2, 3)) if self.head == "mean" else x.flatten(2)
