"""What ``python train.py ...`` and ``maml train ...`` do: compose a config, run it, and end with the right status."""

from __future__ import annotations

import os
import signal
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from maml.config.compose import check_order, experiment_name, to_plain_config
from maml.config.hints import explain_override_error
from maml.config.paths import CONF
from maml.config.schema import check
from maml.errors import Interrupted, MamlError, Unavailable
from maml.experiment import run_experiment
from maml.paper.verdicts import cell_verdicts


def run(cfg: DictConfig) -> float:
    """Runs one experiment and returns its headline number, which sweeps optimise.

    Hydra calls it, here or in the process that a launcher made.
    """
    job = HydraConfig.get()
    try:
        check_order(job.overrides.task)
        if job.mode is RunMode.MULTIRUN and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise MamlError(
                "torchrun is for one run, -m for many: start a sweep with python, or each of its runs alone"
            )
        return run_experiment(check(to_plain_config(cfg)), experiment_name(job.runtime.choices), cell_verdicts)
    except Interrupted as stop:
        requeue = signal.getsignal(stop.signal_number)
        if stop.signal_number in (signal.SIGUSR1, signal.SIGUSR2) and callable(requeue):  # the launcher's
            requeue(stop.signal_number, None)
        raise
    except MamlError as error:
        if job.mode is RunMode.MULTIRUN:  # of several jobs that fail, Hydra reports only the first, and at the end
            print(f"{' '.join(job.overrides.task)}: {error}", file=sys.stderr)
        elif isinstance(error, Unavailable):  # a status of its own, for what starts many runs
            print(error, file=sys.stderr)
            sys.exit(os.EX_UNAVAILABLE)
        raise CompactHydraException(str(error)) from None  # its message without a traceback


def main() -> None:
    """Runs what ``sys.argv`` says.

    Raises:
        SystemExit: if the run failed or was stopped: 128 + the signal's number, ``os.EX_UNAVAILABLE`` where the machine
            lacks something, else 1.
    """
    is_rank_zero = os.environ.get("RANK", "0") == "0"
    if not is_rank_zero:  # until they have joined, what is wrong in one process is wrong in the first, which says it
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lasts
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(run)()
    except Interrupted as stop:
        if is_rank_zero:
            print(stop, file=sys.stderr)
        sys.exit(128 + stop.signal_number)
    except KeyboardInterrupt:  # before or after training: there is nothing to save
        print("stopped by SIGINT; the same command goes on from what is saved", file=sys.stderr)
        sys.exit(130)
    except SystemExit as end:
        if end.code:
            explain_override_error(sys.argv[1:])
        raise
