"""Times one second-order meta-gradient against a plain loop and other libraries, after checking that all of them agree.

    python scripts/bench_meta_gradient.py --shapes sinusoid omniglot_5way_1shot --rounds 20 --compile

An implementation computes everything from theta and the tasks' data to the gradient of the mean query loss. All run in
one process and take turns, so that a ratio compares neighbours in time; the reported ratio is the median over rounds.
A library that cannot be imported is shown as such. learn2learn 0.2.0 no longer builds with pip; its pure-Python part
(the folders ``algorithms``, ``nn``, ``optim``, ``utils``, with an ``__init__.py`` that imports only those) is enough.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import importlib
import importlib.metadata
import logging
import math
import multiprocessing
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maml.algorithm.base import Parts
from maml.algorithm.maml import MAML
from maml.compiling import compiled
from maml.domain.base import Role
from maml.domain.classification import FewShotClassification
from maml.domain.sinusoid import Sinusoid
from maml.hardware import Hardware
from maml.inner.sgd import SGD
from maml.model.base import Model
from maml.model.conv4 import Conv4
from maml.model.mlp import MLP
from maml.outer.adam import Adam
from maml.run import versions
from maml.seeding import Stream
from maml.types import Examples, Params, Tasks

MAX_MEMORY_RATIO = 2.0
# Relative, of the whole gradient. In float32 a ReLU near its kink may open in one implementation and not in another,
# which five inner steps amplify; a first-order gradient would be off by about 1.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 0.2}
_MIN_TURN_SECONDS = 0.2  # a turn repeats the computation for at least so long
_BATCH_NORM_EPS = 1e-3


@dataclass(frozen=True)
class Shape:
    """The sizes of one experiment of the paper (protocol, sections 2-4).

    Attributes:
        in_shape: one input: ``(D,)``, or ``(H, W, C)``.
        out_dim: outputs; N in classification.
        num_shots: K.
        num_support: support examples per task.
        num_query: query examples per task.
        num_tasks: B.
        num_steps: inner gradient steps.
        step_size: alpha.
        bar: how many times faster than a loop ours shall be on one CPU core.
        compiled_bar: the same when compiled.
        num_filters: of the convolutional network; None is the fully connected one.
        pooling: of the convolutional network.
    """

    in_shape: tuple[int, ...]
    out_dim: int
    num_shots: int
    num_support: int
    num_query: int
    num_tasks: int
    num_steps: int
    step_size: float
    bar: float
    compiled_bar: float
    num_filters: int | None = None
    pooling: Literal["stride", "max"] = "stride"

    def model(self) -> Model:
        """Returns our network."""
        if self.num_filters is None:
            return MLP(self.in_shape, self.out_dim, hidden_sizes=[40, 40])
        head: Literal["mean", "flatten"] = "mean" if self.pooling == "stride" else "flatten"
        return Conv4(self.in_shape, self.out_dim, self.num_filters, self.pooling, head)


SHAPES = {
    "sinusoid": Shape((1,), 1, 10, 10, 10, 25, 1, 0.01, bar=10, compiled_bar=25),
    "omniglot_5way_1shot": Shape((28, 28, 1), 5, 1, 5, 5, 32, 1, 0.4, bar=1.2, compiled_bar=1.2, num_filters=64),
    "omniglot_20way_1shot": Shape((28, 28, 1), 20, 1, 20, 20, 16, 5, 0.1, bar=1.15, compiled_bar=1.15, num_filters=64),
    "mini_imagenet_5way_1shot": Shape(
        (84, 84, 3), 5, 1, 5, 75, 4, 5, 0.01, bar=1.0, compiled_bar=1.0, num_filters=32, pooling="max"
    ),
}


@dataclass(frozen=True)
class Problem:
    """What every implementation is given: theta by name, and ``{support,query}_{x,y}``, each ``(B, ...)``."""

    shape: Shape
    theta: Params
    tasks: Tasks

    def episodes(self) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Returns support and query inputs and targets of each task, images channels-first as PyTorch has them."""
        keys = ("support_x", "support_y", "query_x", "query_y")
        values = [self.tasks[key] for key in keys]
        values = [value.movedim(-1, 2).contiguous() if value.dim() == 5 else value for value in values]
        return [(a, b, c, d) for a, b, c, d in zip(*values, strict=True)]


