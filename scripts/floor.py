"""The least time of a computation on this machine (its floor), and its slowest operations."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from benchmark import choose_clock, seconds_per_call
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_MIN_PROFILED_SECONDS = 0.5
# Templates in the names of PyTorch's CUDA kernels that do not say what is computed.
_WRAPPERS = {
    "gpu_kernel_impl",
    "gpu_kernel_impl_nocast",
    "ReduceOp",
    "func_wrapper_t",
    "BinaryFunctor",
    "AUnaryFunctor",
}
NOTES = """
The floor is the time that the machine needs for the loop's matrix products and convolutions alone. It is the larger of
two times: their operations, at the measured rate of a large matrix product; and the bytes of their operands and
results, each moved once, at the measured rate of a copy. It ignores all other operations and every kernel launch.
""".strip()


@dataclass(frozen=True)
class Rates:
    """The measured rates of the machine, per second.

    Attributes:
        operations: floating-point operations per second in a large float32 matrix product.
        bytes: bytes read and written per second by a copy that is larger than any cache.
    """

    operations: float
    bytes: float

    @classmethod
    def measure(cls, device: torch.device) -> Rates:
        """Measures both rates."""
        clock, _ = choose_clock(device, torch.get_num_threads())
        size, length = (8192, 2**28) if device.type == "cuda" else (1024, 2**26)
        a, x = torch.ones(size, size, device=device), torch.ones(length, device=device)
        y = torch.empty_like(x)
        runs: list[Callable[[], object]] = [lambda: a @ a, lambda: y.copy_(x)]
        product, copy = (min(seconds_per_call(run, clock) for _ in range(5)) for run in runs)
        return cls(2 * size**3 / product, 2 * x.nbytes / copy)

    def __str__(self) -> str:
        return f"{self.operations / 1e9:,.0f} GFLOP/s in a matrix product, {self.bytes / 1e9:,.0f} GB/s in a copy"


@dataclass
class Cost:
    """The cost of the matrix products and convolutions of a computation.

    Attributes:
        operations: number of multiplications and additions.
        bytes: total size of operands and results, in bytes.
    """

    operations: int = 0
    bytes: int = 0

    @classmethod
    def of(cls, run: Callable[[], object]) -> Cost:
        """Runs a computation and counts its cost."""
        cost = cls()
        with _CostCounter(cost):
            run()
        return cost

    def seconds(self, rates: Rates) -> float:
        """Returns the floor, in seconds."""
        return max(self.operations / rates.operations, self.bytes / rates.bytes)

    def row(self, rates: Rates) -> dict[str, str]:
        """Returns the cells of one row of a table."""
        bound = "operations" if self.operations / rates.operations > self.bytes / rates.bytes else "bytes"
        return {
            "GFLOP": f"{self.operations / 1e9:.3g}",
            "MB": f"{self.bytes / 1e6:.3g}",
            "floor, ms": f"{1e3 * self.seconds(rates):.3g}",
            "bound by": bound,
        }


class _CostCounter(TorchDispatchMode):
    def __init__(self, cost: Cost) -> None:
        super().__init__()
        self.cost = cost

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func.overloadpacket):
            tensors = [value for value in tree_leaves((args, result)) if isinstance(value, Tensor)]
            self.cost.operations += formula(*args, **(kwargs or {}), out_val=result)
            self.cost.bytes += sum(value.numel() * value.element_size() for value in tensors)
        return result


def _profile_calls(run: Callable[[], object], device: torch.device, times: int = 1) -> profile:
    run()
    cuda = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *cuda]) as profiler:
        for _ in range(times):
            run()
        if cuda:
            torch.cuda.synchronize()
    return profiler


def slowest_operations(run: Callable[[], object], device: torch.device) -> list[dict[str, str]]:
    """Returns a table of the six operations that take the most time, on the device that computes."""
    run()
    start = time.perf_counter()
    run()
    # Several calls: in a single short one, an interruption by another process would dominate.
    times = max(1, min(100, int(_MIN_PROFILED_SECONDS / (time.perf_counter() - start))))
    kind = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
    averages = _profile_calls(run, device, times).key_averages()
    events = sorted(averages, key=lambda event: getattr(event, kind), reverse=True)
    total = sum(getattr(event, kind) for event in events) or 1.0
    return [
        {
            "operation": short_name(event.key),
            "share": f"{getattr(event, kind) / total:.0%}",
            "calls": f"{event.count / times:g}",
        }
        for event in events[:6]
    ]


def short_name(name: str) -> str:
    """Returns an operation's name; of a CUDA kernel's long C++ name, the template and what it computes."""
    if not name.startswith("void "):
        return name
    template, _, arguments = name.removeprefix("void ").partition("<")
    inner = [found for found in re.findall(r"at::native::(?:\w+::)*(\w+)", arguments) if found not in _WRAPPERS]
    return " ".join([template.rpartition("::")[2], *inner[:1]])


def kernels(run: Callable[[], object], device: torch.device, times: int = 20) -> tuple[float, float]:
    """Returns, per call, the seconds in which at least one kernel runs on the GPU, and the number of kernels."""
    events = _profile_calls(run, device, times).events() or []
    events = [event for event in events if event.device_type.name == "CUDA" and not event.is_user_annotation]
    seconds = union_length((event.time_range.start, event.time_range.end) for event in events) / 1e6
    return seconds / times, len(events) / times


def union_length(intervals: Iterable[tuple[float, float]]) -> float:
    """Returns the total length of the union of intervals (start, end)."""
    total, last_end = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, last_end))
        last_end = max(last_end, end)
    return total
