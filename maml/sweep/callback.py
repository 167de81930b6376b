"""Records each job of a sweep while it runs, and writes a table over the sweep's axes at its end."""

from __future__ import annotations

import atexit
import os
import platform
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any
from uuid import uuid4

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException, HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from maml.config.compose import plain_overrides, settings_of, to_plain_config
from maml.config.names import locate
from maml.config.schema import build_without_data
from maml.digest import digest
from maml.errors import Interrupted, MamlError
from maml.hardware.distributed import launched_processes
from maml.record.atomic import remove_leftovers, write_json_atomically
from maml.record.lock import process_exists
from maml.record.provenance import command_line
from maml.record.run_files import read_json
from maml.sweep.disk import local_disk
from maml.sweep.gpu_lease import visible_gpus
from maml.sweep.job import Post, RunningJob, is_stopped, live_jobs, stop_jobs, stop_process
from maml.sweep.monitor import Monitor
from maml.sweep.state import SWEEP, SweepReader, describe, job_overrides, summary_line, varying_keys
from maml.sweep.summary import submitted_jobs, summarise

_SAVE_SECONDS = 60.0  # in which the jobs of a stopped sweep save


def _direction(domain: DictConfig) -> str:
    """Returns the direction in which a sweeper optimises a domain's headline number."""
    target: Any = locate(domain["_target_"])
    if not hasattr(target, "larger_is_better"):  # in some domains, it depends on their arguments
        target = build_without_data(to_plain_config(domain))
    return "maximize" if target.larger_is_better else "minimize"


OmegaConf.register_new_resolver("direction", _direction, replace=True)
OmegaConf.register_new_resolver("gpus_per_job", lambda: min(1, len(visible_gpus())), replace=True)


