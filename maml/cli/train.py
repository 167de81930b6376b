"""The command behind ``python train.py`` and ``maml train``: composes a config, runs it, and sets the exit status."""

from __future__ import annotations

import math
import os
import re
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

from maml.config.compose import (
    check_order,
    experiment_name,
    explain_config_error,
    plain_overrides,
)
from maml.config.conflicts import check_job
from maml.config.hints import explain_override_error
from maml.config.paths import CONF
from maml.errors import Interrupted, MamlError, Unavailable
from maml.experiment import run_experiment
from maml.hardware import distributed
from maml.paper.verdicts import cell_verdicts
from maml.sweep.job import stop_process

_FULL_ERROR = "HYDRA_FULL_ERROR"  # the environment variable with which Hydra raises its errors
_SWEEP, _SWEEP_GROUPS = ("-m", "--multirun"), ("launcher=", "sweeper=")  # words that start a sweep
_printed: list[str] = []  # errors of a sweep's jobs in this process
_raised: list[Exception] = []  # errors of the code that runs, a user's or ours, which need a traceback


def run(cfg: DictConfig) -> float | None:
    """Runs one experiment and returns its headline number, which sweeps optimise; None if adaptation diverged.

    Hydra calls this function, in this process or in a launcher's process.
    """
    job = HydraConfig.get()
    overrides = plain_overrides(job)
    try:
        check_order(overrides)
        if job.mode is RunMode.MULTIRUN and distributed.launched_processes() > 1:
            raise MamlError(
                "torchrun cannot start a sweep (-m); start the sweep with python, or each of its runs with torchrun"
            )
        headline = run_experiment(check_job(cfg, overrides), experiment_name(job.runtime.choices), cell_verdicts)
        return None if math.isnan(headline) else headline  # Optuna ends at NaN, but counts None as a failed trial
    except Interrupted as stop:
        requeue = signal.getsignal(stop.signal_number)
        if stop.signal_number in (signal.SIGUSR1, signal.SIGUSR2) and callable(requeue):  # the launcher's handler
            requeue(stop.signal_number, None)
        stop_process()
        raise
    except MamlError as error:
        if job.mode is RunMode.MULTIRUN:  # Hydra itself reports only the first failed job, at the end of the sweep
            print(f"{' '.join(overrides)}: {error}", file=sys.stderr)
            _printed.append(str(error))
        elif isinstance(error, Unavailable):  # a special exit status, for scripts that start many runs
            print(error, file=sys.stderr)
            sys.exit(os.EX_UNAVAILABLE)
        raise CompactHydraException(str(error)) from None  # Hydra prints its message without a traceback
    except OSError as error:
        if error.filename is None:
            _raised.append(error)
            raise
        raise CompactHydraException(f"{error.filename}: {error.strerror}") from error
    except Exception as error:
        _raised.append(error)
        raise


def main() -> None:
    """Runs the command in ``sys.argv``.

    Raises:
        SystemExit: if the run failed or was stopped. The status is 128 + the signal's number after a signal,
            ``os.EX_UNAVAILABLE`` if the machine lacks data or hardware, else 1.
    """
    try:
        is_rank_zero = distributed.launched_rank() == 0
        if distributed.launched_processes() == 1:
            os.environ.pop("RANK", None)  # left over from another program
    except MamlError as error:
        sys.exit(str(error))
    if not is_rank_zero:  # before they join, all processes fail alike; only rank 0 reports
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - open until the process ends
    arguments = sys.argv[1:]
    try:
        # Hydra would start a sweep with a misspelt key, which fails at the first job and leaves a record.
        may_sweep = any(word in _SWEEP or word.startswith(_SWEEP_GROUPS) for word in arguments)
        if may_sweep and explain_override_error(arguments):
            sys.exit(1)
        with _errors_from_hydra():
            hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(run)()
    except Interrupted as stop:
        if is_rank_zero:
            print(stop, file=sys.stderr)
        sys.exit(128 + stop.signal_number)
    except KeyboardInterrupt:  # before or after training, when there is nothing to save
        if is_rank_zero:
            print(
                "stopped by SIGINT; the same command goes on from the newest checkpoint, if there is one",
                file=sys.stderr,
            )
        sys.exit(130)
    except Exception as error:
        is_from_run = any(error is raised for raised in _raised) or type(error.__cause__).__name__ == "_RemoteTraceback"
        if is_from_run and not isinstance(error, HydraException):
            raise
        if str(error) not in _printed and not explain_override_error(arguments):
            print(_text(error), file=sys.stderr)
        sys.exit(1)


@contextmanager
def _errors_from_hydra() -> Iterator[None]:
    """Makes Hydra raise its errors. Otherwise it prints them itself, with all files that a misspelt name could mean."""
    before = os.environ.get(_FULL_ERROR)
    os.environ[_FULL_ERROR] = "1"
    try:
        yield
    except Exception:
        if before == "1":  # the user asks for the traceback
            traceback.print_exc()
        raise
    finally:
        os.environ.pop(_FULL_ERROR)
        if before is not None:
            os.environ[_FULL_ERROR] = before


def _text(error: Exception) -> str:
    """Returns the message of an error. A list of files is put on one line, and Hydra's search path is left out."""
    text, cause = str(error).strip(), error.__cause__
    if isinstance(error, MissingConfigException):
        text = text.partition("\n")[0] + (f"; allowed: {', '.join(error.options)}" if error.options else "")
    elif isinstance(error, OmegaConfBaseException):
        return explain_config_error(error)
    elif not isinstance(error, HydraException):
        return f"{type(error).__name__}: {text.partition(chr(10))[0]}"
    if (form := re.match(r"Error merging override \+*([^=]+)=(.*)", text)) and "Cannot merge" in str(cause):
        key, value = form.groups()
        return (
            f"{key}={value}: a mapping {{...}} does not replace a list [...], nor the other way round; write '~{key}' "
            f"'+{key}={value}'"
        )
    if (entries := re.match(r"Could not override '(.+)'\.", text)) and (value := re.search(r"=(\{.*\})", text)):
        key = entries[1]
        return (
            f"{key}={value[1]} can only change entries that are there. '++{key}={value[1]}' adds to them; '~{key}' "
            f"'+{key}={value[1]}' replaces them all"
        )
    if sweep := re.search(r"does not support sweep type : (\w+)_SWEEP", text):
        return (
            f"{sweep[1].lower()}(...) draws values, which needs a sweeper that can: add sweeper=optuna, or list the "
            "values, as in seed=0,1,2"
        )
    return f"{text}\n{str(cause).partition(chr(10))[0]}" if isinstance(cause, OmegaConfBaseException) else text
