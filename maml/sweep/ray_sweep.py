"""Sweeps on a Ray cluster whose machines share no disk: the files of each run come back through Ray."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from maml.record.atomic import write_bytes_atomically
from maml.sweep.callback import Sweep
from maml.sweep.job import run_files
from maml.sweep.state import SWEEP


class Disk:
    """The disk of the machine that started the sweep; on other machines, its methods are called through Ray.

    Args:
        runs_dir: folder of all runs, to which paths are relative.
    """

    def __init__(self, runs_dir: Path) -> None:
        self.runs_dir = runs_dir

    def read(self, folder: str) -> dict[str, bytes]:
        """See `maml.sweep.job.Post`."""
        path = self.runs_dir / folder
        return {str(file.relative_to(path)): file.read_bytes() for file in run_files(path, with_checkpoints=True)}

    def write(self, files: Mapping[str, bytes | None]) -> None:
        """See `maml.sweep.job.Post`."""
        for name, content in files.items():
            path = self.runs_dir / name
            if content is None:
                path.unlink(missing_ok=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes_atomically(path, content)

    def sees(self, file: str) -> bool:
        """Returns whether a file exists."""
        return (self.runs_dir / file).exists()


class RayPost:
    """Calls a `Disk` through Ray and waits for the answer.

    Args:
        disk: Ray's handle of it.
    """

    def __init__(self, disk: Any) -> None:
        self._disk = disk

    def read(self, folder: str) -> dict[str, bytes]:
        """See `maml.sweep.job.Post`."""
        import ray

        return ray.get(self._disk.read.remote(folder))

    def write(self, files: Mapping[str, bytes | None]) -> None:
        """See `maml.sweep.job.Post`."""
        import ray

        ray.get(self._disk.write.remote(dict(files)))


class RaySweep(Sweep):
    """Sends what a job writes to the process that started the sweep, if the job's machine does not see its disk.

    While a job runs, its record and metrics follow with each heartbeat; its report follows at its end.

    Args:
        return_checkpoints: whether checkpoints follow too. A job that Ray starts again on another machine then goes on
            from the last one, instead of from the beginning.
    """

    launcher_stops_jobs = True

    def __init__(self, return_checkpoints: bool = False) -> None:
        super().__init__()
        self.return_checkpoints = return_checkpoints

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        super().on_multirun_start(config, **kwargs)
        if self.folder is None:
            return
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        if not ray.is_initialized():  # the launcher does the same later
            options: Any = OmegaConf.to_container(config.hydra.launcher.ray.init, resolve=True)
            ray.init(**options)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        runs_dir = self.folder.parents[1]
        disk = ray.remote(num_cpus=0, scheduling_strategy=here)(Disk).remote(runs_dir)
        if ray.get(disk.sees.remote(str(self.folder / SWEEP))):
            self.post = RayPost(disk)
            return
        print(
            f"Ray's node of this process does not see {runs_dir} on {platform.node()}, so reports of machines without "
            "a shared disk stay there; start the sweep on a machine of the cluster",
            file=sys.stderr,
        )
