"""One experiment from its config to its report: everything is built and checked before anything is written."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from maml.algorithm.base import Algorithm, Parts
from maml.config.identity import evaluation_config
from maml.config.schema import Settings, build
from maml.domain.base import Domain
from maml.errors import Interrupted, MamlError
from maml.evaluation import Evaluation, per_task_rows
from maml.hardware import distributed
from maml.hardware.base import Hardware
from maml.hardware.precision import check as check_precision
from maml.hardware.precision import use_precision
from maml.model.base import Model
from maml.record.plot import plot_report
from maml.seeding import Stream
from maml.training.autotune import tune_execution
from maml.training.iteration import Iteration, check_parallelism
from maml.training.learner import Learner
from maml.training.loop import train


def build_domain(config: Settings, hardware: Hardware) -> Domain[Any]:
    """Builds a domain, with its data on the device.

    Raises:
        MamlError: if data is missing.
    """
    domain = build(config.domain)
    domain.to(hardware.device)
    return domain


def build_algorithm(config: Settings, hardware: Hardware, domain: Domain[Any] | None = None) -> Algorithm:
    """Builds domain, model, inner and outer optimizer and the algorithm that joins them.

    Args:
        config: a checked, plain config.
        hardware: where theta and the data live.
        domain: if it is built already.

    Raises:
        MamlError: if data is missing or the parts do not fit each other.
    """
    domain = domain or build_domain(config, hardware)

    def make_model(in_shape: Sequence[int], out_dim: int) -> Model:
        return build(config.model, in_shape=in_shape, out_dim=out_dim)

    stream = Stream(config.seed, hardware.device).child("init")
    parts = Parts(domain, make_model, build(config.inner), build(config.outer), stream)
    return build(config.algorithm, parts=parts)


Judge = Callable[[str, Settings, Mapping[str, Any]], Mapping[str, str]]
"""Says what a report means: from an experiment's name, its settings and its report to lines of text by name."""


def run_experiment(config: Settings, experiment: str, judge: Judge | None = None) -> float:
    """Trains (or resumes), evaluates and records one run, or one for each of several seeds.

    Args:
        config: a checked, plain config.
        experiment: its name, which is the first folder under ``runs_dir``.
        judge: what it says of the report is printed under it and sent to the logger.

    Returns:
        The headline number: the domain's metric at its own K after the last gradient step, of several seeds the mean.

    Raises:
        MamlError: for anything the user can mend; what was saved before is intact.
        Interrupted: on SIGTERM or SIGINT, after a checkpoint.
    """
    if config.checkpoint is not None and config.mode == "train":
        raise MamlError("checkpoint= is for mode=eval; training resumes from its own run folder by itself")
    if config.seeds > 1 and (config.run_dir or config.checkpoint):
        raise MamlError("run_dir= and checkpoint= name one run, seeds= makes several; give each its own command")
    distributed.start(torch.cuda.is_available() and config.hardware.get("device") != "cpu")
    with use_precision(config.precision):
        return _run_seeds(config, experiment, judge)


def _run_seeds(config: Settings, experiment: str, judge: Judge | None) -> float:
    hardware: Hardware = build(config.hardware)
    evaluation: Evaluation = build(config.evaluation)
    domain = build_domain(config, hardware)
    learners, headlines = [], []
    for seed in range(config.seed, config.seed + config.seeds):
        settings = config.for_seed(seed)
        learner = Learner(settings, experiment, build_algorithm(settings, hardware, domain))
        evaluation.check(learner.algorithm.domain)
        if config.mode == "eval":
            headlines.append(_evaluate_saved(learner, hardware, evaluation, judge))
        elif (done := distributed.on_rank_zero(learner.folder.finished_report)) is not None:
            _say(f"already finished: {learner.folder.path} (delete the folder to run it again)")
            headlines.append(done["headline"])
        else:
            learners.append(learner)
    if learners:
        algorithm = learners[0].algorithm
        check_precision(config.precision, algorithm.domain.on_policy, hardware.device)
        check_parallelism(algorithm, len(learners), config.meta_batch_size)
        _train(learners, config, hardware, evaluation, judge)
        headlines += [learner.report["headline"] for learner in learners if learner.report]
    # A sweep needs a number where a report says that adaptation diverged.
    return sum(math.nan if headline is None else headline for headline in headlines) / len(headlines)


