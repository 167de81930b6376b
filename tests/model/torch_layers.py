"""Every layer of torch.nn: how it is built small, how it is called, and what becomes of it as an own network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Limit = Literal["refused", "first order", "one task at a time"]


def plainly(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


@dataclass(frozen=True)
class Case:
    """A small layer.

    Attributes:
        make: builds the layer.
        shape: the shape of its inputs, without the batch axis.
        call: calls it on a batch of such inputs, and returns a tensor.
        limits: what it cannot do. ``first order`` is refused with ``inner.order=2``.
        plain: builds a layer that does the same in plain torch on a CPU, if the layer itself does not; its parameters
            have the same names.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = (4,)
    call: Callable[[Any, Tensor], Tensor] = plainly
    limits: tuple[Limit, ...] = ()
    plain: Callable[[], nn.Module] | None = None


class Surrounded(nn.Module):
    """A linear layer, the layer to test, and another linear layer.

    Args:
        case: the layer.
        out_dim: number of outputs.
        plain: whether `Case.plain` takes the layer's place.
    """

    def __init__(self, case: Case, out_dim: int, plain: bool = False) -> None:
        super().__init__()
        self.case = case
        self.body = nn.Linear(3, torch.Size(case.shape).numel())
        self.layer = (case.plain or case.make)() if plain else case.make()
        self.head = nn.LazyLinear(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x).unflatten(1, self.case.shape)
        return self.head(self.case.call(self.layer, x).flatten(1))


def _pool_and_back(pool: Callable[..., Any]) -> Callable[[Any, Tensor], Tensor]:
    return lambda layer, x: layer(*pool(x, 2, return_indices=True))


LINE, IMAGE, VOLUME = (2, 5), (2, 4, 4), (2, 4, 4, 4)
SHAPES = {1: LINE, 2: IMAGE, 3: VOLUME}
NO_DROPOUT: dict[str, Any] = {"dim_feedforward": 6, "dropout": 0.0, "batch_first": True}

