"""One experiment from its config to its report: everything is built and checked before anything is written."""

from __future__ import annotations

import math
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from maml.algorithm.base import Algorithm, Parts
from maml.compiling import compiled
from maml.config import build, evaluation_config
from maml.errors import Interrupted, MamlError
from maml.evaluation import Evaluation, per_task_rows
from maml.figures import plot_report
from maml.hardware import Execution, Hardware
from maml.logger.base import Logger
from maml.model.base import Model
from maml.paper.verdicts import cell_verdicts
from maml.run import RunFolder, command_line
from maml.seeding import Stream
from maml.training import train


def build_algorithm(config: Mapping[str, Any], hardware: Hardware) -> Algorithm:
    """Builds domain, model, inner and outer optimizer and the algorithm that joins them.

    Args:
        config: a checked, plain config.
        hardware: where theta and the data live.

    Raises:
        MamlError: if data is missing or the parts do not fit each other.
    """
    domain = build(config["domain"])
    domain.to(hardware.device)

    def make_model(in_shape: Sequence[int], out_dim: int) -> Model:
        return build(config["model"], in_shape=in_shape, out_dim=out_dim)

    stream = Stream(config["seed"], hardware.device).child("init")
    parts = Parts(domain, make_model, build(config["inner"]), build(config["outer"]), stream)
    return build(config["algorithm"], parts=parts)


def run_experiment(config: Mapping[str, Any], experiment: str) -> float:
    """Trains (or resumes), evaluates and records one run.

    Args:
        config: a checked, plain config.
        experiment: its name, which is the first folder under ``runs_dir``.

    Returns:
        The headline number: the domain's metric at its own K after the last gradient step.

    Raises:
        MamlError: for anything the user can mend; what was saved before is intact.
        Interrupted: on SIGTERM or SIGINT, after a checkpoint.
    """
    hardware: Hardware = build(config["hardware"])
    evaluation: Evaluation = build(config["evaluation"])
    logger: Logger = build(config["logger"])
    algorithm = build_algorithm(config, hardware)
    evaluation.check(algorithm.domain)
    run = RunFolder(config, experiment)
    if config["mode"] == "eval":
        return _evaluate_saved(config, run, algorithm, evaluation, hardware)
    if config["checkpoint"] is not None:
        raise MamlError("checkpoint= is for mode=eval; training resumes from its own run folder by itself")
    done = run.finished_report()
    if done is not None:
        print(f"already finished: {run.path} (delete the folder to run it again)")
        return _number(done["headline"])

    saved = run.open(hardware.describe(), command_line())
    status = "failed"
    before = signal.getsignal(signal.SIGTERM)
    with suppress(ValueError):  # not the main thread, where no signal arrives
        signal.signal(signal.SIGTERM, _stop)  # outside the training loop, which has its own way to stop
    try:
        execution = _execution(saved, hardware, algorithm, config)
        logger.start(run.path, experiment, run.run_id, dict(config), resumed=saved is not None)
        train(
            algorithm,
            run,
            logger,
            execution,
            saved,
            Stream(config["seed"], hardware.device),
            config["num_iterations"],
            config["meta_batch_size"],
            config["log_every"],
            config["checkpoint_every"],
        )
        report, picture = _evaluate(config, run, algorithm, evaluation, config["num_iterations"])
        logger.report(report, {"adaptation": picture})
        status = "finished"
    except (KeyboardInterrupt, SystemExit):  # the latter of a launcher that requeues
        status = "interrupted"
        raise
    finally:
        with suppress(ValueError):
            signal.signal(signal.SIGTERM, before)
        run.close(status)  # first: a mirror may take its time
        logger.finish(status)
    return _number(report["headline"])


def _stop(number: int, frame: FrameType | None) -> None:
    raise Interrupted("stopped by SIGTERM; training so far is saved: the same command goes on", number)


def _number(headline: float | None) -> float:
    """A sweep needs a number where a report says that adaptation diverged."""
    return math.nan if headline is None else headline


def _execution(
    saved: Mapping[str, Any] | None, hardware: Hardware, algorithm: Algorithm, config: Mapping[str, Any]
) -> Execution:
    """Settles threads, chunk and compilation; what a checkpoint was made with is kept, so that it goes on exactly."""
    execution = hardware.choose(algorithm.domain, config["num_iterations"], saved["execution"] if saved else {})
    hardware.apply(execution)
    algorithm.task_chunk = execution.task_chunk
    if execution.compile:
        algorithm.chunk_gradient = compiled(algorithm.chunk_gradient)
    return execution


def _evaluate_saved(
    config: Mapping[str, Any], run: RunFolder, algorithm: Algorithm, evaluation: Evaluation, hardware: Hardware
) -> float:
    given = config["checkpoint"]
    saved = run.load_checkpoint(Path(given) if given else None)
    if saved is None:
        raise MamlError(
            f"there is nothing to evaluate in {run.path}: train first (the same command without mode=eval), "
            "or name a file with checkpoint="
        )
    _execution(saved, hardware, algorithm, config)
    algorithm.load_state_dict(saved["state"])
    beside = Path(given).parent if given else run.path
    report, _ = _evaluate(config, run, algorithm, evaluation, saved["iteration"], beside)
    return _number(report["headline"])


def _evaluate(
    config: Mapping[str, Any],
    run: RunFolder,
    algorithm: Algorithm,
    evaluation: Evaluation,
    iteration: int,
    beside: Path | None = None,
) -> tuple[dict[str, Any], Path]:
    """Evaluates, writes report, per-task values and picture, and prints the table."""
    curves, banks, step_sizes = evaluation(algorithm)
    domain = algorithm.domain
    summaries = [curve.summary() for curve in curves]
    leading = [curve for curve in summaries if curve["metric"] == domain.headline]
    own_k = next((curve for curve in leading if curve["num_shots"] == domain.num_shots), leading[0])
    report = {
        "experiment": run.experiment,
        "run_id": run.run_id,
        "seed": config["seed"],
        "iteration": iteration,
        "num_iterations": config["num_iterations"],
        "evaluation": evaluation_config(config),
        "banks": banks,
        "step_sizes": step_sizes,
        "headline_metric": domain.headline,
        "larger_is_better": domain.larger_is_better,
        "headline": own_k["steps"][-1]["mean"],
        "curves": summaries,
    }
    folder = run.save_report(report, per_task_rows(curves), beside)
    picture = plot_report(report, folder / "report.png")
    verdicts = cell_verdicts(run.experiment, config, report)
    print_report(report)
    for cell, judged in verdicts.items():
        print(f"  {cell}: {judged}")
    print(f"written to {folder}")
    return report | {"cells": verdicts}, picture


def print_report(report: Mapping[str, Any]) -> None:
    """Prints mean and 95 % interval of each curve, one column per gradient step."""
    done, planned = report["iteration"], report["num_iterations"]
    budget = "" if done == planned else f"  (reduced budget: {done} of {planned} iterations)"
    print(f"{report['experiment']} {report['run_id']}{budget}")
    for curve in report["curves"]:
        print(f"  {curve['metric']}, K={curve['num_shots']}, {curve['steps'][0]['num_tasks']} tasks")
        for step in curve["steps"]:
            value = "diverged" if step["ci95"] is None else f"{step['mean']:8.4f} +- {step['ci95']:.4f}"
            print(f"    step {step['step']:2d}: {value}")
