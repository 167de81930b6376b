"""Tiny runs for tests of whole experiments: compose, start, find and compare them."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import maml.training.iteration
from maml.algorithm.base import Algorithm
from maml.config.compose import compose
from maml.config.schema import Settings
from maml.experiment import run_experiment
from maml.record import checkpoint
from maml.record.run_folder import RunFolder
from maml.training.meta_gradient import MetaGradient
from maml.types import Tasks

ROOT = Path(__file__).resolve().parents[1]

# Neither period divides the other or the number of iterations: logs and checkpoints fall on different iterations.
_TINY = (
    "log_every=3",
    "checkpoint_every=7",
    "evaluation.num_tasks=5",
    "evaluation.num_steps=2",
    "hardware=cpu",
    "hardware.num_threads=1",
)
DOMAINS = {
    "sinusoid": ("num_iterations=200", "meta_batch_size=4", "evaluation.num_shots=[5,10]"),
    "omniglot": (
        "domain=omniglot",
        "model=conv4",
        "evaluation=accuracy",
        "model.num_filters=16",
        "inner.step_size=0.4",
        "num_iterations=40",
        "meta_batch_size=3",
        "hardware.task_chunk=2",
    ),
}


@functools.cache
def _compose(overrides: tuple[str, ...]) -> tuple[Settings, str]:
    return compose(overrides)


@dataclass(frozen=True)
class TinyRuns:
    """Starts runs that take seconds, all in one folder.

    Attributes:
        runs_dir: folder of the run folders.
        cache_dir: folder of the image caches.
        base: overrides that every run gets.
    """

    runs_dir: Path
    cache_dir: Path
    base: tuple[str, ...] = ()

    def on_domain(self, domain: str) -> TinyRuns:
        """Returns tiny runs on one of `DOMAINS`, in the same folder."""
        return replace(self, base=(*DOMAINS[domain], *_TINY))

    def in_folder(self, name: str) -> TinyRuns:
        """Returns the same runs in another folder, a sibling of ``runs_dir``."""
        return replace(self, runs_dir=self.runs_dir.with_name(name))

    def config(self, *overrides: str) -> Settings:
        """Composes and checks a config, as train.py does."""
        config, _ = _compose((*self.base, f"cache_dir={self.cache_dir}", *overrides))
        return replace(config, runs_dir=str(self.runs_dir))

    def folder(self, *overrides: str) -> Path:
        """Returns the folder of a run, whether it exists or not."""
        return RunFolder(self.config(*overrides), "custom").path

    def run(self, *overrides: str) -> Path:
        """Runs in this process and returns the run's folder."""
        run_experiment(self.config(*overrides), "custom")
        return self.folder(*overrides)

    def start(self, *arguments: str, process_group: int | None = None) -> subprocess.Popen[str]:
        """Starts train.py with the same settings as a separate process, in the process group; 0 is a new one."""
        places = (f"runs_dir={self.runs_dir}", f"cache_dir={self.cache_dir}")
        command = [sys.executable, "train.py", *arguments, *self.base, *places]
        return subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=process_group,
        )


def run_in_child(config: Settings) -> None:
    """Runs an experiment in a forked child process."""
    torch.set_num_threads(1)
    run_experiment(config, "custom")


def before_iteration(monkeypatch: pytest.MonkeyPatch, iteration: int, act: Callable[[MetaGradient], object]) -> None:
    """Makes this process call ``act`` just before a meta-update; ``iteration`` counts meta-updates from 1."""
    meta_update, count = maml.training.iteration.meta_update, 0

    def act_then_update(algorithm: Algorithm, meta_gradient: MetaGradient, tasks: Tasks) -> dict[str, Tensor]:
        nonlocal count
        count += 1
        if count == iteration:
            act(meta_gradient)
        return meta_update(algorithm, meta_gradient, tasks)

    monkeypatch.setattr("maml.training.iteration.meta_update", act_then_update)


def checkpoint_tensors(folder: Path) -> dict[str, Tensor]:
    """Returns all tensors of a run's newest checkpoint, by name."""
    saved = checkpoint.load(folder / "checkpoint.pt")["state"]
    return {f"{group}.{name}": value for group, values in saved.items() for name, value in values.items()}


def assert_same_run(folder: Path, other: Path) -> None:
    """Asserts that two runs are bit-identical: parameters, optimizer state, metrics and evaluation."""
    assert (
        checkpoint.load(folder / "checkpoint.pt")["iteration"] == checkpoint.load(other / "checkpoint.pt")["iteration"]
    )
    tensors, others = checkpoint_tensors(folder), checkpoint_tensors(other)
    assert tensors.keys() == others.keys()
    assert not [name for name in tensors if not torch.equal(tensors[name], others[name])]
    for name in ("metrics.jsonl", "report.json", "tasks.csv"):
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name


def file_contents(folder: Path, but: Sequence[str] = ()) -> dict[str, bytes]:
    """Returns the content of every file below a folder, by path; ``but`` lists file names to leave out."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in but)
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}
