"""The processes of one run, started by torchrun: each computes on a part of the tasks, and results are summed.

Without torchrun there is one process, and these functions return their input or do nothing.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from maml.errors import Disconnected, MamlError
from maml.hardware.memory import is_capturing, is_out_of_memory
from maml.types import Tasks, num_tasks, take

Result = TypeVar("Result")
_LARGEST_PORT = 65535


def launched_processes() -> int:
    """Returns the number of processes that torchrun has started, by the environment; 1 without torchrun.

    Raises:
        MamlError: if the variables that torchrun sets are wrong or not complete. They may be left over.
    """
    count = _variable("WORLD_SIZE", least=1, default=1)
    local_rank(), local_world_size()
    if count > 1:
        _variable("RANK", least=0, most=count - 1)
        _variable("MASTER_PORT", least=1, most=_LARGEST_PORT)
        if not os.environ.get("MASTER_ADDR"):
            raise _wrong_environment("MASTER_ADDR is not set")
    return count


def is_one_of_several() -> bool:
    """Returns whether torchrun has started several processes. If not, its other variables are left over."""
    return _variable("WORLD_SIZE", least=1, default=1) > 1


def launched_rank() -> int:
    """Returns this process's number by the environment that torchrun sets, before `start`; 0 without torchrun.

    A ``RANK`` that was left over in the environment, without other processes, does not count.

    Raises:
        MamlError: if the variables that torchrun sets are wrong or not complete.
    """
    return int(os.environ["RANK"]) if launched_processes() > 1 else 0


def _variable(name: str, least: int, most: int | None = None, default: int | None = None) -> int:
    """Returns a number from an environment variable."""
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None:
        raise _wrong_environment(f"{name} is not set")
    allowed = f"at least {least}" if most is None else f"from {least} to {most}"
    if not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
        raise _wrong_environment(f"{name}={text!r} is not a number {allowed}")
    return int(text)


def _wrong_environment(problem: str) -> MamlError:
    return MamlError(
        f"the environment variables of torchrun are wrong: {problem}. Start several processes with torchrun, which "
        "sets them; for one process, remove them: unset WORLD_SIZE RANK LOCAL_RANK LOCAL_WORLD_SIZE"
    )


def start(on_gpus: bool) -> None:
    """Joins the other processes that torchrun has started: by Gloo, and by NCCL for tensors on GPUs.

    Args:
        on_gpus: whether each process computes on its own GPU.

    Raises:
        MamlError: if there are fewer GPUs than processes, or torchrun's environment variables are wrong.
        Disconnected: if another process cannot be reached.
    """
    if launched_processes() == 1 or dist.is_initialized():
        return
    if on_gpus:
        if local_world_size() > torch.cuda.device_count():
            raise MamlError(
                f"{local_world_size()} processes were started on this machine, which has {torch.cuda.device_count()} "
                "GPUs; start one for each (torchrun --nproc-per-node), or choose hardware=cpu"
            )
        torch.cuda.set_device(local_rank())
    with _explain_lost_process():
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo")
        # A process that is connected may fail and end while others still connect: then they would report a lost
        # process instead of the fault. So each waits until all are connected.
        dist.all_reduce(torch.zeros(()))
    atexit.register(dist.destroy_process_group)
    # Before they join, all processes fail alike; only rank 0 reports. From here on every process may report.
    sys.stderr = sys.__stderr__


def rank() -> int:
    """Returns this process's number. Only rank 0 writes files and messages."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Returns the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Returns this process's number on this machine, which is also the number of its GPU."""
    number = _variable("LOCAL_RANK", least=0, default=0)
    return number if is_one_of_several() else 0


def local_world_size() -> int:
    """Returns the number of processes on this machine."""
    number = _variable("LOCAL_WORLD_SIZE", least=1, default=1)
    return number if is_one_of_several() else 1


def shard(tasks: Tasks) -> Tasks:
    """Returns this process's part of a batch. The parts of rank 0, 1, ... make up the batch in its order.

    Raises:
        MamlError: if there are fewer tasks than processes.
    """
    count, num_processes = num_tasks(tasks), world_size()
    if count < num_processes:
        raise MamlError(
            f"{count} task{'s' * (count > 1)} cannot be shared by {num_processes} processes; "
            "start fewer (torchrun --nproc-per-node), or raise meta_batch_size"
        )
    return take(tasks, rank() * count // num_processes, (rank() + 1) * count // num_processes)


def all_reduce_sum(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns the sum of each tensor over all processes. All tensors of one dtype are sent together."""
    if world_size() == 1:
        return list(tensors)
    sums: list[Tensor] = list(tensors)
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        indices = [index for index, tensor in enumerate(tensors) if tensor.dtype == dtype]
        flat = torch.cat([tensors[index].flatten() for index in indices])
        with _explain_lost_process():
            dist.all_reduce(flat)
        parts = flat.split([tensors[index].numel() for index in indices])
        for index, part in zip(indices, parts, strict=True):
            sums[index] = part.view_as(tensors[index])
    return sums


def all_reduce_mean(sums: Sequence[Tensor], count: int) -> list[Tensor]:
    """Returns means over the tasks of all processes.

    Args:
        sums: sums over this process's tasks.
        count: number of this process's tasks.
    """
    if world_size() == 1:
        return list(torch._foreach_div(list(sums), count))
    *all_sums, all_tasks = all_reduce_sum([*sums, torch.full((), count, dtype=sums[0].dtype, device=sums[0].device)])
    return list(torch._foreach_div(all_sums, all_tasks))


def all_gather(part: Tensor) -> Tensor:
    """Returns the parts of all processes, concatenated along the first axis in the order of their ranks."""
    if world_size() == 1:
        return part
    parts: list[Any] = [None] * world_size()
    with _explain_lost_process():
        dist.all_gather_object(parts, part)
    return torch.cat(parts)


def all_reduce_max(number: int) -> int:
    """Returns the largest ``number`` over all processes."""
    if world_size() == 1:
        return number
    value = torch.tensor(number)
    with _explain_lost_process():
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


def on_rank_zero(function: Callable[[], Result]) -> Result:
    """Calls a function on rank 0 only. All processes get its result, or the `MamlError` that it raised."""
    if world_size() == 1:
        return function()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function()
        except MamlError as error:
            outcome[1] = error
    with _explain_lost_process():
        dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


@contextmanager
def _explain_lost_process() -> Iterator[None]:
    """Turns torch's error about a lost connection into `Disconnected`."""
    try:
        yield
    except RuntimeError as error:
        if is_capturing() or is_out_of_memory(error):
            raise  # the capture of a CUDA graph, which allows less, or the memory is at fault, and no process
        raise Disconnected(
            "another process of this run has ended or cannot be reached. Its own message says why, unless it was "
            "killed, for example because memory ran out. The last checkpoint is intact: the same command resumes, on "
            "any number of processes"
        ) from error
