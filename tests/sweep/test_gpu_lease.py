"""The pool of GPUs, on simulated machines."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hydra.core.utils import JobReturn
from omegaconf import DictConfig

from maml.sweep import gpu_lease
from maml.sweep.gpu_lease import OneGpuPerJob, lease_gpu


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with two GPUs, both visible to this process."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")

    def count() -> int:
        return len(os.environ["CUDA_VISIBLE_DEVICES"].split(","))

    monkeypatch.setattr(torch.cuda, "device_count", count)
    return monkeypatch


def test_jobs_at_the_same_time_get_different_gpus(machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first, taken = lease_gpu(tmp_path), os.environ["CUDA_VISIBLE_DEVICES"]
    machine.setenv("CUDA_VISIBLE_DEVICES", "4,7")  # another process
    second = lease_gpu(tmp_path)
    assert (taken, os.environ["CUDA_VISIBLE_DEVICES"]) == ("4", "7")
    assert first and second
    first.release()
    second.release()


def test_job_waits_until_a_gpu_is_free(machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    others = [lease_gpu(tmp_path)]
    machine.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    others.append(lease_gpu(tmp_path))
    machine.setenv("CUDA_VISIBLE_DEVICES", "4,7")

    def end_one(seconds: float) -> None:
        lock = others.pop()
        assert lock
        lock.release()

    machine.setattr(gpu_lease.time, "sleep", end_one)
    mine = lease_gpu(tmp_path)
    assert mine
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"
    for lock in (mine, *others):
        assert lock
        lock.release()


def test_next_job_of_a_process_gets_the_gpu_that_it_had(machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocking = lease_gpu(tmp_path)
    machine.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    first = lease_gpu(tmp_path)
    assert blocking and first
    blocking.release()
    first.release()
    again = lease_gpu(tmp_path)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7", "CUDA would not take notice of another"
    assert again
    again.release()


def test_job_that_has_ended_gives_its_gpu_back(machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine.setattr(gpu_lease.tempfile, "gettempdir", lambda: str(tmp_path))
    callback, pool = OneGpuPerJob(), tmp_path / f"maml_gpus_{os.getuid()}"
    callback.on_job_start(DictConfig({}))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4"
    callback.on_job_end(DictConfig({}), JobReturn())
    machine.setenv("CUDA_VISIBLE_DEVICES", "4,7")  # another process
    other = lease_gpu(pool)
    assert other and os.environ["CUDA_VISIBLE_DEVICES"] == "4"
    other.release()


def test_nothing_happens_without_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert lease_gpu(tmp_path) is None
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
