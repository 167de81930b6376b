"""The device of a run and how the work is divided for it; nothing here may change what a number means."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Le

from maml.errors import MamlError, Unavailable
from maml.hardware import distributed
from maml.hardware.kernels import compiles_on_gpu, library, use_kernels
from maml.hardware.memory import keep_freed_memory
from maml.hardware.products import onednn_is_faster, use_onednn
from maml.hardware.threads import use_threads
from maml.hardware.workload import Workload
from maml.types import Count

# Compiling takes up to a minute. It pays off for small networks, whose time is mostly the overhead of the operations,
# and for the kernels on a GPU: 406 instead of 302 iterations per second of Omniglot 5-way 1-shot on an H100.
_MIN_ITERATIONS_TO_COMPILE = 5000
# Files with a container's CPU limit: microseconds of computing per period, and the period, in one file or two.
_CONTAINER_QUOTAS: tuple[tuple[str, ...], ...] = (
    ("/sys/fs/cgroup/cpu.max",),
    ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us"),
)
# The choices of runs whose checkpoints are older than these settings: when resumed, they compute the same bits.
_BEFORE: Mapping[str, Any] = MappingProxyType({"kernels": False, "onednn": True, "thread_chunks": False})


@dataclass(frozen=True)
class Execution:
    """How one run computes. Checkpoints hold it, so that a resumed run computes the same bits.

    Attributes:
        num_threads: number of CPU threads.
        thread_chunks: whether each CPU thread computes chunks of its own; otherwise all threads share each operation.
        task_chunk: number of tasks of each seed that are batched at once; None batches all of them.
        compile: whether the meta-gradient is compiled.
        cuda_graph: whether the whole meta-iteration is launched as one CUDA graph.
        recompute: whether the backward pass computes inner steps again instead of keeping them in memory.
        kernels: whether images are computed by kernels of our own.
        onednn: whether products of matrices in reinforcement learning use oneDNN.
        device: type of the device that this was chosen for, ``cpu`` or ``cuda``.
    """

    num_threads: int
    task_chunk: int | None
    compile: bool
    cuda_graph: bool = False
    recompute: bool = False
    kernels: bool = False
    onednn: bool = False
    thread_chunks: bool = False
    device: str = "cpu"

    def for_meta_test(self, workload: Workload) -> Execution:
        """Returns how meta-test computes, which has no chunks to divide: threads share each operation of images."""
        return replace(self, thread_chunks=self.thread_chunks and workload.threads == "tasks")

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields by name."""
        return asdict(self)


