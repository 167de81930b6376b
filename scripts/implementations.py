"""The same meta-gradient and training step in several implementations: ours, a plain loop, and other libraries.

A library that cannot be imported, or fails, is reported as missing. `pip install -e '.[bench]'` installs all of them
except learn2learn 0.2.0, which no longer builds. Its pure-Python part is enough: the folders ``algorithms``, ``nn``,
``optim`` and ``utils``, with an ``__init__.py`` that imports only those.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from benchmark import PEERS, Unavailable
from torch import Tensor, nn

from maml.algorithm.base import Algorithm
from maml.config.compose import compose
from maml.config.names import locate
from maml.config.schema import Settings, build
from maml.data.cache import ImageSet
from maml.domain.classification import FewShotClassification, Splits
from maml.errors import first_line
from maml.experiment import build_algorithm
from maml.hardware.base import Hardware
from maml.hardware.kernels import use_kernels
from maml.model.conv4 import Conv4
from maml.seeding import Stream
from maml.training.autotune import tune_execution
from maml.training.cuda_graph import CudaGraphIteration, with_cuda_graph
from maml.training.iteration import Iteration, meta_update
from maml.types import Params, Tasks

# Largest relative error of the whole gradient.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
_BATCH_NORM_EPS = 1e-3
# Number of images of each class, as in Omniglot. No task needs more.
_NUM_IMAGES = 20

Episode = tuple[Tensor, Tensor, Tensor, Tensor]
"""Support inputs and targets, query inputs and targets, of one task."""


class Noise(FewShotClassification):
    """A domain with the shapes of an image set and noise as pixels; it needs no files, and takes the same time.

    Args:
        image_set: address of the image set's domain class.
        num_ways: number of classes per task, N.
        num_shots: number of support images per class, K.
        num_query: number of query images per class; None is the domain's default.
    """

    scale = 255.0

    def __init__(self, image_set: str, num_ways: int, num_shots: int, num_query: int | None) -> None:
        like: type[FewShotClassification] = locate(image_set)
        self.in_shape, self.num_train_classes, self.rotate = like.in_shape, like.num_train_classes, like.rotate
        super().__init__(num_ways, num_shots, data_dir="", cache_dir="", num_query=num_query)

    def load(self, data_dir: Path, cache_dir: Path) -> tuple[ImageSet, Splits]:
        generator = torch.Generator().manual_seed(0)
        sizes = (self.num_train_classes, _NUM_IMAGES, *self.in_shape)
        pixels = torch.randint(256, sizes, dtype=torch.uint8, generator=generator)
        classes = torch.arange(self.num_train_classes)
        return ImageSet(pixels, classes=[], digest=""), {"train": classes, "val": classes, "test": classes}


def build_as_trained(settings: Settings) -> tuple[Algorithm, Iteration | CudaGraphIteration]:
    """Builds an algorithm from a config, with the chunk size and CUDA graph of training.

    Returns:
        The algorithm, and a function that makes one training iteration.
    """
    torch.backends.cudnn.allow_tf32 = False  # as in training with precision=float32
    hardware: Hardware = build(settings.hardware)
    algorithm = build_algorithm(settings, hardware)
    execution = hardware.choose(algorithm.domain.workload, settings.num_iterations, {})
    hardware.apply(execution)
    streams = [Stream(settings.seed, hardware.device)]
    iterate = Iteration([algorithm], streams, settings.meta_batch_size, execution)
    execution = tune_execution(iterate, execution, hardware, settings)
    hardware.apply(execution)
    return algorithm, with_cuda_graph(Iteration([algorithm], streams, settings.meta_batch_size, execution))


class Problem:
    """The problem that all implementations solve: an experiment's meta-gradient at the same theta and tasks.

    Args:
        experiment: name of the experiment.
        overrides: overrides of its config.
        device: device of the computation.
        dtype: dtype of theta and data.

    Attributes:
        settings: the experiment's settings, with images replaced by noise.
        algorithm: the experiment's algorithm, with ``theta``.
        theta: random parameters; with training's initial ones, second derivatives could be lost in rounding.
        tasks: one meta-batch.
    """

    def __init__(
        self,
        experiment: str,
        overrides: Sequence[str] = (),
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.experiment, self.device, self.dtype = experiment, torch.device(device), dtype
        threads = f"hardware.num_threads={torch.get_num_threads()}"
        where = f"hardware.device={self.device.type}"
        self.settings, _ = compose([f"+experiment={experiment}", where, threads, *overrides])
        self.settings = replace(self.settings, precision="float64" if dtype == torch.float64 else "float32")
        domain = self.settings.domain
        if issubclass(locate(domain["_target_"]), FewShotClassification):
            sizes = {key: domain[key] for key in ("num_ways", "num_shots", "num_query")}
            noise = {"_target_": f"{__name__}.Noise", "image_set": domain["_target_"], **sizes}
            self.settings = replace(self.settings, domain=noise)
        self.algorithm, _ = self.build({"compile": False})
        generator = torch.Generator().manual_seed(0)
        self.theta: Params = {}
        for name, value in self.algorithm.theta.items():
            scale = math.sqrt(2 / value[0].numel()) if value.dim() > 1 else 0.1
            drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64) * scale
            self.theta[name] = drawn.to(self.device, dtype)
        self.algorithm.theta = self.theta
        self.tasks = self.sample(0)

    @property
    def num_tasks(self) -> int:
        """The number of tasks of a meta-batch, B."""
        return self.settings.meta_batch_size

    @property
    def is_image(self) -> bool:
        """Whether the network is convolutional; otherwise it is fully connected."""
        return isinstance(self.algorithm.model, Conv4)

    def build(self, hardware: Mapping[str, Any]) -> tuple[Algorithm, Iteration | CudaGraphIteration]:
        """Builds the algorithm and the training iteration, with other values of some settings of ``hardware``."""
        return build_as_trained(replace(self.settings, hardware={**self.settings.hardware, **hardware}))

    def sample(self, iteration: int) -> Tasks:
        """Samples the tasks of one training iteration."""
        return self.cast(self.algorithm.sample_tasks(self.num_tasks, Stream(0, self.device).child(iteration)))

    def cast(self, tasks: Tasks) -> Tasks:
        """Moves tasks to the device, and converts floating-point tensors to the dtype."""
        kinds = {name: self.dtype if value.is_floating_point() else value.dtype for name, value in tasks.items()}
        return {name: value.to(self.device, kinds[name]) for name, value in tasks.items()}

    def data(self, tasks: Tasks) -> list[Tensor]:
        """Returns inputs and targets of the support sets, then of the query sets; images are channels-last."""
        parts = [self.algorithm.domain.data(tasks, role) for role in ("support", "query")]
        return [value for part in parts for value in (part.x, part.y)]

    def episodes(self, tasks: Tasks) -> Iterator[Episode]:
        """Yields the data of one task at a time, with images channels-first as in PyTorch."""
        values = [value.movedim(-1, 2).contiguous() if value.dim() == 5 else value for value in self.data(tasks)]
        yield from zip(*values, strict=True)

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Returns the loss of one task."""
        if not self.is_image:
            return F.mse_loss(outputs, y)
        return F.cross_entropy(outputs, y, reduction="sum") / self.algorithm.domain.num_shots