def make_problem(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """Draws the same numbers for every dtype. Pixels are noise: the time does not depend on them."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    theta = {
        name: normal(*value.shape) * (math.sqrt(2 / value[0].numel()) if value.dim() > 1 else 0.1)
        for name, value in shape.model().init(Stream(0)).items()
    }
    tasks: Tasks = {}
    amplitude, phase = (torch.rand(shape.num_tasks, 1, 1, generator=generator, dtype=torch.float64) for _ in range(2))
    for role, size in (("support", shape.num_support), ("query", shape.num_query)):
        x = torch.rand(shape.num_tasks, size, *shape.in_shape, generator=generator, dtype=torch.float64)
        if shape.num_filters is None:
            x = 10 * x - 5
            y = (0.1 + 4.9 * amplitude) * torch.sin(x - math.pi * phase)
        else:
            y = torch.arange(size).remainder(shape.out_dim).expand(shape.num_tasks, size).contiguous()
        tasks |= {f"{role}_x": x, f"{role}_y": y}

    def cast(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to(device, dtype if value.is_floating_point() else None) for name, value in values.items()}

    return Problem(shape, cast(theta), cast(tasks))


MetaGradient = Callable[[], Mapping[str, Any]]
"""Computes the meta-gradient once; the values are arrays of some library, by theta's names."""


class Unavailable(Exception):
    """An implementation cannot run here; the message says why."""


# Ours.


class _GivenData:
    """Serves the tensors that the tasks are, where a domain would make them: only the meta-gradient is timed."""

    def __init__(self, shape: Shape) -> None:
        self.in_shape, self.out_dim, self.num_shots = shape.in_shape, shape.out_dim, shape.num_shots

    def data(self, tasks: Tasks, role: Role, step: int = 0) -> Examples:
        return Examples(tasks[f"{role}_x"], tasks[f"{role}_y"], self.num_shots)


class _GivenPoints(_GivenData, Sinusoid): ...


class _GivenImages(_GivenData, FewShotClassification): ...


def _learner(problem: Problem) -> MAML:
    shape = problem.shape
    domain = _GivenPoints(shape) if shape.num_filters is None else _GivenImages(shape)
    device = problem.tasks["support_x"].device
    hardware = Hardware("cuda" if device.type == "cuda" else "cpu")
    inner = SGD(shape.step_size, shape.num_steps, order=2, adapt=["*", "!*.shift"])
    chunk = hardware.choose(domain, num_iterations=1, earlier={}).task_chunk
    return MAML(Parts(domain, lambda *shapes: shape.model(), inner, Adam(), Stream(0, device), chunk))


def ours(problem: Problem) -> MetaGradient:
    """Returns the project's own computation, with the chunk size that it chooses for this hardware."""
    learner = _learner(problem)
    return lambda: learner.gradient(problem.theta, problem.tasks)[0]


def ours_compiled(problem: Problem) -> MetaGradient:
    """Returns the same compiled.

    Raises:
        Unavailable: if it does not compile.
    """
    learner = _learner(problem)
    learner.chunk_gradient = compiled(learner.chunk_gradient)
    refused = _Refused()
    logging.getLogger("maml").addHandler(refused)
    try:
        learner.gradient(problem.theta, problem.tasks)
    finally:
        logging.getLogger("maml").removeHandler(refused)
    if refused.reason:
        raise Unavailable(refused.reason)
    return lambda: learner.gradient(problem.theta, problem.tasks)[0]


class _Refused(logging.Handler):
    """Notes the warning with which compiling falls back to eager: an eager time must not pass for a compiled one."""

    reason = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.reason = record.getMessage()


# Others: one task after the other, as their own examples do.


BatchNorm = Callable[[Tensor, Tensor], Tensor]


def _batch_norm(x: Tensor, shift: Tensor) -> Tensor:
    """Uses the batch's statistics; written out because ``F.batch_norm`` without a weight has no double backward."""
    variance, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + _BATCH_NORM_EPS) + shift.view(1, -1, 1, 1)


def _fused_batch_norm(x: Tensor, shift: Tensor) -> Tensor:
    """The same by the library's kernel, whose double backward is right outside vmap if there is a weight: here 1."""
    return F.batch_norm(x, None, None, torch.ones_like(shift), shift, training=True, eps=_BATCH_NORM_EPS)