def _train(
    learners: Sequence[Learner], config: Settings, hardware: Hardware, evaluation: Evaluation, judge: Judge | None
) -> None:
    """Trains learners that differ in their seeds alone, side by side, then evaluates each."""
    with ExitStack() as stack:
        before = signal.getsignal(signal.SIGTERM)
        with suppress(ValueError):  # not the main thread, where no signal arrives
            signal.signal(signal.SIGTERM, _stop)  # outside the training loop, which has its own way to stop
            stack.callback(signal.signal, signal.SIGTERM, before)
        for learner in learners:
            distributed.on_rank_zero(learner.folder.check_free)
        saved = [stack.enter_context(learner.open(hardware, len(learners))) for learner in learners]
        earlier: Mapping[str, Any] = next((each["execution"] for each in saved if each), {})
        # What a checkpoint was made with is kept, so that it goes on exactly.
        execution = hardware.choose(learners[0].algorithm.domain, config.num_iterations, earlier)
        hardware.apply(execution)
        for learner, its in zip(learners, saved, strict=True):
            if its is not None:
                learner.restore(its)
        if not any(saved):
            algorithms, streams = [each.algorithm for each in learners], [each.stream for each in learners]
            iterate = Iteration(algorithms, streams, config.meta_batch_size, execution)
            execution = distributed.on_rank_zero(
                lambda: tune_execution(iterate, execution, hardware, learners[0].settings)
            )
        execution = train(
            learners,
            execution,
            config.num_iterations,
            config.meta_batch_size,
            config.log_every,
            config.checkpoint_every,
        )
        for learner in learners:
            report, picture = _evaluate(learner, evaluation, config.num_iterations, execution.task_chunk, judge)
            learner.logger.report(report, {"adaptation": picture})
            learner.report = report


def _evaluate_saved(learner: Learner, hardware: Hardware, evaluation: Evaluation, judge: Judge | None) -> float | None:
    """Evaluates the newest checkpoint, or the one given, beside the run's own report; returns the headline."""
    config, folder = learner.settings, learner.folder
    given = Path(config.checkpoint) if config.checkpoint else None
    saved = folder.load_checkpoint(given)
    if saved is None:
        raise MamlError(
            f"there is nothing to evaluate in {folder.path}: train first (the same command without mode=eval), or "
            "name a file with checkpoint="
        )
    execution = hardware.choose(learner.algorithm.domain, config.num_iterations, saved["execution"])
    hardware.apply(execution)
    learner.restore(saved)
    beside = given.parent if given else folder.path
    report, _ = _evaluate(learner, evaluation, saved["iteration"], execution.task_chunk, judge, beside)
    return report["headline"]


def _stop(number: int, frame: FrameType | None) -> None:
    raise Interrupted("stopped by SIGTERM; training so far is saved: the same command goes on", number)


def _say(text: str) -> None:
    if distributed.rank() == 0:
        print(text)


def _evaluate(
    learner: Learner,
    evaluation: Evaluation,
    iteration: int,
    task_chunk: int | None,
    judge: Judge | None,
    beside: Path | None = None,
) -> tuple[dict[str, Any], Path]:
    """Evaluates, writes report, per-task values and picture, and prints the table."""
    config, folder = learner.settings, learner.folder
    curves, banks, step_sizes = evaluation(learner.algorithm, task_chunk)
    domain = learner.algorithm.domain
    summaries = [curve.summary() for curve in curves]
    leading = [curve for curve in summaries if curve["metric"] == domain.headline]
    own_k = next((curve for curve in leading if curve["num_shots"] == domain.num_shots), leading[0])
    report = {
        "experiment": folder.experiment,
        "run_id": folder.run_id,
        "seed": config.seed,
        "iteration": iteration,
        "num_iterations": config.num_iterations,
        "evaluation": evaluation_config(config),
        "banks": banks,
        "step_sizes": step_sizes,
        "headline_metric": domain.headline,
        "larger_is_better": domain.larger_is_better,
        "headline": own_k["steps"][-1]["mean"],
        "curves": summaries,
    }
    if distributed.rank():
        return report, folder.path
    written = folder.save_report(report, per_task_rows(curves), beside)
    picture = plot_report(report, written / "report.png")
    verdicts = judge(folder.experiment, config, report) if judge else {}
    print_report(report, learner.algorithm.name)
    for cell, judged in verdicts.items():
        print(f"  {cell}: {judged}")
    print(f"written to {written}")
    return report | {"cells": verdicts}, picture


def print_report(report: Mapping[str, Any], algorithm: str) -> None:
    """Prints mean and 95 % interval of each curve, one column per gradient step."""
    done, planned = report["iteration"], report["num_iterations"]
    budget = "" if done == planned else f"  (reduced budget: {done} of {planned} iterations)"
    print(f"{report['experiment']} {report['run_id']}, {algorithm}, seed {report['seed']}{budget}")
    for curve in report["curves"]:
        print(f"  {curve['metric']}, K={curve['num_shots']}, {curve['steps'][0]['num_tasks']} tasks")
        for step in curve["steps"]:
            value = "diverged" if step["ci95"] is None else f"{step['mean']:8.4f} +- {step['ci95']:.4f}"
            print(f"    step {step['step']:2d}: {value}")
