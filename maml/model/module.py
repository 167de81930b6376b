"""The adapter that runs any ``torch.nn.Module`` as f_theta, one set of parameters per task."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from maml.errors import MamlError
from maml.hardware.precision import autocast
from maml.model.base import Model
from maml.seeding import Stream
from maml.types import Params


class ModuleModel(Model):
    """Any module that maps a batch of inputs to a batch of outputs.

    Images reach the module as ``(S, C, H, W)``, vectors as ``(S, D)``. Batch normalisation layers run on the statistics
    of the batch they are given; their buffers are neither read nor changed. Parameters that the module froze
    (``requires_grad=False``) stay as it made them.

    Args:
        in_shape: shape of one input, images as height, width, channels.
        out_dim: outputs that the domain needs.
        module: makes the network, under the run's seed. If it has a parameter called ``out_dim`` or ``in_shape`` that
            the config leaves open, it is given the domain's, so that one module serves domains of any size.
        vectorize: False runs the tasks one at a time, for modules that ``torch.func.vmap`` cannot transform.

    Raises:
        MamlError: if the module cannot take the domain's inputs or gives another number of outputs.
    """

    def __init__(
        self, in_shape: Sequence[int], out_dim: int, module: Callable[..., nn.Module], vectorize: bool = True
    ) -> None:
        self.vectorize = vectorize
        self.make = partial(module, **_left_open(module, {"in_shape": tuple(in_shape), "out_dim": out_dim}))
        self.is_image = len(in_shape) == 3
        self.net = self._build(seed=0)
        example = torch.zeros(1, 2, *in_shape)
        params = {name: value.detach().unsqueeze(0) for name, value in _trained(self.net)}
        try:
            out = self(params, example)
        except Exception as error:
            raise MamlError(
                f"model.module cannot be run on inputs of shape {self._inputs(example).shape[1:]}: {error}"
            ) from error
        if out.shape != (1, 2, out_dim):
            raise MamlError(
                f"model.module gives outputs of shape {tuple(out.shape[2:])}, but the domain needs ({out_dim},): "
                "change the module's last layer, or give its constructor a parameter called out_dim to be told"
            )

    def _build(self, seed: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            net = copy.deepcopy(self.make())
        for name, layer in list(net.named_modules()):
            if isinstance(layer, _DropoutNd) and layer.p > 0:
                raise MamlError(
                    f"model.module has dropout ({name}, p={layer.p}), whose draws no seed of a run controls; set p=0"
                )
            if isinstance(layer, _BatchNorm):
                if not name:
                    raise MamlError("model.module is itself a batch normalisation layer; wrap it in a network")
                net.set_submodule(name, _BatchStatistics(layer))
        return net

    def init(self, stream: Stream) -> Params:
        """Builds the module again under the run's seed and returns its parameters."""
        assert isinstance(stream.key, int)
        net = self._build(seed=stream.key)
        return {name: value.detach().clone().to(stream.device) for name, value in _trained(net)}

    def _inputs(self, x: Tensor) -> Tensor:
        return x.movedim(-1, -3) if self.is_image else x

    def __call__(self, params: Params, x: Tensor, num_reference: int | None = None) -> Tensor:
        for layer in self.net.modules():
            if isinstance(layer, _BatchStatistics):
                layer.num_reference = num_reference
        self.net.to(x.device)

        def run(params: Params, x: Tensor) -> Tensor:
            with autocast(x.device):
                return functional_call(self.net, params, (x,)).to(x.dtype)

        if self.vectorize:
            return vmap(run)(params, self._inputs(x))
        one_by_one = [
            run({name: value[i] for name, value in params.items()}, inputs) for i, inputs in enumerate(self._inputs(x))
        ]
        return torch.stack(one_by_one)


def _left_open(make: Callable[..., nn.Module], sizes: dict[str, Any]) -> dict[str, Any]:
    """Returns the sizes that a callable takes by name and that are not filled in yet."""
    try:
        parameters = inspect.signature(make).parameters
    except ValueError:  # some built-in callables have no signature
        return {}
    filled = make.keywords if isinstance(make, partial) else {}
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {
        name: size
        for name, size in sizes.items()
        if name in parameters and parameters[name].kind in by_name and name not in filled
    }


def _trained(net: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, value) for name, value in net.named_parameters() if value.requires_grad]


class _BatchStatistics(nn.Module):
    """Stands in for a batch normalisation layer: its parameters, the batch's statistics, exact second derivatives."""

    def __init__(self, layer: _BatchNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = layer.weight, layer.bias, layer.eps
        self.num_reference: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = x.float() if x.dtype == torch.bfloat16 else x
        dims = (0, *range(2, x.dim()))
        reference = x[: self.num_reference]
        mean = reference.mean(dims, keepdim=True)
        variance = (reference - mean).square().mean(dims, keepdim=True)
        x = (x - mean) * torch.rsqrt(variance + self.eps)
        if self.weight is None:
            return x
        shape = (1, -1, *[1] * (x.dim() - 2))
        return x * self.weight.reshape(shape) + self.bias.reshape(shape)