class Implementation(ABC):
    """One way to compute the meta-gradient and to train."""

    @abstractmethod
    def gradient(self, tasks: Tasks) -> Mapping[str, Any]:
        """Returns the meta-gradient at the current theta, by parameter name, as arrays of the library."""

    @abstractmethod
    def step(self, tasks: Tasks) -> object:
        """Makes one meta-update with Adam."""

    def iterate(self, problem: Problem, number: int) -> object:
        """Makes a whole training iteration: samples tasks, then makes a step."""
        return self.step(problem.sample(number))


# Ours.


class Ours(Implementation):
    """Our implementation, with the chunk size that it chooses for this hardware.

    Args:
        problem: the problem to solve.
        hardware: values of some settings of ``hardware``; ``compile`` is off unless it is among them.

    Raises:
        Unavailable: if it should be compiled, but compilation fails; or there are no kernels to leave out.
    """

    def __init__(self, problem: Problem, **hardware: Any) -> None:
        if "kernels" in hardware and not problem.is_image:
            raise Unavailable("it has none")
        self._algorithm, self._iterate = problem.build({"compile": False, **hardware})
        if problem.dtype == torch.float32:  # Adam's state is in float32
            for name, value in self._algorithm.theta.items():
                value.copy_(problem.theta[name])
        else:
            self._algorithm.theta = problem.theta
        iterate = self._iterate.iterate if isinstance(self._iterate, CudaGraphIteration) else self._iterate
        self._meta_gradient = iterate.meta_gradient
        self._kernels = self._meta_gradient.execution.kernels
        if self._meta_gradient.execution.compile:
            self.gradient(problem.tasks)
            if not self._meta_gradient.execution.compile:
                raise Unavailable("does not compile here")

    def gradient(self, tasks: Tasks) -> Params:
        use_kernels(self._kernels)  # a switch of the process, and another implementation may have set it
        return self._meta_gradient.gradient(self._algorithm.theta | self._algorithm.buffers, tasks)[0]

    def step(self, tasks: Tasks) -> object:
        use_kernels(self._kernels)
        return meta_update(self._algorithm, self._meta_gradient, tasks)

    def iterate(self, problem: Problem, number: int) -> object:
        use_kernels(self._kernels)
        return self._iterate(number)