class Sweep(Callback):
    """Records each job in ``runs_dir/sweeps/<id>``. However the sweep ends, it writes a summary table.

    Hydra also calls it in the processes in which a launcher runs the jobs. The id is a hash of the sweep's overrides,
    so the same command finds the same folder.

    Args:
        jobs_outlive_command: whether the jobs are SLURM's: they run on other machines, which have to see ``runs_dir``,
            and outlive the sweep's command.
    """

    return_checkpoints = False
    launcher_stops_jobs = False  # whether it ends the jobs of a stopped command itself

    def __init__(self, jobs_outlive_command: bool = False) -> None:
        self.jobs_outlive_command = jobs_outlive_command
        self.folder: Path | None = None  # the sweep's folder; None for a single run
        self.arguments: list[str] = []
        self.post: Post | None = None  # the way to the sweep's folder from a machine that does not see it
        self._in_file = False  # whether the output of a job goes to a file
        self._command = 0  # the process of the sweep's command
        self._stops_jobs = False  # whether the command, if it is stopped, asks its jobs to save and end
        self._stopping = False
        self._token = ""  # random; by it a job recognises the sweep's folder
        self._started = 0.0
        self._job: RunningJob | None = None  # the job that this process runs
        self._reader: SweepReader | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what belongs to this process: to requeue a job, SLURM's launcher pickles this object there."""
        return self.__dict__ | {"_job": None, "_reader": None}

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if launched_processes() > 1:
            return  # train.py refuses sweeps under torchrun
        try:
            planned = _planned_jobs(config)
        except HydraException:
            return  # Hydra itself reports the wrong override
        if problem := _hopeless(config, planned):
            print(problem, file=sys.stderr)
            sys.exit(1)  # Hydra turns other errors of a callback into warnings
        self.folder = Path(config.runs_dir).resolve() / "sweeps" / _sweep_id(config)
        try:
            (self.folder / "jobs").mkdir(parents=True, exist_ok=True)
        except OSError as error:  # Hydra would turn it into a warning
            print(f"the folder {self.folder} cannot be created ({error.strerror}); change runs_dir", file=sys.stderr)
            sys.exit(1)
        for folder in (self.folder, self.folder / "jobs"):
            remove_leftovers(folder)
        self.arguments = [str(Path(sys.argv[0]).resolve()), *sys.argv[1:]]
        self._in_file = not _is(config.hydra.launcher, BasicLauncher)  # several jobs at once
        earlier: dict[str, Any] = {}
        with suppress(MamlError):  # it is damaged, and written anew
            earlier = read_json(self.folder / SWEEP) or {}
        self._token = earlier.get("token") or uuid4().hex
        # While jobs of another command run, both commands are one start of the sweep: both show all jobs.
        goes_on = "started" in earlier and live_jobs(self.folder)
        self._started = earlier["started"] if goes_on else time.time()
        self._command = os.getpid()
        self._stops_jobs = self._in_file and not self.jobs_outlive_command and not self.launcher_stops_jobs
        num_jobs = OmegaConf.select(config, "hydra.sweeper.n_trials") if planned is None else len(planned)
        content = {"command": command_line(), "started": self._started, "num_jobs": num_jobs, "planned": planned}
        write_json_atomically(self.folder / SWEEP, content | {"token": self._token})
        if self.jobs_outlive_command and (disk := local_disk(self.folder)):
            runs_dir, host = self.folder.parents[1], platform.node()
            print(
                f"the jobs run on other machines, which have to see {runs_dir}; it is on a disk of {host} ({disk}). "
                f"Unless {host} shares it, choose a folder on a shared disk with runs_dir=",
                file=sys.stderr,
            )
        # An exception, as from Ctrl-C, lets a launcher stop its processes too.
        signal.signal(signal.SIGTERM, self._stop)
        # Otherwise, Ctrl-C asks to run the command again at once, or ends it before its jobs have saved.
        if self.jobs_outlive_command or self._stops_jobs:
            signal.signal(signal.SIGINT, self._stop)
        # Not an attribute, because Hydra pickles this object for the processes of the jobs.
        monitor = Monitor(self.folder, num_jobs) if self._in_file else None
        if self._stops_jobs:
            # Ctrl-C goes to all processes of a terminal, and joblib kills its processes if an idle one of them dies.
            # New processes inherit what this thread blocks. The command gets the signal through the monitor's thread.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        atexit.register(self._end, monitor, submitted_jobs(self.folder))

    def _end(self, monitor: Monitor | None, earlier_jobs: set[Path]) -> None:
        assert self.folder
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not cost the summary
        if self._job is not None:  # it was stopped
            self._job.stop()
        if monitor is not None:
            monitor.stop()
        summarise(self.folder, self.jobs_outlive_command, earlier_jobs)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self._stops_jobs and not self._stopping:  # a second signal does not wait
            assert self.folder
            self._stopping = True
            with suppress(OSError):  # not with `print`, which fails if the signal has interrupted another `print`
                os.write(2, b"\nstopping: the jobs save and end; a second signal does not wait for them\n")
            stop_jobs(self.folder, self._command, _SAVE_SECONDS)
        # The summary says when jobs that go on can be continued.
        again = "" if self.jobs_outlive_command else "; run the same command again to continue from the checkpoints"
        raise Interrupted(f"stopped by {signal.Signals(number).name}{again}", number)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        if not self.folder:
            return
        if self._stops_jobs and os.getpid() != self._command:
            if is_stopped() or not process_exists(self._command):  # before this job started
                raise Interrupted("the sweep has been stopped", signal.SIGTERM)
            with suppress(ValueError):  # outside the main thread, no handler can be set
                signal.signal(signal.SIGTERM, self._stop_job)
        sys.argv = self.arguments  # the sweep's command, for the run's record; a launcher's process has its own
        with suppress(OSError):  # on another machine, which may not have this folder
            os.chdir(config.hydra.runtime.cwd)  # a process on a cluster starts in another folder
        folder, post, sweep = self.folder, None, self._read_sweep()
        if not sweep:
            folder, post = Path(config.runs_dir).resolve() / "sweeps" / folder.name, self.post
            if post is None:
                print(
                    f"{platform.node()} does not see {self.folder}: what this job writes stays in {config.runs_dir} "
                    "on this machine; choose a runs_dir on a shared disk",
                    file=sys.stderr,
                )
        # The command may have been given again since this job was submitted.
        started = sweep.get("started", self._started)
        self._job = RunningJob(folder, config, self._in_file, post, self.return_checkpoints, self._command, started)
        if is_stopped():  # while it was made
            self._stop_job(signal.SIGTERM, None)
        if not self._in_file:
            self._announce(self._job.name)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if self._job is None:
            return
        error = None
        if job_return.status is JobStatus.FAILED:
            reason = job_return._return_value  # the public `return_value` raises the error
            known = isinstance(reason, CompactHydraException)
            error = str(reason) if known else f"{type(reason).__name__}: {reason}"
        self._job.end(error)
        self._job = None

    def _stop_job(self, number: int, frame: FrameType | None) -> None:
        """Handles the signal with which the command stops a job, where the run itself does not handle it."""
        if stop_process():
            raise Interrupted("stopped before training", number)

    def _read_sweep(self) -> dict[str, Any]:
        """Returns the content of `sweep.json`; empty if this process sees none, or another one at the same path."""
        assert self.folder
        with suppress(MamlError):
            sweep = read_json(self.folder / SWEEP) or {}
            return sweep if sweep.get("token") == self._token else {}
        return {}

    def _announce(self, name: str) -> None:
        """Prints how far the sweep is, and which job begins."""
        assert self.folder
        self._reader = self._reader or SweepReader(self.folder)  # one for all jobs, because it reads finished ones once
        jobs = self._reader.jobs()
        (now, *_) = [describe(job, varying_keys(jobs)) for job in jobs if job.name == name]
        print(f"{summary_line(jobs)}; now {now}", file=sys.stderr)


