"""The convolutional network of Kaiser et al. (2017): two pairs of convolutions, then a linear representation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from maml.environment.distribution import Categorical
from maml.model.base import Model, image_shape, zeros
from maml.model.functional import conv3x3, for_tasks, linear, max_pool
from maml.seeding import Stream
from maml.types import Count, Params

_STD = 0.1  # all initial weights are normal, cut off at two standard deviations (authors' code)


class ConvPairs(Model):
    """Two modules of [3x3 convolution, ReLU, 3x3 convolution, ReLU, 2x2 max-pooling], then two linear layers.

    The first linear layer gives the features; the second one is the head. Nothing is normalised.

    Args:
        in_shape: shape of one image: height, width, channels.
        out_dim: number of classes.
        num_filters: number of filters of the first two convolutions; the other two have twice as many.
        rep_dim: number of features, D.

    Raises:
        MamlError: if the inputs are not images.
    """

    distribution = Categorical

    def __init__(
        self,
        in_shape: Sequence[int],
        out_dim: int,
        num_filters: Count = 64,
        rep_dim: Count = 256,
    ) -> None:
        height, width, channels = image_shape("conv_pairs", in_shape)
        first, second = num_filters, 2 * num_filters
        self._channels = [(channels, first), (first, first), (first, second), (second, second)]
        for _ in range(2):
            height, width = (height + 1) // 2, (width + 1) // 2
        self._flat, self.num_features, self.out_dim = height * width * second, rep_dim, out_dim

    def init(self, stream: Stream) -> Params:
        """Draws truncated normal weights; biases are 0 (authors' code)."""

        def weights(name: str, *shape: int) -> Tensor:
            return stream.child(name).normal(shape, _STD, bound=2)

        params: Params = {}
        for i, (inputs, filters) in enumerate(self._channels, start=1):
            kernel = weights(f"conv{i}", filters, inputs, 3, 3)
            params[f"conv{i}.weight"] = kernel.contiguous(memory_format=torch.channels_last)
            params[f"conv{i}.bias"] = zeros(stream, filters)
        for name, shape in (
            ("representation", (self.num_features, self._flat)),
            ("head", (self.out_dim, self.num_features)),
        ):
            params[f"{name}.weight"] = weights(name, *shape)
            params[f"{name}.bias"] = zeros(stream, shape[0])
        return params

    def features(
        self, params: Params, x: Tensor, num_reference: int | None = None, seen: Params | None = None
    ) -> Tensor:
        for i in range(1, 5):
            x = conv3x3(x, params[f"conv{i}.weight"])
            # Adding a bias and ReLU are monotone, so pooling first is equivalent, on a quarter of the values.
            if i % 2 == 0:
                x = max_pool(x, keep_odd=True)
            x = torch.relu(x + for_tasks(params[f"conv{i}.bias"], len(x)).reshape(len(x), 1, 1, 1, -1))
        return linear(x.flatten(2), params["representation.weight"], params["representation.bias"])

    def uses_running_statistics(self, params: Params) -> bool:
        """Returns True: nothing is normalised, so an output depends on no other example."""
        return True
