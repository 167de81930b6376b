"""Where a run computes. Nothing here may change what a number means."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from maml.domain.base import Domain
from maml.errors import MamlError, Unavailable
from maml.hardware import distributed
from maml.hardware.memory import keep_freed_memory
from maml.types import Count

# Compiling takes up to a minute; it pays for small networks, whose time is the operations' own overhead.
_MIN_ITERATIONS_TO_COMPILE = 5000


@dataclass(frozen=True)
class Execution:
    """What was chosen for one run; kept in its checkpoint, so that a resumed run computes the same bits.

    Attributes:
        num_threads: of the CPU.
        task_chunk: tasks batched at once, of each seed; None is all of them.
        compile: whether the meta-gradient is compiled.
        cuda_graph: whether the whole meta-iteration is launched as one graph.
        recompute: whether inner steps are computed again for the meta-gradient.
        device: what it was chosen for.
    """

    num_threads: int
    task_chunk: int | None
    compile: bool
    cuda_graph: bool = False
    recompute: bool = False
    device: str = "cpu"

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields by name."""
        return asdict(self)


class Hardware:
    """The device, and how the work is cut for it; ``auto`` chooses.

    Args:
        device: ``auto`` takes the GPU when there is one.
        num_threads: CPU threads; ``auto`` is all cores for images, and for simulation beside a GPU; else one, because
            small vectors would lose by more.
        task_chunk: tasks batched at once, of each seed; ``all``; or ``auto``: images as measured
            (`maml.training.autotune`), rollouts on a CPU in parts that fit its cache, else all.
        compile: compile the meta-gradient; ``auto`` does so for long CPU runs, but for several inner steps on images.
        cuda_graph: capture the whole meta-iteration, from the draw of its tasks to the outer optimizer, and launch it
            as one; ``auto`` does so on a GPU, but for RL.
        recompute: forget what an inner step computed on its way, and compute it again for the meta-gradient: about a
            third more time for memory that does not grow with the number of steps.
        deterministic: only kernels that give the same bits every time; a resumed GPU run is then exact too.
        min_processes: fewer are an error: a run that was meant for several GPUs shall not start on one.

    Raises:
        MamlError: if CUDA is asked for and absent, or processes are missing.
    """

    def __init__(
        self,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        num_threads: Count | Literal["auto"] = "auto",
        task_chunk: Count | Literal["auto", "all"] = "auto",
        compile: bool | Literal["auto"] = "auto",
        cuda_graph: bool | Literal["auto"] = "auto",
        recompute: bool = False,
        deterministic: bool = False,
        min_processes: Count = 1,
    ) -> None:
        num_processes = distributed.world_size()
        if num_processes < min_processes:
            raise MamlError(
                f"{num_processes} process{'es' * (num_processes > 1)} for hardware.min_processes={min_processes}: "
                "start torchrun --nproc-per-node=NUMBER_OF_GPUS train.py ..., or choose hardware=gpu"
            )
        if device == "cuda" and not torch.cuda.is_available():
            raise Unavailable(
                f"hardware.device=cuda, but torch {torch.__version__} sees no CUDA device: use hardware=cpu (or auto), "
                "or install a CUDA build of torch and check the driver"
            )
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu" and cuda_graph is True:
            raise MamlError("hardware.cuda_graph=true needs a GPU; leave it to auto")
        # Each process of a machine has a GPU of its own.
        self.device = torch.device(device, distributed.local_rank()) if device == "cuda" else torch.device(device)
        self.num_threads, self.task_chunk, self.compile = num_threads, task_chunk, compile
        self.cuda_graph, self.recompute, self.deterministic = cuda_graph, recompute, deterministic

    def choose(self, domain: Domain[Any], num_iterations: int, earlier: Mapping[str, Any]) -> Execution:
        """Settles what is left to ``auto``.

        Args:
            domain: of the run.
            num_iterations: of the run.
            earlier: the fields of the execution that a checkpoint was made with, which are kept on the same kind of
                device; or nothing.
        """
        work = domain.workload
        on_cpu = self.device.type == "cpu"
        if not work.fixed_shapes:
            if self.compile is True:
                raise MamlError(
                    "hardware.compile=true is for supervised domains: rollouts have another length in each iteration, "
                    "so every one would be compiled anew; leave it to auto"
                )
            if self.recompute:
                raise MamlError("hardware.recompute=true is for supervised domains; leave it at false")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        cores = max(1, cores // distributed.local_world_size())
        threads_pay = work.threads_pay == "always" or (work.threads_pay == "beside_gpu" and not on_cpu)
        compiling_pays = on_cpu and not work.measure_chunk and num_iterations >= _MIN_ITERATIONS_TO_COMPILE
        automatic = {
            "num_threads": cores if threads_pay else 1,
            "task_chunk": work.task_chunk if on_cpu else None,
            "compile": work.fixed_shapes and compiling_pays,
            "cuda_graph": work.fixed_shapes and not on_cpu,
        }
        chosen: dict[str, Any] = {"device": self.device.type, "recompute": self.recompute}
        kept = earlier if earlier.get("device", self.device.type) == self.device.type else {}
        for name, value in (automatic | {name: kept[name] for name in automatic.keys() & kept.keys()}).items():
            asked = getattr(self, name)
            chosen[name] = value if asked == "auto" else None if asked == "all" else asked
        return Execution(**chosen)

    def apply(self, execution: Execution) -> None:
        """Sets the process-wide switches."""
        keep_freed_memory()
        torch.set_num_threads(execution.num_threads)
        if self.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if self.deterministic != torch.are_deterministic_algorithms_enabled():  # the setter imports torch's compiler
            torch.use_deterministic_algorithms(self.deterministic)

    def describe(self) -> dict[str, Any]:
        """Returns what a reader of a result needs to know about the machine."""
        described: dict[str, Any] = {"device": str(self.device), "cpu": _cpu_name(), "cores": os.cpu_count()}
        if self.device.type == "cuda":
            described["gpu"] = torch.cuda.get_device_name(self.device)
        if distributed.world_size() > 1:
            described["processes"] = distributed.world_size()
        return described


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        import platform

        return platform.processor() or platform.machine()