class Hardware:
    """The device, and how the work is divided for it. ``auto`` leaves a choice to the framework.

    Args:
        device: where to compute. ``auto`` takes the GPU if there is one.
        num_threads: number of CPU threads. ``auto`` takes all cores for images, and in reinforcement learning, where
            each thread computes tasks of its own; otherwise one, because several threads slow operations on small
            vectors down.
        task_chunk: number of tasks of each seed that are batched at once. ``all`` batches the whole meta-batch.
            ``auto`` measures the fastest number for images, and on a CPU with several threads also whether each of
            them is to compute chunks of its own. Rollouts and, in runs too short to measure, images are computed on a
            CPU in parts that fit its cache. Everything else is one batch.
        compile: whether to compile the meta-gradient. ``auto`` does so for long CPU runs, but not of images, whose
            kernels save more.
        cuda_graph: whether to launch the whole meta-iteration, from drawing tasks to the outer optimizer, as one CUDA
            graph. ``auto`` does so on a GPU, except for reinforcement learning.
        recompute: whether the backward pass computes inner steps again instead of keeping them in memory. Training
            takes about a third longer; memory does not grow with the number of steps.
        kernels: whether normalisation, ReLU and pooling of images are kernels with derivatives of their own, and on a
            CPU their convolutions too. They are compiled once for each processor or GPU. ``auto`` uses them if there is
            a compiler; on a GPU only in long runs, because compiling takes up to a minute.
        onednn: whether the products of matrices in reinforcement learning on a CPU use oneDNN's routine instead of
            PyTorch's. ``auto`` measures which is faster on this processor.
        deterministic: whether to use only kernels that give the same bits every time. Resuming is then exact on a GPU
            too.
        min_processes: least number of processes; a run with fewer fails at once. It keeps a run that was meant for
            several GPUs from starting on one.

    Raises:
        MamlError: if CUDA is asked for and missing, or there are too few processes.
    """

    def __init__(
        self,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        num_threads: Annotated[int, Ge(1), Le(1024)] | Literal["auto"] = "auto",
        task_chunk: Count | Literal["auto", "all"] = "auto",
        compile: bool | Literal["auto"] = "auto",
        cuda_graph: bool | Literal["auto"] = "auto",
        recompute: bool = False,
        kernels: bool | Literal["auto"] = "auto",
        onednn: bool | Literal["auto"] = "auto",
        deterministic: bool = False,
        min_processes: Count = 1,
    ) -> None:
        num_processes = distributed.world_size()
        if num_processes < min_processes:
            raise MamlError(
                f"there {'are' if num_processes > 1 else 'is'} {num_processes} process{'es' * (num_processes > 1)}, "
                f"fewer than hardware.min_processes={min_processes}; start torchrun --nproc-per-node=NUMBER_OF_GPUS "
                "train.py ..., or choose hardware=gpu"
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
        # Each process of a machine has its own GPU.
        self.device = torch.device(device, distributed.local_rank()) if device == "cuda" else torch.device(device)
        self.num_threads, self.task_chunk, self.compile = num_threads, task_chunk, compile
        self.cuda_graph, self.recompute, self.deterministic = cuda_graph, recompute, deterministic
        self.kernels, self.onednn = kernels, onednn

    def choose(self, workload: Workload, num_iterations: int, earlier: Mapping[str, Any]) -> Execution:
        """Decides every setting that is ``auto``.

        The execution in a checkpoint goes before all rules. Without one, `maml.training.autotune` then replaces
        ``task_chunk`` and ``thread_chunks`` by what it measures.

        Args:
            workload: what the domain's tasks ask of a machine.
            num_iterations: the run's number of meta-iterations.
            earlier: the fields of the execution in a checkpoint, which are kept if the type of device is the same;
                empty without a checkpoint.

        Raises:
            MamlError: if a setting is not possible for this domain.
        """
        self.check(workload)
        on_cpu = self.device.type == "cpu"
        cores = max(1, usable_cores() // distributed.local_world_size())
        compiling_pays = on_cpu and not workload.measure_chunk and num_iterations >= _MIN_ITERATIONS_TO_COMPILE
        automatic = {
            "num_threads": 1 if workload.threads == "nothing" else cores,
            "task_chunk": workload.task_chunk if on_cpu else None,
            "compile": workload.fixed_shapes and compiling_pays,
            "cuda_graph": workload.fixed_shapes and not on_cpu,
            "kernels": workload.measure_chunk and (on_cpu or num_iterations >= _MIN_ITERATIONS_TO_COMPILE),
            "onednn": False,
        }
        is_same_device = earlier.get("device", self.device.type) == self.device.type
        kept = {**_BEFORE, **earlier} if earlier and is_same_device else {}
        # More processes than before share the cores. The bits change with their number anyway.
        if distributed.local_world_size() > 1 and (kept.get("num_threads") or 0) > cores:
            kept = {name: value for name, value in kept.items() if name != "num_threads"}
        divides_tasks = workload.threads == "tasks" and on_cpu
        if divides_tasks and (kept.get("thread_chunks") or kept.get("num_threads") == 1):
            # Threads that divide the tasks compute the bits of one thread, so their number may change.
            kept = {name: value for name, value in kept.items() if name != "num_threads"} | {"thread_chunks": True}
        if on_cpu and not workload.fixed_shapes and self.onednn == "auto" and "onednn" not in kept:
            automatic["onednn"] = onednn_is_faster()
        chosen: dict[str, Any] = {"device": self.device.type, "recompute": self.recompute}
        chosen["thread_chunks"] = kept.get("thread_chunks", divides_tasks)
        for name, value in (automatic | {name: kept[name] for name in automatic.keys() & kept.keys()}).items():
            asked = getattr(self, name)
            chosen[name] = value if asked == "auto" else None if asked == "all" else asked
        if chosen["kernels"] and not self._can_compile_kernels():
            chosen["kernels"] = False
        return Execution(**chosen)

    def check(self, workload: Workload) -> None:
        """Checks, before anything is written, that the settings are possible for a domain.

        Args:
            workload: what the domain's tasks ask of a machine.

        Raises:
            MamlError: if one is not.
        """
        if not workload.fixed_shapes:
            if self.compile is True:
                raise MamlError(
                    "hardware.compile=true is for supervised domains: the length of rollouts changes with each "
                    "iteration, so each iteration would be compiled again; leave it to auto"
                )
            if self.cuda_graph is True:
                raise MamlError(
                    "hardware.cuda_graph=true is for supervised domains, whose iterations have tensors of fixed "
                    "shapes; leave it to auto"
                )
            if self.recompute:
                raise MamlError("hardware.recompute=true is for supervised domains; leave it at false")
        if self.onednn is True and (workload.fixed_shapes or self.device.type != "cpu"):
            raise MamlError(
                "hardware.onednn=true is for reinforcement learning on a CPU; nothing else uses it, so leave it to auto"
            )
        if self.kernels is True and not self._can_compile_kernels():
            raise Unavailable(
                "hardware.kernels=true, but they cannot be compiled here (the warning above says why); install a "
                f"C{'++' * (self.device.type == 'cpu')} compiler, or leave it to auto"
            )

    def _can_compile_kernels(self) -> bool:
        return library() is not None if self.device.type == "cpu" else compiles_on_gpu()

    def apply(self, execution: Execution) -> None:
        """Sets the process-wide switches of torch and of memory allocation."""
        keep_freed_memory()
        use_threads(execution.num_threads, execution.thread_chunks)
        use_kernels(execution.kernels)
        use_onednn(execution.onednn)
        if self.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if self.deterministic != torch.are_deterministic_algorithms_enabled():  # the setter imports torch's compiler
            torch.use_deterministic_algorithms(self.deterministic)
            # It would also fill all new memory with NaN, a kernel for each tensor, to show reads of unwritten memory.
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

    def describe(self) -> dict[str, Any]:
        """Returns the facts about the machine that a run's record keeps: device, processor, cores, GPU, processes."""
        described: dict[str, Any] = {"device": str(self.device), "cpu": _cpu_name(), "cores": os.cpu_count()}
        if self.device.type == "cuda":
            described["gpu"] = torch.cuda.get_device_name(self.device)
        if distributed.world_size() > 1:
            described["processes"] = distributed.world_size()
        return described


def usable_cores() -> int:
    """Returns the number of cores that this process may use: its machine's, or its container's if that has fewer."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for limits in _CONTAINER_QUOTAS:
        with suppress(OSError, ValueError):  # no such file, or no limit ("max", or -1)
            quota, period = (int(text) for name in limits for text in Path(name).read_text().split())
            if quota > 0:
                cores = min(cores, -(-quota // period))
    return cores


def _cpu_name() -> str:
    """Returns the processor's name, with its family and model: in virtual machines many processors share one name."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    if "model name" not in facts:
        import platform

        return platform.processor() or platform.machine()
    if "cpu family" not in facts:
        return facts["model name"]
    return f"{facts['model name']} (family {facts['cpu family']}, model {facts.get('model')})"
