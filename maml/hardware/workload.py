"""The demands of a domain's tasks on a machine: facts by which hardware settings are chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Workload:
    """How the tasks of a domain load a machine. `maml.hardware` chooses by it and knows no domain.

    The defaults suit tasks of small vectors, where the operations' own overhead is most of the time.

    Attributes:
        task_chunk: how many tasks a CPU batches at once; None is the whole meta-batch.
        measure_chunk: whether training may measure which chunk is fastest, instead of going by a rule. It pays where a
            task takes milliseconds.
        fixed_shapes: whether all tensors have the same shapes in every iteration. Only then can the meta-gradient be
            compiled, captured as a CUDA graph, or recomputed.
        threads: what several CPU threads can divide: the work of each operation (``operations``), only the ``tasks``,
            because operations are short or simulation is most of the time, or ``nothing``.
        whole_bank: whether meta-test is fastest with all of its tasks at once, also if training uses chunks.
    """

    task_chunk: int | None = None
    measure_chunk: bool = False
    fixed_shapes: bool = True
    threads: Literal["nothing", "operations", "tasks"] = "nothing"
    whole_bank: bool = False