def _loss(shape: Shape, outputs: Tensor, y: Tensor) -> Tensor:
    if shape.num_filters is None:
        return F.mse_loss(outputs, y)
    return F.cross_entropy(outputs, y, reduction="sum") / shape.num_shots


def _network(shape: Shape, params: Params, x: Tensor, batch_norm: BatchNorm) -> Tensor:
    if shape.num_filters is None:
        for i in (1, 2):
            x = F.relu(F.linear(x, params[f"linear{i}.weight"], params[f"linear{i}.bias"]))
        return F.linear(x, params["linear3.weight"], params["linear3.bias"])
    for i in range(1, 5):
        stride = 2 if shape.pooling == "stride" else 1
        x = F.conv2d(x, params[f"conv{i}.weight"], params[f"conv{i}.bias"], stride, padding=1)
        x = F.relu(batch_norm(x, params[f"norm{i}.shift"]))
        if shape.pooling == "max":
            x = F.max_pool2d(x, 2)
    x = x.mean((2, 3)) if shape.pooling == "stride" else _channels_last(x)
    return F.linear(x, params["head.weight"], params["head.bias"])


def _channels_last(x: Tensor) -> Tensor:
    """Flattens maps in the order in which our head's weights expect them."""
    return x.permute(0, 2, 3, 1).flatten(1)


def loop(problem: Problem, batch_norm: BatchNorm = _batch_norm) -> MetaGradient:
    """Returns the plain loop: functional PyTorch, the graph of one task alive at a time."""
    shape, episodes = problem.shape, problem.episodes()
    theta = {name: value.clone().requires_grad_() for name, value in problem.theta.items()}
    adapted = [name for name in theta if not name.endswith(".shift")]

    def run() -> Params:
        total: list[Tensor] = []
        for support_x, support_y, query_x, query_y in episodes:
            phi = dict(theta)
            for _ in range(shape.num_steps):
                loss = _loss(shape, _network(shape, phi, support_x, batch_norm), support_y)
                gradients = torch.autograd.grad(loss, [phi[name] for name in adapted], create_graph=True)
                phi |= {name: phi[name] - shape.step_size * g for name, g in zip(adapted, gradients, strict=True)}
            loss = _loss(shape, _network(shape, phi, query_x, batch_norm), query_y) / shape.num_tasks
            gradients = torch.autograd.grad(loss, list(theta.values()))
            total = [a + b for a, b in zip(total, gradients, strict=True)] if total else list(gradients)
        return dict(zip(theta, total, strict=True))

    return run


def fused_loop(problem: Problem) -> MetaGradient:
    """Returns the loop with the library's own batch normalisation kernel."""
    if problem.shape.num_filters is None:
        raise Unavailable("nothing to normalise")
    return loop(problem, _fused_batch_norm)


class _BatchNorm(nn.Module):
    """Holds its shift as a plain tensor: meta-learned, but not adapted, for which the libraries have no setting."""

    shift: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return _batch_norm(x, self.shift)