# One task at a time, as in the libraries' own examples.


class OneByOne(Implementation):
    """Accumulates the tasks' gradients in ``theta``, one task at a time, and makes Adam's step.

    Args:
        problem: the problem to solve.
        theta: leaf tensors, by name.
        backward: adds one task's gradients to those of the leaves.
    """

    def __init__(self, problem: Problem, theta: Params, backward: Callable[[Episode], None]) -> None:
        self._problem, self._theta, self._backward = problem, theta, backward
        outer = problem.settings.outer
        self._clip = outer["clip"]
        self._adam = torch.optim.Adam([*theta.values()], outer["step_size"])

    def gradient(self, tasks: Tasks) -> Mapping[str, Any]:
        self._adam.zero_grad()
        for episode in self._problem.episodes(tasks):
            self._backward(episode)
        return {name: leaf.grad for name, leaf in self._theta.items() if leaf.grad is not None}

    def step(self, tasks: Tasks) -> None:
        self.gradient(tasks)
        if self._clip is not None:
            nn.utils.clip_grad_value_(self._theta.values(), self._clip)
        self._adam.step()


BatchNorm = Callable[[Tensor, Tensor], Tensor]


def batch_norm(x: Tensor, shift: Tensor, num_reference: int | None = None) -> Tensor:
    """Normalises with the batch's statistics and adds a shift.

    It does not call ``F.batch_norm``, which has no double backward without a weight.

    Args:
        x: images, ``(N, C, H, W)``.
        shift: one number per channel, ``(C,)``.
        num_reference: number of leading examples from which the statistics are computed; None is all.
    """
    variance, mean = torch.var_mean(x[:num_reference], (0, 2, 3), correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + _BATCH_NORM_EPS) + shift.view(1, -1, 1, 1)


def _fused_batch_norm(x: Tensor, shift: Tensor) -> Tensor:
    """Does the same with PyTorch's kernel. Outside vmap its double backward is right if there is a weight, here 1."""
    return F.batch_norm(x, None, None, torch.ones_like(shift), shift, training=True, eps=_BATCH_NORM_EPS)


