"""The processes of one run, as torchrun starts them: each takes its share of the tasks; sums are taken over all.

A process that was started alone is the first of one, and every function here is then as good as absent.
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
from maml.types import Tasks, num_tasks, take

Result = TypeVar("Result")


def start(on_gpus: bool) -> None:
    """Joins the other processes that torchrun has started, if it has: over Gloo, and NCCL between GPUs.

    Args:
        on_gpus: whether each computes on a GPU of its own.

    Raises:
        MamlError: if there are fewer GPUs than processes, or the others cannot be reached.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
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
    atexit.register(dist.destroy_process_group)
    sys.stderr = sys.__stderr__  # train.py keeps all but the first silent up to here


def rank() -> int:
    """Returns this process's number; the first, 0, is the one that writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Returns how many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Returns this process's number among those on this machine: that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Returns how many of them share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def shard(tasks: Tasks) -> Tasks:
    """Returns this process's part of a batch, whose tasks follow each other in the order of the processes.

    Raises:
        MamlError: if there are fewer tasks than processes.
    """
    count, own, others = num_tasks(tasks), rank(), world_size()
    if count < others:
        raise MamlError(
            f"{count} task{'s' * (count > 1)} cannot be shared by {others} processes; "
            "start fewer (torchrun --nproc-per-node), or raise meta_batch_size"
        )
    return take(tasks, own * count // others, (own + 1) * count // others)


def all_reduce_sum(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns the sums of tensors over all processes: one exchange for each type of number."""
    if world_size() == 1:
        return list(tensors)
    summed: list[Tensor] = list(tensors)
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        places = [place for place, tensor in enumerate(tensors) if tensor.dtype == dtype]
        flat = torch.cat([tensors[place].flatten() for place in places])
        with _explain_lost_process():
            dist.all_reduce(flat)
        parts = flat.split([tensors[place].numel() for place in places])
        for place, part in zip(places, parts, strict=True):
            summed[place] = part.view_as(tensors[place])
    return summed


def all_reduce_mean(sums: Sequence[Tensor], count: int) -> list[Tensor]:
    """Returns means over the tasks of all processes, from the sums over ``count`` tasks of this one."""
    if world_size() == 1:
        return list(torch._foreach_div(list(sums), count))
    *all_sums, all_tasks = all_reduce_sum([*sums, torch.full((), count, dtype=sums[0].dtype, device=sums[0].device)])
    return list(torch._foreach_div(all_sums, all_tasks))


def all_gather(part: Tensor) -> Tensor:
    """Returns the parts of all processes, one behind the other along the first axis."""
    if world_size() == 1:
        return part
    parts: list[Any] = [None] * world_size()
    with _explain_lost_process():
        dist.all_gather_object(parts, part)
    return torch.cat(parts)


def all_reduce_max(number: int) -> int:
    """Returns the largest of the numbers that the processes give."""
    if world_size() == 1:
        return number
    value = torch.tensor(number)
    with _explain_lost_process():
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


def on_rank_zero(act: Callable[[], Result]) -> Result:
    """Has the first process act; returns the result to all, or raises what it raised."""
    if world_size() == 1:
        return act()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = act()
        except MamlError as error:
            outcome[1] = error
    with _explain_lost_process():
        dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


@contextmanager
def _explain_lost_process() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise Disconnected(
            "another process of this run has ended, or cannot be reached; its own message says why, unless it was "
            "killed (for lack of memory, say). The last checkpoint is intact: the same command resumes, on any number "
            "of processes"
        ) from error
