"""The GPUs of this machine, one for each job: a pool of file locks, which no process that has died can keep."""

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
    """Returns the names by which a process can be given one GPU of those that we see."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return visible.split(",")[:count] if visible else [str(number) for number in range(count)]


def lease_gpu(pool: Path) -> BaseFileLock | None:
    """Waits for a GPU that no other process has, and lets this one see no other from now on.

    CUDA must not be in use yet. A process that has had a GPU before gets the same again, as CUDA does not change it.

    Args:
        pool: the folder of the locks.

    Returns:
        The lock, held until it is released or the process ends; None where there is no GPU.
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
    """Gives each job of a sweep a GPU of its own; for launchers that do not do so themselves."""

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        # One pool for all sweeps of this user on this machine.
        self._lock = lease_gpu(Path(tempfile.gettempdir()) / f"maml_gpus_{os.getuid()}")

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if self._lock is not None:
            self._lock.release()