def network(problem: Problem, params: Params, x: Tensor, batch_norm: BatchNorm = batch_norm) -> Tensor:
    """Computes the network's outputs for one task's inputs; images are channels-first."""
    model = problem.algorithm.model
    if not isinstance(model, Conv4):
        for i in (1, 2):
            x = F.relu(F.linear(x, params[f"linear{i}.weight"], params[f"linear{i}.bias"]))
        return F.linear(x, params["head.weight"], params["head.bias"])
    for i in range(1, 5):
        stride = 2 if model.pooling == "stride" else 1
        x = F.conv2d(x, params[f"conv{i}.weight"], params[f"conv{i}.bias"], stride, padding=1)
        x = F.relu(batch_norm(x, params[f"norm{i}.shift"]))
        if model.pooling == "max":
            x = F.max_pool2d(x, 2)
    x = x.mean((2, 3)) if model.head == "mean" else _channels_last(x)
    return F.linear(x, params["head.weight"], params["head.bias"])


def _channels_last(x: Tensor) -> Tensor:
    """Flattens feature maps in the order of our head's weights."""
    return x.permute(0, 2, 3, 1).flatten(1)


def loop(problem: Problem, batch_norm: BatchNorm = batch_norm) -> Implementation:
    """Returns the plain loop: functional PyTorch, with the graph of only one task in memory at a time."""
    inner = problem.algorithm.inner
    theta = {name: value.clone().requires_grad_() for name, value in problem.theta.items()}
    adapted = inner.adapted_names([*theta])

    def backward(episode: Episode) -> None:
        support_x, support_y, query_x, query_y = episode
        phi = dict(theta)
        for _ in range(inner.num_steps):
            loss = problem.loss(network(problem, phi, support_x, batch_norm), support_y)
            gradients = torch.autograd.grad(loss, [phi[name] for name in adapted], create_graph=True)
            phi |= {name: phi[name] - inner.step_size * g for name, g in zip(adapted, gradients, strict=True)}
        (problem.loss(network(problem, phi, query_x, batch_norm), query_y) / problem.num_tasks).backward()

    return OneByOne(problem, theta, backward)


def fused_loop(problem: Problem) -> Implementation:
    """Returns the plain loop with PyTorch's batch normalisation kernel."""
    if not problem.is_image:
        raise Unavailable("no batch normalisation")
    return loop(problem, _fused_batch_norm)


class _BatchNorm(nn.Module):
    """Batch normalisation with a plain tensor as shift, because the libraries would adapt a parameter."""

    shift: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return batch_norm(x, self.shift)


