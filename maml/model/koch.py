"""The convolutional network of Koch et al. (2015), whose features a Siamese network compares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Len
from torch import Tensor, nn

from maml.errors import MamlError
from maml.model.base import image_shape
from maml.types import Count

_OfEach = Annotated[tuple[Count, ...], Len(4, 4)]


class Koch(nn.Module):
    """Four convolutions with ReLU, the first three followed by 2x2 max-pooling; then sigmoid(linear), the features.

    Departure: initial weights are PyTorch's; those of Koch et al. could not be confirmed.

    Args:
        in_shape: height, width and channels of an image; 105x105 in the source.
        out_dim: number of classes.
        widths: number of filters of each convolution.
        kernels: height and width of the kernels of each convolution.
        num_features: number of units of the linear layer.

    Raises:
        MamlError: if the inputs are no images, or these are too small.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_dim: int,
        widths: _OfEach = (64, 128, 128, 256),
        kernels: _OfEach = (10, 7, 4, 4),
        num_features: Count = 4096,
    ) -> None:
        super().__init__()
        height, width, channels = image_shape("koch", in_shape, "omniglot_alphabets")
        layers: list[nn.Module] = []
        for i, (kernel, filters) in enumerate(zip(kernels, widths, strict=True)):
            layers += [nn.Conv2d(channels, filters, kernel), nn.ReLU()]
            channels, height, width = filters, height - kernel + 1, width - kernel + 1
            if i < len(kernels) - 1:
                layers.append(nn.MaxPool2d(2))
                height, width = height // 2, width // 2
        if min(height, width) < 1:
            raise MamlError(
                f"images of {in_shape[0]}x{in_shape[1]} are too small for model.module.kernels={list(kernels)}; lower "
                "them, or choose images of 105x105, as domain=omniglot_alphabets has by default"
            )
        self.convolutions = nn.Sequential(*layers, nn.Flatten())
        self.linear = nn.Linear(channels * height * width, num_features)
        self.head = nn.Linear(num_features, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the outputs, ``(S, out_dim)``, for images ``(S, C, H, W)``."""
        return self.head(torch.sigmoid(self.linear(self.convolutions(x))))
