"""The adapter that runs any ``torch.nn.Module`` as f_theta, one set of parameters per task."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from maml.errors import MamlError, first_line
from maml.hardware.precision import autocast
from maml.model import checks
from maml.model.base import Model
from maml.model.functional import for_tasks
from maml.seeding import Stream
from maml.status import announce
from maml.types import Params

# A call puts the parameters into the module, so one thread at a time calls it.
_alone = RLock()
# How the warning begins with which vmap computes an operation task by task.
_SLOW_RULE = "There is a performance drop"


class ModuleModel(Model):
    """Any module that maps a batch of inputs to a batch of outputs.

    Images are passed to the module as ``(S, C, H, W)``, vectors as ``(S, D)``. Batch normalisation layers use the
    statistics of their batch; their buffers are neither read nor changed. Other buffers have their initial values in
    every call. Frozen parameters (``requires_grad=False``) keep their initial values. Lazy layers take their shapes
    from the domain.

    The module is called a few times when it is built. A module that would give wrong numbers is refused before a run
    starts (`maml.model.checks`).

    Args:
        in_shape: shape of one input; of an image, height, width and channels.
        out_dim: number of outputs that the domain needs.
        module: class of the network, or a function that returns one, and its arguments. It may draw initial values
            from the global generators of torch, NumPy and Python, which have the run's seed then. Arguments called
            ``in_shape`` and ``out_dim`` get the domain's values if the config does not set them, so that one module
            serves all domains.
        vectorize: whether all tasks are computed at once. If ``torch.func.vmap`` cannot transform the module, a line
            says so, and one task is computed at a time. False does that without an attempt.

    Raises:
        MamlError: if the module cannot take the domain's inputs, returns anything but one tensor ``(S, out_dim)``,
            cannot be differentiated, or if its outputs depend on more than its parameters and inputs.
    """

    def __init__(
        self, in_shape: Sequence[int], out_dim: int, module: Callable[..., nn.Module], vectorize: bool = True
    ) -> None:
        self.make = partial(module, **_left_open(module, {"in_shape": tuple(in_shape), "out_dim": out_dim}))
        self.is_image = len(in_shape) == 3
        self._example = Stream(0).uniform((2, 2, *in_shape))
        first, second = self._make(seed=0), self._make(seed=0)
        # A function may return layers that it keeps, such as pretrained ones. They are not changed.
        self._copies = bool(set(first.modules()) & set(second.modules()))
        self.net, twin = self._prepare(first, seed=0), self._prepare(second, seed=0)
        checks.check_equal_constructions(self.net, twin)
        self._places = checks.places(self.net)
        self._trained = [name for name, _ in _trained(self.net)]
        if found := [name for name, value in _trained(self.net) if value.is_complex()]:
            raise MamlError(
                f"model.module has the complex parameter {found[0]}, but the optimizers here are for real ones; let "
                "the layer have a real one and use torch.view_as_complex"
            )
        self._changed_buffers: Params = {}
        self._is_recurrent = any(isinstance(layer, nn.RNNBase) for layer in self.net.modules())
        if taken := [name for name in self._trained if name.startswith("inner.")]:
            raise MamlError(
                f"model.module has the parameter {taken[0]}, but names that start with 'inner.' belong to the inner "
                "optimizer and do not adapt; give the layer another name"
            )
        self.vectorize = False
        with checks.seeded(0):
            self._check(twin, out_dim)
            self.num_features = self._count_features()
            self.vectorize = vectorize and self._can_be_vectorized()

    def _make(self, seed: int) -> nn.Module:
        with checks.seeded(seed):
            net = self.make()
        if not isinstance(net, nn.Module):
            raise MamlError(
                f"model.module gives an object of class {type(net).__name__}, not a torch.nn.Module; name the class of "
                "a network, or a function that returns one"
            )
        return net

    def _prepare(self, net: nn.Module, seed: int) -> nn.Module:
        """Returns the module with lazy layers initialised and batch normalisation replaced."""
        net = copy.deepcopy(net) if self._copies else net
        if any(is_lazy(value) for value in (*net.parameters(), *net.buffers())):
            with checks.seeded(Stream(seed).child("lazy").key), torch.no_grad(), self._naming_failure():
                net(self._inputs(self._example)[0])
        replaced: dict[_BatchNorm, _BatchStatistics] = {}
        for name, layer in list(net.named_modules(remove_duplicate=False)):
            if isinstance(layer, _DropoutNd) and layer.p > 0:
                raise MamlError(
                    f"model.module has dropout ({name}, p={layer.p}), whose draws no seed of a run controls; set p=0"
                )
            if isinstance(layer, _BatchNorm):
                if not name:
                    raise MamlError("model.module is itself a batch normalisation layer; wrap it in a network")
                is_plain = type(layer).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
                hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks)
                if not is_plain or any(hooks) or is_parametrized(layer):
                    raise MamlError(
                        f"model.module has a batch normalisation layer ({name}, {type(layer).__name__}) with a "
                        "forward, hooks or parametrizations of its own. They would be lost, because these layers are "
                        "replaced by ours; do that in a layer after it"
                    )
                if layer not in replaced:
                    replaced[layer] = _BatchStatistics(layer)
                net.set_submodule(name, replaced[layer])
        return net

    def _check(self, twin: nn.Module, out_dim: int) -> None:
        """Refuses a module that would fail later or give wrong numbers."""
        theta, x = self._example_params(), self._inputs(self._example)
        tasks = [{name: value[task] for name, value in theta.items()} for task in range(2)]

        def call(task: int) -> Any:
            return self._outputs(self.net, tasks[task], x[task])

        buffers = checks.BufferValues(self.net)
        with torch.no_grad(), self._naming_failure(), checks.refusing_changes({"its inputs": x, **theta}):
            first = checks.check_draws(self.net, lambda: call(0))
            checks.check_outputs(first, x.shape[1], out_dim)
            second, again = call(1), call(0)
            checks.check_independence(first, again, buffers)
            checks.check_parameters_are_registered(second, twin, tasks[1], lambda: self._outputs(twin, {}, x[1]))
            self._changed_buffers = {name: value for name, value in buffers.changed().items() if name in self._places}
        with self._naming_failure():
            own = {name: value.detach().requires_grad_() for name, value in tasks[1].items()}
            checks.check_gradient(
                (self._outputs(self.net, own, x[1].clone()), own),
                (self._outputs(twin, {}, x[1].clone()), dict(_trained(twin))),
            )
        buffers.restore()
        if any(isinstance(layer, _BatchStatistics) for layer in self.net.modules()):
            more = torch.cat([self._example, Stream(1).uniform(self._example[:, :1].shape)], 1)
            with torch.no_grad(), self._naming_failure():
                checks.check_reference(self(theta, more, num_reference=2)[:, :2], self(theta, self._example))
        with self._naming_failure():
            unused = checks.check_derivative(self(*self._first_task(theta)), theta)
        if unused:
            _announce_once(f"model.module does not use {', '.join(unused)} in forward: they keep their initial values")

    def _can_be_vectorized(self) -> bool:
        """Whether vmap can transform the module; if not, a line says why."""
        theta = self._example_params()
        self.vectorize = True
        try:
            with warnings.catch_warnings():
                # Where vmap lacks a rule for an operation, it computes that one task by task, and warns in each call.
                warnings.filterwarnings("error", _SLOW_RULE)
                self(theta, self._example)
                self(self._first_task(theta)[0], self._example)  # as weights that tasks share
        except Exception as error:
            reason = first_line(error).partition(". ")[0]
            _announce_once(
                f"model.module computes one task at a time, which is slower: torch.func.vmap fails on it ({reason})"
            )
            return False
        return True

    def check_second_derivative(self) -> None:
        theta = self._example_params()
        if theta:
            with checks.seeded(0), warnings.catch_warnings():
                # Even where vmap has all rules for several tasks, it may lack one for the strides of a single task.
                warnings.filterwarnings("ignore", _SLOW_RULE)
                checks.check_second_derivative(self(*self._first_task(theta)), theta)

    def _example_params(self) -> Params:
        """Returns different parameters for two tasks, name -> ``(2, ...)``, leaves of a graph."""
        initial = {name: value.detach().cpu() for name, value in _trained(self.net)}
        tasks = [checks.moved(initial, number) for number in range(2)]
        return {name: torch.stack([task[name] for task in tasks]).requires_grad_() for name in initial}

    def _first_task(self, theta: Params) -> tuple[Params, Tensor]:
        return {name: value[:1] for name, value in theta.items()}, self._example[:1]

    @contextmanager
    def _naming_failure(self) -> Iterator[None]:
        try:
            yield
        except MamlError:
            raise
        except Exception as error:
            shape = tuple(self._inputs(self._example).shape[1:])
            raise MamlError(f"model.module cannot be run on inputs of shape {shape}: {error}") from error

    def init(self, stream: Stream) -> Params:
        """Builds the module again under the run's seed and returns its parameters."""
        assert isinstance(stream.key, int)
        net = self._prepare(self._make(stream.key), stream.key)
        return {name: value.detach().clone().to(stream.device) for name, value in _trained(net)}

    def _inputs(self, x: Tensor) -> Tensor:
        return x.movedim(-1, -3) if self.is_image else x

    def __call__(self, params: Params, x: Tensor, num_reference: int | None = None) -> Tensor:
        return self._for_each_task(self._run, params, x, num_reference)

    def features(
        self, params: Params, x: Tensor, num_reference: int | None = None, seen: Params | None = None
    ) -> Tensor:
        """Computes the inputs of the layer called ``head``, ``(T, S, num_features)``.

        Its weights may be left out. There are no running statistics, and none are seen.
        """
        return self._for_each_task(self._run_to_head, params, x, num_reference)

    def outputs(self, params: Params, features: Tensor) -> Tensor:
        head, count = self.net.get_submodule("head").to(features.device), len(features)
        own = {
            place.removeprefix("head."): params[name]
            for name in self._trained
            for place in self._places[name]
            if place.startswith("head.")
        }
        with _alone, autocast(features.device):
            given = features.unflatten(2, self._head_in_shape)
            tasks = [functional_call(head, _of_task(own, i, count), (given[i],)) for i in range(count)]
        return torch.stack(tasks).to(features.dtype)

    def running_statistics(self, params: Params) -> Params:
        return {}

    def _count_features(self) -> int:
        """Returns the number of inputs of the layer called ``head``; 0 if there is none, as `_NoFeatures` says."""
        if not isinstance(getattr(self.net, "head", None), nn.Module):
            return 0
        with torch.no_grad():
            try:
                given = self._for_each_task(self._head_input, {}, self._example, None)
            except _NoFeatures:
                return 0
        self._head_in_shape = given.shape[2:]
        return self._head_in_shape.numel()

    def _for_each_task(
        self, run: Callable[[Params, Tensor, Params], Tensor], params: Params, x: Tensor, num_reference: int | None
    ) -> Tensor:
        """Applies a function of one task's parameters, inputs and buffers to all tasks."""
        with _alone:
            return self._compute_tasks(run, params, x, num_reference)

    def _compute_tasks(
        self, run: Callable[[Params, Tensor, Params], Tensor], params: Params, x: Tensor, num_reference: int | None
    ) -> Tensor:
        for layer in self.net.modules():
            if isinstance(layer, _BatchStatistics):
                layer.share = None if num_reference is None else (num_reference, x.shape[1])
        self.net.to(x.device)
        inputs, count = self._inputs(x), x.shape[0]
        params = {name: params[name] for name in self._trained if name in params}  # no inner optimizer's own
        # Each task has its own copies, so that no task changes what another one reads.
        buffers = {
            name: value.to(x.device).expand(count, *value.shape).clone()
            for name, value in self._changed_buffers.items()
        }
        if self.vectorize:
            has_one_set = all(value.shape[0] == 1 for value in params.values())
            if has_one_set:
                inputs = inputs.contiguous()  # nn.GroupNorm has no rule for the other strides of colour images
            if has_one_set and count > 1:
                # Weights that all tasks share stay without a task axis: a layer then sees one large batch.
                shared = {name: value[0] for name, value in params.items()}
                return vmap(run, in_dims=(None, 0, 0))(shared, inputs, buffers)
            return vmap(run)({name: for_tasks(value, count) for name, value in params.items()}, inputs, buffers)
        tasks = [
            run(_of_task(params, i, count), inputs[i], {name: value[i] for name, value in buffers.items()})
            for i in range(count)
        ]
        return torch.stack(tasks)

    def _run(self, params: Params, x: Tensor, buffers: Params) -> Tensor:
        """Computes one task."""
        return self._outputs(self.net, params | buffers, x).to(x.dtype)

    def _run_to_head(self, params: Params, x: Tensor, buffers: Params) -> Tensor:
        """Computes the features of one task, ``(S, num_features)``."""
        return self._head_input(params, x, buffers).flatten(1)

    def _head_input(self, params: Params, x: Tensor, buffers: Params) -> Tensor:
        """Computes what the layer called ``head`` gets in one task, ``(S, ...)``."""
        calls: list[list[Any]] = []
        head = self.net.get_submodule("head")
        hook = head.register_forward_pre_hook(
            lambda layer, given, named: calls.append([*given, *named.values()]), with_kwargs=True
        )
        try:
            self._outputs(self.net, params | buffers, x)
        finally:
            hook.remove()
        given = calls[0] if len(calls) == 1 else []
        if len(given) != 1 or not isinstance(given[0], Tensor) or given[0].dim() < 2 or len(given[0]) != len(x):
            raise _NoFeatures
        return given[0].to(x.dtype)

    def _outputs(self, net: nn.Module, tensors: Params, x: Tensor) -> Any:
        # Tied tensors and layers that are registered twice: torch's own tie_weights=True replaces some places twice,
        # and then restores what it has put there itself.
        tensors = {place: value for name, value in tensors.items() for place in self._places[name]}
        # Other kernels for attention, and cuDNN's recurrent layers, have no second derivative.
        with autocast(x.device), sdpa_kernel(SDPBackend.MATH), _cudnn(not self._is_recurrent):
            return functional_call(net, tensors, (x,), tie_weights=False)