class _Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class _Flatten(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _channels_last(x)


def _module(problem: Problem) -> tuple[nn.Module, Params]:
    """Returns the network as a module, as a library's user would write it, and its parameters by our names."""
    model, theta = problem.algorithm.model, problem.theta
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if not isinstance(model, Conv4):
        for i in (1, 2):
            layers |= {f"linear{i}": nn.Linear(*theta[f"linear{i}.weight"].T.shape), f"relu{i}": nn.ReLU()}
        layers["head"] = nn.Linear(*theta["head.weight"].T.shape)
    else:
        for i in range(1, 5):
            filters, channels = theta[f"conv{i}.weight"].shape[:2]
            convolution = nn.Conv2d(channels, filters, 3, 2 if model.pooling == "stride" else 1, padding=1)
            layers |= {f"conv{i}": convolution, f"norm{i}": _BatchNorm(), f"relu{i}": nn.ReLU()}
            if model.pooling == "max":
                layers[f"pool{i}"] = nn.MaxPool2d(2)
        layers["features"] = _Mean() if model.head == "mean" else _Flatten()
        layers["head"] = nn.Linear(*theta["head.weight"].T.shape)
    module = nn.Sequential(layers)
    leaves: Params = {}
    for name, value in theta.items():
        layer, _, attribute = name.partition(".")
        leaf = value.clone().requires_grad_() if attribute == "shift" else nn.Parameter(value.clone())
        setattr(module.get_submodule(layer), attribute, leaf)
        leaves[name] = leaf
    return module, leaves


def learn2learn(problem: Problem) -> Implementation:
    """Returns ``learn2learn.algorithms.MAML``."""
    library = _library("learn2learn")
    inner, (module, leaves) = problem.algorithm.inner, _module(problem)
    learner = library.algorithms.MAML(module, lr=inner.step_size, first_order=False)

    def backward(episode: Episode) -> None:
        support_x, support_y, query_x, query_y = episode
        clone = learner.clone()
        for _ in range(inner.num_steps):
            clone.adapt(problem.loss(clone(support_x), support_y))
        (problem.loss(clone(query_x), query_y) / problem.num_tasks).backward()

    return OneByOne(problem, leaves, backward)


def higher(problem: Problem) -> Implementation:
    """Returns ``higher.innerloop_ctx``."""
    library = _library("higher")
    inner, (module, leaves) = problem.algorithm.inner, _module(problem)
    sgd = torch.optim.SGD(module.parameters(), lr=inner.step_size)

    def backward(episode: Episode) -> None:
        support_x, support_y, query_x, query_y = episode
        with library.innerloop_ctx(module, sgd, copy_initial_weights=False) as (functional, optimizer):
            for _ in range(inner.num_steps):
                optimizer.step(problem.loss(functional(support_x), support_y))
            (problem.loss(functional(query_x), query_y) / problem.num_tasks).backward()

    return OneByOne(problem, leaves, backward)


def torchopt(problem: Problem) -> Implementation:
    """Returns ``torchopt.MetaSGD``."""
    library = _library("torchopt")
    inner, (module, leaves) = problem.algorithm.inner, _module(problem)
    sgd = library.MetaSGD(module, lr=inner.step_size)
    start = library.extract_state_dict(module, by="reference"), library.extract_state_dict(sgd, by="reference")

    def backward(episode: Episode) -> None:
        support_x, support_y, query_x, query_y = episode
        for _ in range(inner.num_steps):
            sgd.step(problem.loss(module(support_x), support_y))
        (problem.loss(module(query_x), query_y) / problem.num_tasks).backward()
        library.recover_state_dict(module, start[0])
        library.recover_state_dict(sgd, start[1])

    return OneByOne(problem, leaves, backward)


# JAX.


class Jax(Implementation):
    """One jitted program. Points are vectorised over tasks; images go one task at a time. Each is faster on a CPU."""

    def __init__(self, problem: Problem) -> None:
        os.environ.setdefault("NPROC", str(torch.get_num_threads()))  # the size of JAX's thread pool
        self._jax, self._problem = _library("jax"), problem
        try:
            self._jax.devices(problem.device.type)
        except RuntimeError as error:
            raise Unavailable(f"JAX has no such device ({error})") from error
        with self._precision():
            self._theta = dict(zip(problem.theta, self._arrays(problem.theta.values()), strict=True))
            self._state = self._jax.tree.map(lambda value: (0 * value, 0 * value), self._theta), 0.0
        self._gradient, self._update = self._jax.jit(self._meta_gradient), self._jax.jit(self._adam)

    def gradient(self, tasks: Tasks) -> Mapping[str, Any]:
        with self._precision():
            data = self._arrays(self._problem.data(tasks))
            return dict(self._jax.block_until_ready(self._gradient(self._theta, data)))

    def step(self, tasks: Tasks) -> None:
        with self._precision():
            data = self._arrays(self._problem.data(tasks))
            self._theta, self._state = self._jax.block_until_ready(self._update(self._theta, self._state, data))

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        return self._jax.enable_x64(self._problem.dtype == torch.float64)

    def _arrays(self, values: Any) -> list[Any]:
        """Converts tensors without a copy; labels become 32-bit integers, which JAX has in both precisions."""
        tensors = [value if value.is_floating_point() else value.int() for value in values]
        return [self._jax.dlpack.from_dlpack(value.contiguous()) for value in tensors]

    def _adam(self, theta: Any, state: Any, data: Any) -> Any:
        jnp, outer = self._jax.numpy, self._problem.settings.outer
        gradients, (moments, count), clip = self._meta_gradient(theta, data), state, outer["clip"]
        count = count + 1
        rate = outer["step_size"] * jnp.sqrt(1 - 0.999**count) / (1 - 0.9**count)
        updated, averages = {}, {}
        for name, gradient in gradients.items():
            gradient = gradient if clip is None else gradient.clip(-clip, clip)
            mean, square = 0.9 * moments[name][0] + 0.1 * gradient, 0.999 * moments[name][1] + 0.001 * gradient**2
            updated[name], averages[name] = theta[name] - rate * mean / (jnp.sqrt(square) + 1e-8), (mean, square)
        return updated, (averages, count)

    def _meta_gradient(self, theta: Any, data: Any) -> Any:
        jax, inner = self._jax, self._problem.algorithm.inner
        adapted = inner.adapted_names([*theta])

        def task_loss(theta: Any, task: Any) -> Any:
            support_x, support_y, query_x, query_y = task
            phi = dict(theta)
            for _ in range(inner.num_steps):
                gradients = jax.grad(self._loss)(phi, support_x, support_y)
                phi |= {name: phi[name] - inner.step_size * gradients[name] for name in adapted}
            return self._loss(phi, query_x, query_y)

        if not self._problem.is_image:
            return jax.grad(lambda theta: jax.vmap(task_loss, (None, 0))(theta, data).mean())(theta)
        gradients = jax.lax.map(lambda task: jax.grad(task_loss)(theta, task), data)
        return jax.tree.map(lambda value: value.mean(0), gradients)

    def _loss(self, params: Any, x: Any, y: Any) -> Any:
        outputs = self._network(params, x)
        if not self._problem.is_image:
            return ((outputs - y) ** 2).mean()
        log_probabilities = self._jax.numpy.take_along_axis(self._jax.nn.log_softmax(outputs), y[:, None], axis=1)
        return -log_probabilities.sum() / self._problem.algorithm.domain.num_shots

    def _network(self, params: Any, x: Any) -> Any:
        model, relu = self._problem.algorithm.model, self._jax.nn.relu
        if not isinstance(model, Conv4):
            for i in (1, 2):
                x = relu(x @ params[f"linear{i}.weight"].T + params[f"linear{i}.bias"])
            return x @ params["head.weight"].T + params["head.bias"]
        for i in range(1, 5):
            x = self._convolution(x, params[f"conv{i}.weight"], 2 if model.pooling == "stride" else 1)
            x = x + params[f"conv{i}.bias"]
            x = (x - x.mean((0, 1, 2))) * self._jax.lax.rsqrt(x.var((0, 1, 2)) + _BATCH_NORM_EPS)
            x = relu(x + params[f"norm{i}.shift"])
            if model.pooling == "max":
                x = self._pool(x)
        x = x.mean((1, 2)) if model.head == "mean" else x.reshape(len(x), -1)
        return x @ params["head.weight"].T + params["head.bias"]

    def _convolution(self, x: Any, kernel: Any, stride: int) -> Any:
        """Convolves by a matrix product over windows, which on a CPU is three times as fast as JAX's convolution."""
        jnp, end = self._jax.numpy, x.shape[1]  # images are square
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        shifted = [padded[:, i : i + end : stride, j : j + end : stride] for i in range(3) for j in range(3)]
        return jnp.concatenate(shifted, -1) @ kernel.transpose(2, 3, 1, 0).reshape(-1, len(kernel))

    def _pool(self, x: Any) -> Any:
        """Pools by comparisons: the derivative of JAX's ``max`` is wrong if the compiler computes an input twice."""
        where, end = self._jax.numpy.where, x.shape[1] // 2 * 2
        x = where(x[:, 0:end:2] >= x[:, 1:end:2], x[:, 0:end:2], x[:, 1:end:2])
        return where(x[:, :, 0:end:2] >= x[:, :, 1:end:2], x[:, :, 0:end:2], x[:, :, 1:end:2])


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        is_missing = isinstance(error, ModuleNotFoundError) and error.name == name
        raise Unavailable("not installed" if is_missing else f"not importable ({first_line(error)})") from error


IMPLEMENTATIONS: dict[str, Callable[[Problem], Implementation]] = {
    "ours": Ours,
    "ours compiled": functools.partial(Ours, compile=True),
    "ours as trained": functools.partial(Ours, compile="auto"),
    "ours without graph": functools.partial(Ours, cuda_graph=False),
    "ours without kernels": functools.partial(Ours, kernels=False),
    "loop": loop,
    "loop, fused norm": fused_loop,
    "learn2learn": learn2learn,
    "higher": higher,
    "torchopt": torchopt,
    "jax": Jax,
}


# Checking.


def relative_error(gradient: Mapping[str, Any], reference: Params) -> float:
    """Returns the norm of the difference of two gradients, relative to the norm of the reference.

    All parameters count as one vector. So the gradient of a bias before batch normalisation, which is only rounding
    noise, has almost no weight.
    """
    if gradient.keys() != reference.keys():
        return math.inf
    difference, length = 0.0, 0.0
    for name, expected in reference.items():
        value = gradient[name]
        tensor = value.detach().cpu() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
        difference += (tensor.double() - expected.cpu()).square().sum().item()
        length += expected.square().sum().item()
    return math.sqrt(difference / length)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Sets PyTorch's default dtype, which images and all tensors without an explicit dtype have."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


def _checked_meta_batches(problem: Problem) -> list[list[int]]:
    """Returns the meta-batches, as task indices, on which a gradient is checked; it must agree on one of them.

    In float64 this is the whole meta-batch. In float32 each meta-batch repeats a single task. Near the kink of a ReLU,
    rounding can switch the ReLU on in one implementation and off in another, and five inner steps amplify that. In 3 of
    16 tasks of Omniglot 20-way, the loop in float32 differs from the loop in float64 by up to a tenth; in the other
    tasks, where no ReLU differs, by 1e-6. An implementation that is wrong in float32 is wrong on all tasks.
    """
    count = problem.num_tasks
    return [[*range(count)]] if problem.dtype == torch.float64 else [[index] * count for index in range(count)]


def prepare(
    names: Sequence[str], experiment: str, overrides: Sequence[str] = (), device: str | torch.device = "cpu"
) -> tuple[Problem, dict[str, Implementation], dict[str, list[float]], dict[str, str]]:
    """Builds implementations for timing in float32, after checking that they give the loop's gradient.

    Returns:
        The problem, the implementations, their relative errors in float64 and float32, and the reasons why other
        implementations are missing. A library that fails is among them, because its version may be another one.

    Raises:
        RuntimeError: if an implementation of ours computes another gradient.
    """
    with default_dtype(torch.float64):
        exact = Problem(experiment, overrides, device, torch.float64)

    @functools.cache
    def reference(*indices: int) -> Params:
        with default_dtype(torch.float64):
            return dict(loop(exact).gradient(select_tasks(exact, indices)))

    def select_tasks(problem: Problem, indices: Sequence[int]) -> Tasks:
        return {name: value[[*indices]] for name, value in problem.tasks.items()}

    def smallest_error(name: str, problem: Problem, implementation: Implementation) -> float:
        smallest, allowed = math.inf, _TOLERANCE[problem.dtype]
        for indices in _checked_meta_batches(problem):
            gradient = implementation.gradient(select_tasks(problem, indices))
            smallest = min(smallest, relative_error(gradient, reference(*indices)))
            if smallest <= allowed:
                return smallest
        raise RuntimeError(
            f"{name} computes another meta-gradient than the loop: relative error {smallest:.1e} in "
            f"{problem.dtype}, allowed {allowed:.0e}; its time would mean nothing, so correct it first"
        )

    errors: dict[str, list[float]] = {name: [] for name in names}
    missing: dict[str, str] = {}
    for problem in (exact, Problem(experiment, overrides, device)):
        ready: dict[str, Implementation] = {}
        with default_dtype(problem.dtype):
            for name in names:
                if name in missing:  # already in float64
                    continue
                try:
                    implementation = IMPLEMENTATIONS[name](problem)
                    errors[name].append(smallest_error(name, problem, implementation))
                except Unavailable as reason:
                    missing[name] = str(reason)
                except Exception as error:
                    if name not in PEERS:
                        raise
                    missing[name] = f"fails here ({first_line(error)})"
                else:
                    ready[name] = implementation
    return problem, ready, {name: errors[name] for name in ready}, missing