def _is(plugin: DictConfig, kind: type) -> bool:
    """Returns whether a launcher or sweeper is of a kind; by name, because Hydra may load the class a second time."""
    return plugin._target_ == f"{kind.__module__}.{kind.__qualname__}"


def _planned_jobs(config: DictConfig) -> list[list[str]] | None:
    """Returns the overrides of every job of a sweep; None if its sweeper chooses the jobs one by one.

    Raises:
        HydraException: if an override cannot be swept.
    """
    if not _is(config.hydra.sweeper, BasicSweeper):
        return None
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())  # which finds the files of glob()
    (jobs,) = BasicSweeper.split_arguments(parser.parse_overrides(_swept(config)), None)
    return [job_overrides(job) for job in jobs]


def _hopeless(config: DictConfig, planned: list[list[str]] | None) -> str:
    """Returns why a sweep cannot have one valid job, in one to three lines; empty if it can.

    Jobs are checked until one is valid, so a sweep in which some fail still runs and lists them.
    """
    if problem := _wrong_number(config) or _undirected_search(config):
        return problem
    for overrides in planned or ():
        try:
            settings_of(GlobalHydra.instance().config_loader().load_sweep_config(config, overrides))
        except MamlError as error:
            problem = problem or f"{' '.join(overrides)}: {error}"
        except (HydraException, OmegaConfBaseException):
            return ""  # Hydra itself reports it
        else:
            return ""
    return problem


def _wrong_number(config: DictConfig) -> str:
    """Returns which number of the launcher or the sweeper is out of range; empty if none is."""
    for key in ("hydra.launcher.n_jobs", "hydra.sweeper.n_jobs", "hydra.sweeper.n_trials"):
        number = OmegaConf.select(config, key)
        if number == 0 or (isinstance(number, int) and number < 0 and key != "hydra.launcher.n_jobs"):
            return f"{key}={number}: it has to be at least 1" + ", or -1 for one per core" * ("launcher" in key)
    for key in ("timeout_min", "mem_gb", "cpus_per_task", "array_parallelism"):
        number = OmegaConf.select(config, f"hydra.launcher.{key}")
        if isinstance(number, int | float) and number <= 0:
            return f"hydra.launcher.{key}={number}: it has to be above 0"
    for key in ("gpus_per_node", "signal_delay_s", "max_num_timeout"):
        number = OmegaConf.select(config, f"hydra.launcher.{key}")
        if isinstance(number, int) and number < 0:
            return f"hydra.launcher.{key}={number}: it has to be at least 0"
    for key in ("hydra.launcher.nodes", "hydra.launcher.tasks_per_node"):
        number = OmegaConf.select(config, key)
        if isinstance(number, int) and number > 1:
            return f"{key}={number}: a job of a sweep is one process, as two cannot share a run folder; leave it at 1"
    return ""


def _undirected_search(config: DictConfig) -> str:
    """Returns why it is not known whether a search has to raise or lower its number; empty if it is known."""
    sweeper: Any = OmegaConf.to_container(config.hydra.sweeper, resolve=False)
    if str(sweeper.get("direction")).startswith("${direction:"):  # resolved without the swept overrides
        for override in OverridesParser.create().parse_overrides(_swept(config)):
            if override.is_sweep_override() and (key := override.key_or_group) in ("experiment", "domain"):
                return (
                    f"the search chooses {key}, so whether its number should go up or down is not known before; set "
                    "hydra.sweeper.direction=maximize (accuracy and return) or minimize (error)"
                )
    return ""


def _swept(config: DictConfig) -> list[str]:
    """Returns the overrides of the command, after those that a sweeper has from its config."""
    params = OmegaConf.select(config, "hydra.sweeper.params") or {}
    return [*(f"{key}={value}" for key, value in params.items()), *plain_overrides(config.hydra)]


def _sweep_id(config: DictConfig) -> str:
    settings: dict[str, Any] = {"overrides": job_overrides(_swept(config))}
    name = config.hydra.job.config_name
    return digest(settings if name == "config" else settings | {"config": name})