def _of_task(params: Params, task: int, count: int) -> Params:
    """Returns the parameters of one of ``count`` tasks, which may share them with others."""
    return {name: value[task * len(value) // count] for name, value in params.items()}


class _NoFeatures(Exception):
    """The layer called head is called several times or never, or with other arguments than one tensor ``(S, ...)``."""


def _left_open(make: Callable[..., nn.Module], sizes: dict[str, Any]) -> dict[str, Any]:
    """Returns the sizes that a callable takes by name and that the config does not set."""
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


@contextmanager
def _cudnn(enabled: bool) -> Iterator[None]:
    """Switches cuDNN off if it is not enabled here."""
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = before and enabled
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


@cache
def _announce_once(text: str) -> None:
    """Prints a status line, once for all seeds of a run."""
    announce(text)


def _trained(net: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, value) for name, value in net.named_parameters() if value.requires_grad]


class _BatchStatistics(nn.Module):
    """Replaces a batch normalisation layer: the same parameters, batch statistics, exact second derivatives."""

    def __init__(self, layer: _BatchNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = layer.weight, layer.bias, layer.eps
        self.share: tuple[int, int] | None = None  # reference examples of all

    def forward(self, x: Tensor) -> Tensor:
        x = x.float() if x.dtype == torch.bfloat16 else x
        dims = (0, *range(2, x.dim()))
        # A layer may see several rows of each example, one example after the other.
        reference = x if self.share is None else x[: len(x) * self.share[0] // self.share[1]]
        mean = reference.mean(dims, keepdim=True)
        variance = (reference - mean).square().mean(dims, keepdim=True)
        x = (x - mean) * torch.rsqrt(variance + self.eps)
        shape = (1, -1, *[1] * (x.dim() - 2))
        x = x if self.weight is None else x * self.weight.reshape(shape)
        return x if self.bias is None else x + self.bias.reshape(shape)