CASES: dict[str, Case] = {
    "AdaptiveLogSoftmaxWithLoss": Case(
        lambda: nn.AdaptiveLogSoftmaxWithLoss(4, 6, [2]), call=lambda layer, x: layer.log_prob(x)
    ),
    "AlphaDropout": Case(nn.AlphaDropout, limits=("refused",)),
    "Bilinear": Case(
        lambda: nn.Bilinear(4, 4, 3), call=lambda layer, x: layer(x, x.tanh()), limits=("one task at a time",)
    ),
    "ChannelShuffle": Case(lambda: nn.ChannelShuffle(2), (4, 2, 2)),
    "CosineSimilarity": Case(nn.CosineSimilarity, call=lambda layer, x: layer(x, x.flip(1)).unsqueeze(1)),
    "CrossMapLRN2d": Case(lambda: nn.CrossMapLRN2d(2), IMAGE, limits=("first order", "one task at a time")),
    "Dropout": Case(nn.Dropout, limits=("refused",)),
    "Dropout1d": Case(nn.Dropout1d, LINE, limits=("refused",)),
    "Dropout2d": Case(nn.Dropout2d, IMAGE, limits=("refused",)),
    "Dropout3d": Case(nn.Dropout3d, VOLUME, limits=("refused",)),
    "Embedding": Case(lambda: nn.Embedding(4, 3), call=lambda layer, x: layer(torch.arange(4)) * x.unsqueeze(-1)),
    "EmbeddingBag": Case(
        lambda: nn.EmbeddingBag(4, 3),
        call=lambda layer, x: layer(torch.arange(4).view(2, 2)) * x.view(-1, 2, 2)[..., :1],
        limits=("first order", "one task at a time"),
    ),
    "FeatureAlphaDropout": Case(nn.FeatureAlphaDropout, limits=("refused",)),
    "Flatten": Case(nn.Flatten, LINE),
    "Fold": Case(lambda: nn.Fold((3, 3), 2), (4, 4)),
    "FractionalMaxPool2d": Case(lambda: nn.FractionalMaxPool2d(2, 2), IMAGE, limits=("refused",)),
    "FractionalMaxPool3d": Case(lambda: nn.FractionalMaxPool3d(2, 2), VOLUME, limits=("refused",)),
    "GLU": Case(nn.GLU),
    "GRU": Case(lambda: nn.GRU(3, 3, batch_first=True), (4, 3), lambda layer, x: layer(x)[0], ("one task at a time",)),
    "GRUCell": Case(lambda: nn.GRUCell(4, 3), limits=("one task at a time",)),
    "GroupNorm": Case(lambda: nn.GroupNorm(1, 2), IMAGE),
    "Hardsigmoid": Case(nn.Hardsigmoid, limits=("first order",)),
    "Identity": Case(nn.Identity),
    "LSTM": Case(
        lambda: nn.LSTM(3, 3, batch_first=True), (4, 3), lambda layer, x: layer(x)[0], ("one task at a time",)
    ),
    "LSTMCell": Case(lambda: nn.LSTMCell(4, 3), call=lambda layer, x: layer(x)[0], limits=("one task at a time",)),
    "LayerNorm": Case(lambda: nn.LayerNorm(4)),
    "Linear": Case(lambda: nn.Linear(4, 3)),
    "LazyLinear": Case(lambda: nn.LazyLinear(3)),
    "LocalResponseNorm": Case(lambda: nn.LocalResponseNorm(2), IMAGE),
    "LogSoftmax": Case(lambda: nn.LogSoftmax(1)),
    "MultiheadAttention": Case(
        lambda: nn.MultiheadAttention(4, 2, batch_first=True), (3, 4), lambda layer, x: layer(x, x, x)[0]
    ),
    "PairwiseDistance": Case(nn.PairwiseDistance, call=lambda layer, x: layer(x, x.flip(1)).unsqueeze(1)),
    "PixelShuffle": Case(lambda: nn.PixelShuffle(2), (4, 2, 2)),
    "PixelUnshuffle": Case(lambda: nn.PixelUnshuffle(2), IMAGE),
    "RMSNorm": Case(lambda: nn.RMSNorm(4)),
    "RNN": Case(lambda: nn.RNN(3, 3, batch_first=True), (4, 3), lambda layer, x: layer(x)[0], ("one task at a time",)),
    "RNNCell": Case(lambda: nn.RNNCell(4, 3), limits=("one task at a time",)),
    "RReLU": Case(nn.RReLU, limits=("refused",)),
    "Softmax": Case(lambda: nn.Softmax(1)),
    "Softmax2d": Case(nn.Softmax2d, IMAGE),
    "Softmin": Case(lambda: nn.Softmin(1)),
    "SyncBatchNorm": Case(lambda: nn.SyncBatchNorm(2), IMAGE, plain=lambda: nn.BatchNorm2d(2)),
    "Threshold": Case(lambda: nn.Threshold(0.1, 0.2)),
    "Transformer": Case(lambda: nn.Transformer(4, 2, 1, 1, **NO_DROPOUT), (3, 4), lambda layer, x: layer(x, x.tanh())),
    "TransformerDecoder": Case(
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, **NO_DROPOUT), 1),
        (3, 4),
        lambda layer, x: layer(x, x.tanh()),
    ),
    "TransformerDecoderLayer": Case(
        lambda: nn.TransformerDecoderLayer(4, 2, **NO_DROPOUT), (3, 4), lambda layer, x: layer(x, x.tanh())
    ),
    "TransformerEncoder": Case(
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, **NO_DROPOUT), 1), (3, 4)
    ),
    "TransformerEncoderLayer": Case(lambda: nn.TransformerEncoderLayer(4, 2, **NO_DROPOUT), (3, 4)),
    "Unflatten": Case(lambda: nn.Unflatten(1, (2, 2))),
    "Unfold": Case(lambda: nn.Unfold(2), IMAGE),
    "Upsample": Case(lambda: nn.Upsample(scale_factor=2, mode="bilinear"), IMAGE),
    "UpsamplingBilinear2d": Case(lambda: nn.UpsamplingBilinear2d(scale_factor=2), IMAGE),
    "UpsamplingNearest2d": Case(lambda: nn.UpsamplingNearest2d(scale_factor=2), IMAGE),
}
ACTIVATIONS: list[type[nn.Module]] = [
    *(nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.LogSigmoid, nn.Mish),
    *(nn.PReLU, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink, nn.Softsign),
    *(nn.Tanh, nn.Tanhshrink),
]
CASES |= {layer.__name__: Case(layer) for layer in ACTIVATIONS}
for dims, shape in SHAPES.items():

    def of(name: str, *arguments: Any, lazy: bool = False, dims: int = dims, **options: Any) -> Callable[[], nn.Module]:
        return lambda: getattr(nn, f"{'Lazy' * lazy}{name}{dims}d")(*arguments, **options)

    CASES |= {
        f"AdaptiveAvgPool{dims}d": Case(of("AdaptiveAvgPool", 2), shape),
        f"AdaptiveMaxPool{dims}d": Case(of("AdaptiveMaxPool", 2), shape),
        f"AvgPool{dims}d": Case(of("AvgPool", 2), shape),
        f"BatchNorm{dims}d": Case(of("BatchNorm", 2), shape),
        f"CircularPad{dims}d": Case(of("CircularPad", 1), shape),
        f"ConstantPad{dims}d": Case(of("ConstantPad", 1, 0.5), shape),
        f"Conv{dims}d": Case(of("Conv", 2, 2, 2), shape),
        f"ConvTranspose{dims}d": Case(of("ConvTranspose", 2, 2, 2), shape),
        f"InstanceNorm{dims}d": Case(of("InstanceNorm", 2, affine=True, track_running_stats=True), shape),
        f"LPPool{dims}d": Case(of("LPPool", 2, 2), shape),
        f"LazyBatchNorm{dims}d": Case(of("BatchNorm", lazy=True), shape),
        f"LazyConv{dims}d": Case(of("Conv", 2, 2, lazy=True), shape),
        f"LazyConvTranspose{dims}d": Case(of("ConvTranspose", 2, 2, lazy=True), shape),
        f"LazyInstanceNorm{dims}d": Case(of("InstanceNorm", affine=True, lazy=True), shape),
        f"MaxPool{dims}d": Case(of("MaxPool", 2), shape),
        f"MaxUnpool{dims}d": Case(
            of("MaxUnpool", 2),
            shape,
            _pool_and_back(getattr(nn.functional, f"max_pool{dims}d")),
            ("one task at a time",),
        ),
        f"ReflectionPad{dims}d": Case(of("ReflectionPad", 1), shape),
        f"ReplicationPad{dims}d": Case(of("ReplicationPad", 1), shape),
        f"ZeroPad{dims}d": Case(of("ZeroPad", 1), shape),
    }

# Modules that compute nothing themselves, or that nn has for other purposes than being part of a network.
NO_LAYERS = {
    "Container", "DataParallel", "Module", "ModuleDict", "ModuleList", "ParameterDict", "ParameterList", "RNNBase",
    "RNNCellBase", "Sequential",
}  # fmt: skip


def layers() -> list[str]:
    """Returns the names of all layers in torch.nn. Losses, ``torch.nn.modules.loss``, are none."""
    found = {
        name: value for name, value in vars(nn).items() if isinstance(value, type) and issubclass(value, nn.Module)
    }
    return sorted(
        name for name, value in found.items() if value.__module__ != "torch.nn.modules.loss" and name not in NO_LAYERS
    )
