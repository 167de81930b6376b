"""The command behind ``python train.py`` and ``maml train``: composes a config, runs it, and sets the exit status."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from maml.config.compose import check_order, experiment_name, to_plain_config
from maml.config.hints import explain_override_error
from maml.config.paths import CONF
from maml.config.schema import check
from maml.errors import Interrupted, MamlError, Unavailable
from maml.experiment import run_experiment
from maml.paper.verdicts import cell_verdicts

_FULL_ERROR = "HYDRA_FULL_ERROR"  # the environment variable with which Hydra raises its errors
_printed: list[str] = []  # errors of a sweep's jobs in this process


def run(cfg: DictConfig) -> float:
    """Runs one experiment and returns its headline number, which sweeps optimise.

    Hydra calls this function, in this process or in a launcher's process.
    """
    job = HydraConfig.get()
    try:
        check_order(job.overrides.task)
        if job.mode is RunMode.MULTIRUN and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise MamlError(
                "torchrun cannot start a sweep (-m); start the sweep with python, or each of its runs with torchrun"
            )
        return run_experiment(check(to_plain_config(cfg)), experiment_name(job.runtime.choices), cell_verdicts)
    except Interrupted as stop:
        requeue = signal.getsignal(stop.signal_number)
        if stop.signal_number in (signal.SIGUSR1, signal.SIGUSR2) and callable(requeue):  # the launcher's handler
            requeue(stop.signal_number, None)
        raise
    except MamlError as error:
        if job.mode is RunMode.MULTIRUN:  # Hydra itself reports only the first failed job, at the end of the sweep
            print(f"{' '.join(job.overrides.task)}: {error}", file=sys.stderr)
            _printed.append(str(error))
        elif isinstance(error, Unavailable):  # a special exit status, for scripts that start many runs
            print(error, file=sys.stderr)
            sys.exit(os.EX_UNAVAILABLE)
        raise CompactHydraException(str(error)) from None  # Hydra prints its message without a traceback


def main() -> None:
    """Runs the command in ``sys.argv``.

    Raises:
        SystemExit: if the run failed or was stopped. The status is 128 + the signal's number after a signal,
            ``os.EX_UNAVAILABLE`` if the machine lacks data or hardware, else 1.
    """
    is_rank_zero = os.environ.get("RANK", "0") == "0"
    if not is_rank_zero:  # before they join, all processes fail alike; only rank 0 reports
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - open until the process ends
    arguments = sys.argv[1:]
    try:
        # Hydra would start a sweep with a misspelt key, which fails at the first job and leaves a record.
        if {"-m", "--multirun"}.intersection(arguments) and explain_override_error(arguments):
            sys.exit(1)
        with _errors_from_hydra():
            hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(run)()
    except Interrupted as stop:
        if is_rank_zero:
            print(stop, file=sys.stderr)
        sys.exit(128 + stop.signal_number)
    except KeyboardInterrupt:  # before or after training, when there is nothing to save
        if is_rank_zero:
            print("stopped by SIGINT; run the same command again to continue from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except (HydraException, ValueError) as error:  # a ValueError for a group=null
        if str(error) not in _printed and not explain_override_error(arguments):
            if not isinstance(error, HydraException):
                raise
            print(_text(error), file=sys.stderr)
        sys.exit(1)


@contextmanager
def _errors_from_hydra() -> Iterator[None]:
    """Makes Hydra raise its errors. Otherwise it prints them itself, with all files that a misspelt name could mean."""
    before = os.environ.get(_FULL_ERROR)
    os.environ[_FULL_ERROR] = "1"
    try:
        yield
    except HydraException:
        if before == "1":  # the user asks for the traceback
            traceback.print_exc()
        raise
    finally:
        os.environ.pop(_FULL_ERROR)
        if before is not None:
            os.environ[_FULL_ERROR] = before


def _text(error: HydraException) -> str:
    """Returns the message of an error. A list of files is put on one line, and Hydra's search path is left out."""
    text = str(error).strip()
    if isinstance(error, MissingConfigException):
        text = text.partition("\n")[0] + (f"; allowed: {', '.join(error.options)}" if error.options else "")
    cause = error.__cause__
    return f"{text}\n{str(cause).partition(chr(10))[0]}" if isinstance(cause, OmegaConfBaseException) else text