class _Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class _Flatten(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _channels_last(x)


def _module(problem: Problem) -> tuple[nn.Module, Params]:
    """Returns the network as a library's user writes it, and its parameters under our names."""
    shape = problem.shape
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if shape.num_filters is None:
        sizes = [*shape.in_shape, 40, 40, shape.out_dim]
        for i, (num_in, num_out) in enumerate(pairwise(sizes), start=1):
            layers |= {f"linear{i}": nn.Linear(num_in, num_out), f"relu{i}": nn.ReLU()}
        del layers["relu3"]
    else:
        channels = shape.in_shape[-1]
        for i in range(1, 5):
            convolution = nn.Conv2d(channels, shape.num_filters, 3, 2 if shape.pooling == "stride" else 1, padding=1)
            layers |= {f"conv{i}": convolution, f"norm{i}": _BatchNorm(), f"relu{i}": nn.ReLU()}
            if shape.pooling == "max":
                layers[f"pool{i}"] = nn.MaxPool2d(2)
            channels = shape.num_filters
        layers["features"] = _Mean() if shape.pooling == "stride" else _Flatten()
        layers["head"] = nn.Linear(problem.theta["head.weight"].shape[1], shape.out_dim)
    module = nn.Sequential(layers)
    leaves: Params = {}
    for name, value in problem.theta.items():
        layer, _, attribute = name.partition(".")
        leaf = value.clone().requires_grad_() if attribute == "shift" else nn.Parameter(value.clone())
        setattr(module.get_submodule(layer), attribute, leaf)
        leaves[name] = leaf
    return module, leaves


def _accumulated(leaves: Params, backward: Callable[[], None]) -> MetaGradient:
    """Returns the gradients that ``backward`` leaves behind."""

    def run() -> Params:
        for leaf in leaves.values():
            leaf.grad = None
        backward()
        return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    return run


def learn2learn(problem: Problem) -> MetaGradient:
    """Returns ``learn2learn.algorithms.MAML``."""
    library = _library("learn2learn")
    shape, episodes = problem.shape, problem.episodes()
    module, leaves = _module(problem)
    learner = library.algorithms.MAML(module, lr=shape.step_size, first_order=False)

    def backward() -> None:
        for support_x, support_y, query_x, query_y in episodes:
            clone = learner.clone()
            for _ in range(shape.num_steps):
                clone.adapt(_loss(shape, clone(support_x), support_y))
            (_loss(shape, clone(query_x), query_y) / shape.num_tasks).backward()

    return _accumulated(leaves, backward)


def higher(problem: Problem) -> MetaGradient:
    """Returns ``higher.innerloop_ctx``."""
    library = _library("higher")
    shape, episodes = problem.shape, problem.episodes()
    module, leaves = _module(problem)
    inner = torch.optim.SGD(module.parameters(), lr=shape.step_size)

    def backward() -> None:
        for support_x, support_y, query_x, query_y in episodes:
            with library.innerloop_ctx(module, inner, copy_initial_weights=False) as (functional, optimizer):
                for _ in range(shape.num_steps):
                    optimizer.step(_loss(shape, functional(support_x), support_y))
                (_loss(shape, functional(query_x), query_y) / shape.num_tasks).backward()

    return _accumulated(leaves, backward)


def torchopt(problem: Problem) -> MetaGradient:
    """Returns ``torchopt.MetaSGD``."""
    library = _library("torchopt")
    shape, episodes = problem.shape, problem.episodes()
    module, leaves = _module(problem)
    inner = library.MetaSGD(module, lr=shape.step_size)
    start = library.extract_state_dict(module, by="reference"), library.extract_state_dict(inner, by="reference")

    def backward() -> None:
        for support_x, support_y, query_x, query_y in episodes:
            for _ in range(shape.num_steps):
                inner.step(_loss(shape, module(support_x), support_y))
            (_loss(shape, module(query_x), query_y) / shape.num_tasks).backward()
            library.recover_state_dict(module, start[0])
            library.recover_state_dict(inner, start[1])

    return _accumulated(leaves, backward)


def jax(problem: Problem) -> MetaGradient:
    """Returns one jitted program: points vectorised over tasks, images one task after the other (the faster each)."""
    os.environ.setdefault("NPROC", str(torch.get_num_threads()))  # the size of its thread pool
    library = _library("jax")
    jnp, lax, shape = library.numpy, library.lax, problem.shape
    adapted = [name for name in problem.theta if not name.endswith(".shift")]

    def convolution(x: Any, kernel: Any) -> Any:
        """As a matrix product over windows: three times as fast here as the library's own convolution."""
        stride = 2 if shape.pooling == "stride" else 1
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        last = x.shape[1] - 1  # images are square
        shifted = [padded[:, i : i + last + 1 : stride, j : j + last + 1 : stride] for i in range(3) for j in range(3)]
        return jnp.concatenate(shifted, -1) @ kernel.transpose(2, 3, 1, 0).reshape(-1, len(kernel))

    def pool(x: Any) -> Any:
        """By comparisons: the derivative of its ``max`` is wrong where the compiler computes an input twice."""
        end = x.shape[1] // 2 * 2
        x = jnp.where(x[:, 0:end:2] >= x[:, 1:end:2], x[:, 0:end:2], x[:, 1:end:2])
        return jnp.where(x[:, :, 0:end:2] >= x[:, :, 1:end:2], x[:, :, 0:end:2], x[:, :, 1:end:2])

    def network(params: Any, x: Any) -> Any:
        if shape.num_filters is None:
            for i in (1, 2):
                x = library.nn.relu(x @ params[f"linear{i}.weight"].T + params[f"linear{i}.bias"])
            return x @ params["linear3.weight"].T + params["linear3.bias"]
        for i in range(1, 5):
            x = convolution(x, params[f"conv{i}.weight"]) + params[f"conv{i}.bias"]
            x = (x - x.mean((0, 1, 2))) * lax.rsqrt(x.var((0, 1, 2)) + _BATCH_NORM_EPS) + params[f"norm{i}.shift"]
            x = library.nn.relu(x)
            if shape.pooling == "max":
                x = pool(x)
        x = x.mean((1, 2)) if shape.pooling == "stride" else x.reshape(len(x), -1)
        return x @ params["head.weight"].T + params["head.bias"]

    def loss(params: Any, x: Any, y: Any) -> Any:
        outputs = network(params, x)
        if shape.num_filters is None:
            return ((outputs - y) ** 2).mean()
        return -jnp.take_along_axis(library.nn.log_softmax(outputs), y[:, None], axis=1).sum() / shape.num_shots

    def task_loss(theta: Any, task: Any) -> Any:
        phi = dict(theta)
        for _ in range(shape.num_steps):
            gradients = library.grad(loss)(phi, task["support_x"], task["support_y"])
            phi |= {name: phi[name] - shape.step_size * gradients[name] for name in adapted}
        return loss(phi, task["query_x"], task["query_y"])

    def meta_gradient(theta: Any, tasks: Any) -> Any:
        if shape.num_filters is None:
            return library.grad(lambda theta: library.vmap(task_loss, (None, 0))(theta, tasks).mean())(theta)
        gradients = lax.map(lambda task: library.grad(task_loss)(theta, task), tasks)
        return library.tree.map(lambda value: value.mean(0), gradients)

    reference = problem.tasks["support_x"]
    try:
        device = library.devices(reference.device.type)[0]
    except RuntimeError as error:
        raise Unavailable(f"no such device ({error})") from error
    double = reference.dtype == torch.float64
    with library.enable_x64(double):
        theta, tasks = (
            {name: library.device_put(value.cpu().numpy(), device) for name, value in values.items()}
            for values in (problem.theta, problem.tasks)
        )
    program = library.jit(meta_gradient)

    def run() -> Mapping[str, Any]:
        with library.enable_x64(double):
            return dict(library.block_until_ready(program(theta, tasks)))

    return run


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise Unavailable("not installed" if error.name == name else f"not importable ({error})") from error


PEERS = {"learn2learn": learn2learn, "higher": higher, "torchopt": torchopt, "jax": jax}
IMPLEMENTATIONS: dict[str, Callable[[Problem], MetaGradient]] = {
    "ours": ours,
    "ours compiled": ours_compiled,
    "loop": loop,
    "loop, fused norm": fused_loop,
    **PEERS,
}


# Checking, timing, memory.


def relative_error(gradient: Mapping[str, Any], reference: Params) -> float:
    """Returns the distance of two gradients over the length of the reference, all parameters as one vector.

    So a convolution's bias in front of batch normalisation, whose gradient is rounding noise, counts as what it is.
    """
    if gradient.keys() != reference.keys():
        return math.inf
    difference, length = 0.0, 0.0
    for name, expected in reference.items():
        value = gradient[name]
        found = value.detach().cpu() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
        difference += (found.double() - expected.cpu()).square().sum().item()
        length += expected.square().sum().item()
    return math.sqrt(difference / length)


def prepare(name: str, shape: Shape, device: torch.device, reference: Params) -> tuple[MetaGradient, list[float]]:
    """Returns an implementation ready to be timed in float32, and its errors against the loop in float64.

    Args:
        name: of the implementation.
        shape: of the problem.
        device: to compute on.
        reference: the loop's gradient in float64.

    Raises:
        Unavailable: if it cannot run here.
        RuntimeError: if it computes another gradient.
    """
    errors = []
    for dtype, tolerance in _TOLERANCE.items():
        run = IMPLEMENTATIONS[name](make_problem(shape, dtype, device))
        errors.append(relative_error(run(), reference))
        if not errors[-1] <= tolerance:
            raise RuntimeError(
                f"{name} computes another meta-gradient than the loop: relative error {errors[-1]:.1e} in {dtype}, "
                f"allowed {tolerance:.0e}; a time for it would mean nothing, so correct it first or leave it out"
            )
    return run, errors


def seconds_per_call(run: MetaGradient, clock: Callable[[], float]) -> float:
    """Times one turn of one implementation."""
    gc.collect()
    calls, start, elapsed = 0, clock(), 0.0
    while elapsed < _MIN_TURN_SECONDS:
        run()
        calls += 1
        elapsed = clock() - start
    return elapsed / calls


def choose_clock(device: torch.device, num_threads: int) -> tuple[Callable[[], float], str]:
    """Returns the clock and its description."""
    if device.type == "cuda":

        def synchronized() -> float:
            torch.cuda.synchronize()
            return time.perf_counter()

        return synchronized, "wall clock, synchronised with the GPU"
    if num_threads == 1:
        return time.process_time, "CPU time of the process, all its threads: other load on the machine disturbs it less"
    return time.perf_counter, "wall clock"


def peak_memory(name: str, shape: Shape, device: torch.device, num_threads: int) -> tuple[float, float]:
    """Returns the peak memory of meta-gradients, beyond what was there before, and of the whole process, in MiB.

    On a CPU both are high-water marks of the resident set, reset once libraries, theta and data are loaded: they count
    what PyTorch's allocator does not see, such as the scratch space of convolutions. To be run in a fresh process.
    """
    torch.set_num_threads(num_threads)
    run = IMPLEMENTATIONS[name](make_problem(shape, torch.float32, device))
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        run()
        peak = torch.cuda.max_memory_allocated()
        return (peak - before) / 2**20, peak / 2**20
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident_kib("VmRSS")
    for _ in range(3):
        run()
    peak = _resident_kib("VmHWM")
    return (peak - before) / 2**10, peak / 2**10


def _resident_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


@dataclass
class Result:
    """What was found out about one implementation on one shape.

    Attributes:
        shape: its name.
        implementation: its name.
        note: why there are no times, if there are none.
        errors: relative, of the gradient in float64 and in float32.
        seconds: per meta-gradient, one number per round.
        peak_mib: of the computation, and of the whole process.
    """

    shape: str
    implementation: str
    note: str = ""
    errors: Sequence[float] = ()
    seconds: Sequence[float] = ()
    peak_mib: tuple[float, float] | None = None

    def speed_relative_to(self, other: Result) -> tuple[float, float, float] | None:
        """Returns how many times as fast it is as another: median, least and most over the rounds."""
        ratios = [theirs / mine for mine, theirs in zip(self.seconds, other.seconds, strict=False)]
        return (statistics.median(ratios), min(ratios), max(ratios)) if ratios else None


def measure(name: str, names: Sequence[str], rounds: int, device: torch.device, num_threads: int) -> list[Result]:
    """Checks the named implementations on one shape, times them in turns, and measures the memory of two."""
    shape = SHAPES[name]
    reference = {key: value.double() for key, value in loop(make_problem(shape, torch.float64, device))().items()}
    results = {implementation: Result(name, implementation) for implementation in names}
    runs: dict[str, MetaGradient] = {}
    seconds: dict[str, list[float]] = {}
    for implementation, result in results.items():
        try:
            runs[implementation], result.errors = prepare(implementation, shape, device, reference)
        except Unavailable as reason:
            result.note = str(reason)
    clock, _ = choose_clock(device, num_threads)
    for _ in range(rounds):
        for implementation, run in runs.items():
            seconds.setdefault(implementation, []).append(seconds_per_call(run, clock))
    for implementation, values in seconds.items():
        results[implementation].seconds = values
    for implementation in ("ours", "loop"):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            future = fresh.submit(peak_memory, implementation, shape, device, num_threads)
            results[implementation].peak_mib = future.result()
    return list(results.values())


# Writing.


def write_csv(path: Path, results: Sequence[Result], conditions: Mapping[str, str]) -> None:
    """Writes one line per shape and implementation."""
    by_name = {(result.shape, result.implementation): result for result in results}
    rows = []
    for result in results:
        row: dict[str, Any] = {"shape": result.shape, "implementation": result.implementation, "note": result.note}
        row["rounds"] = len(result.seconds)
        row["median_seconds"] = statistics.median(result.seconds) if result.seconds else None
        for other in ("loop", "learn2learn"):
            reference = by_name.get((result.shape, other))
            speed = result.speed_relative_to(reference) if reference else None
            keys = (f"times_{other}", f"times_{other}_min", f"times_{other}_max")
            row |= dict(zip(keys, speed or (None,) * 3, strict=True))
        row |= dict(zip(("error_float64", "error_float32"), result.errors or (None,) * 2, strict=True))
        row |= dict(zip(("peak_mib", "process_peak_mib"), result.peak_mib or (None,) * 2, strict=True))
        rows.append(row | dict(conditions))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_markdown(path: Path, results: Sequence[Result], conditions: Mapping[str, str], with_bars: bool) -> None:
    """Writes one table per shape, our bars beside the ratios if they apply."""
    lines = ["# Time and memory of one second-order meta-gradient", ""]
    lines += [f"- {key.replace('_', ' ')}: {value}" for key, value in conditions.items()]
    lines += [
        "",
        "A ratio says how many times as fast an implementation is: the median over rounds of (other's time / its time",
        "in the same round), least and most in brackets. Each gave the loop's gradient before it was timed; `error` is",
        "the relative difference in float64. Peak memory is what stays resident beyond libraries, theta and data.",
    ]
    for name in dict.fromkeys(result.shape for result in results):
        group = {result.implementation: result for result in results if result.shape == name}
        lines += ["", f"## {name}", ""]
        lines += ["| implementation | ms | ratio to loop | bar | ratio to learn2learn | bar | error |"]
        lines += ["| --- | ---: | ---: | --- | ---: | --- | ---: |"]
        for result in group.values():
            if not result.seconds:
                lines.append(f"| {result.implementation} | {result.note} | | | | | |")
                continue
            cells = [result.implementation, f"{1e3 * statistics.median(result.seconds):.4g}"]
            bar = {"ours": SHAPES[name].bar, "ours compiled": SHAPES[name].compiled_bar}.get(result.implementation)
            for other in ("loop", "learn2learn"):
                speed = result.speed_relative_to(group[other]) if other in group else None
                cells.append(f"{speed[0]:.2f} ({speed[1]:.2f} to {speed[2]:.2f})" if speed else "")
                cells.append(_verdict(speed[0] >= bar, f">= {bar:g}") if speed and bar and with_bars else "")
            lines.append("| " + " | ".join([*cells, f"{result.errors[0]:.0e}"]) + " |")
        ours, plain = group["ours"].peak_mib, group["loop"].peak_mib
        if ours and plain:
            ratio = ours[0] / plain[0]
            verdict = _verdict(ratio <= MAX_MEMORY_RATIO, f"<= {MAX_MEMORY_RATIO:g}")
            lines += ["", f"Peak: ours {ours[0]:.0f} MiB, loop {plain[0]:.0f} MiB, ratio {ratio:.2f}, {verdict}. "]
            lines[-1] += f"Whole process: {ours[1]:.0f} and {plain[1]:.0f} MiB, ratio {ours[1] / plain[1]:.2f}."
    path.write_text("\n".join(lines) + "\n")


def _verdict(is_met: bool, bar: str) -> str:
    return f"{'met' if is_met else 'missed'} ({bar})"


def describe(device: torch.device, num_threads: int) -> dict[str, str]:
    """Returns what a reader needs to judge or repeat the numbers."""
    found = versions()
    for peer in PEERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[peer] = importlib.metadata.version(peer)
    git = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    commit = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True, check=False).stdout.strip()
    hardware = Hardware("cuda" if device.type == "cuda" else "cpu").describe()
    return {
        "command": shlex.join(["python", "scripts/" + Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit or "unknown",
        "hardware": ", ".join(f"{key} {value}" for key, value in hardware.items()),
        "threads": str(num_threads),
        "clock": choose_clock(device, num_threads)[1],
        "versions": ", ".join(f"{package} {version}" for package, version in found.items()),
    }


def main() -> None:
    """Runs the benchmark; a file is rewritten after each shape, so that a run cut short leaves what it has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=10, help="turns of each implementation (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default %(default)s; bars need 1)")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="libraries beside the loop")
    parser.add_argument("--compile", action="store_true", help="also time ours compiled (takes minutes per shape)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"), help="folder (default %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    names = [
        name
        for name in IMPLEMENTATIONS
        if (name not in PEERS or name in args.peers) and (name != "ours compiled" or args.compile)
    ]
    conditions = describe(device, args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    for shape in args.shapes:
        results += measure(shape, names, args.rounds, device, args.threads)
        write_csv(args.out / "meta_gradient.csv", results, conditions)
        with_bars = device.type == "cpu" and args.threads == 1
        write_markdown(args.out / "meta_gradient.md", results, conditions, with_bars)
    print((args.out / "meta_gradient.md").read_text())


if __name__ == "__main__":
    main()
