"""ResNet-12, the residual network of most few-shot papers after the paper's (not in the paper)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch.nn.functional as F
from annotated_types import Len
from torch import Tensor

from maml.errors import MamlError
from maml.model.base import Model, glorot_uniform, image_shape, ones, zeros
from maml.model.functional import conv1x1, conv3x3, max_pool, normalize_layer
from maml.seeding import Stream
from maml.types import Count, Params

_NUM_BLOCKS, _CONVS_PER_BLOCK = 4, 3
_SLOPE = 0.1


class ResNet12(Model):
    """Four residual blocks of three 3x3 convolutions, then one linear layer.

    A block is [convolution, batch normalisation, leaky ReLU] twice, then convolution and normalisation. A 1x1
    convolution of the block's input, normalised too, is added; leaky ReLU and 2x2 max-pooling follow. The slope of
    leaky ReLU is 0.1. Convolutions have no bias; normalisation learns a scale and a shift.

    Departure: Lee et al. (2019), who published the default widths, drop features at random in training (dropout and
    DropBlock). Both are left out: a loss here is a function of theta and the tasks alone. Normalisation adds 0.001 to
    variances as everywhere in this project, and not 0.00001.

    Args:
        in_shape: shape of one image: height, width, channels.
        out_dim: number of classes.
        widths: number of filters in each block. The other common choice is 64, 128, 256, 512.
        head: input of the last layer: ``mean`` averages the last block's output over space; ``flatten`` takes all of
            it.

    Raises:
        MamlError: if the images are too small for four halvings.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_dim: int,
        widths: Annotated[tuple[Count, ...], Len(_NUM_BLOCKS, _NUM_BLOCKS)] = (64, 160, 320, 640),
        head: Literal["mean", "flatten"] = "mean",
    ) -> None:
        height, width, self.num_channels = image_shape("resnet12", in_shape)
        height, width = height >> _NUM_BLOCKS, width >> _NUM_BLOCKS
        if height * width == 0:
            raise MamlError(f"images of {in_shape[0]}x{in_shape[1]} are too small to be halved {_NUM_BLOCKS} times")
        self.out_dim, self.widths, self.head = out_dim, widths, head
        self.num_features = widths[-1] * (height * width if head == "flatten" else 1)

    def init(self, stream: Stream) -> Params:
        """Draws normal kernels with variance 2 / fan-out (He et al. 2015) and a Glorot-uniform head; shifts are 0."""
        params: Params = {}
        channels = self.num_channels
        for i, filters in enumerate(self.widths, start=1):
            sizes = {
                f"conv{j}": (filters, channels if j == 1 else filters, 3, 3) for j in range(1, _CONVS_PER_BLOCK + 1)
            }
            for name, shape in (sizes | {"shortcut": (filters, channels, 1, 1)}).items():
                std = (2 / (filters * shape[2] * shape[3])) ** 0.5
                layer = f"block{i}.{name}"
                params[f"{layer}.weight"] = stream.child(layer).normal(shape, std=std)
                params[f"{layer}.norm.scale"] = ones(stream, filters)
                params[f"{layer}.norm.shift"] = zeros(stream, filters)
            channels = filters
        head = (self.out_dim, self.num_features)
        params["head.weight"] = glorot_uniform(stream.child("head"), head, self.num_features, self.out_dim)
        params["head.bias"] = zeros(stream, self.out_dim)
        return params

    def features(
        self, params: Params, x: Tensor, num_reference: int | None = None, seen: Params | None = None
    ) -> Tensor:
        def convolve_and_normalize(layer: str, x: Tensor) -> Tensor:
            weight = params[f"{layer}.weight"]
            x = conv1x1(x, weight) if weight.shape[-1] == 1 else conv3x3(x, weight)
            return normalize_layer(params, f"{layer}.norm", x, num_reference, seen)

        for i in range(1, _NUM_BLOCKS + 1):
            shortcut = convolve_and_normalize(f"block{i}.shortcut", x)
            for j in range(1, _CONVS_PER_BLOCK + 1):
                x = convolve_and_normalize(f"block{i}.conv{j}", x)
                x = F.leaky_relu(x + shortcut if j == _CONVS_PER_BLOCK else x, _SLOPE)
            x = max_pool(x)
        return x.mean((2, 3)) if self.head == "mean" else x.flatten(2)
