"""Gives each job of a sweep its own GPU, with one file lock per GPU; the locks of a dead process are free again."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from filelock import BaseFileLock
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from maml.record.lock import acquire

_POLL_SECONDS = 1.0


def visible_gpus() -> list[str]:
    """Returns the names of the GPUs that this process can use, in the form of ``CUDA_VISIBLE_DEVICES``."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return visible.split(",")[:count] if visible else [str(number) for number in range(count)]


def lease_gpu(pool: Path) -> BaseFileLock | None:
    """Waits for a GPU that no other process has leased, and makes it the only GPU that this process can see.

    CUDA must not be initialised yet. A process that leases a GPU again gets the same one, because the first call hides
    all others.

    Args:
        pool: folder of the locks.

    Returns:
        The lock, held until it is released or the process ends; None if there is no GPU.
    """
    names = visible_gpus()
    pool.mkdir(exist_ok=True)
    while names:
        for name in names:
            lock = acquire(pool / name)
            if lock is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = name
                return lock
        time.sleep(_POLL_SECONDS)
    return None


class OneGpuPerJob(Callback):
    """Gives each job of a sweep its own GPU; for launchers that do not do this themselves."""

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        # All sweeps of this user on this machine share one pool.
        self._lock = lease_gpu(Path(tempfile.gettempdir()) / f"maml_gpus_{os.getuid()}")

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if self._lock is not None:
            self._lock.release()
