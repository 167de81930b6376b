"""One experiment from its config to its report: everything is built and checked before anything is written."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from maml.algorithm.base import Algorithm, Parts
from maml.config.identity import evaluation_config
from maml.config.schema import Settings, build
from maml.domain.base import Domain
from maml.errors import Disconnected, Interrupted, MamlError
from maml.evaluation import Evaluation, per_task_rows
from maml.hardware import distributed
from maml.hardware.base import Hardware
from maml.hardware.precision import check as check_precision
from maml.hardware.precision import computing_in
from maml.logger.base import Logger
from maml.model.base import Model
from maml.record.plot import plot_report
from maml.record.run_folder import Follower, RunFolder, command_line
from maml.seeding import Stream
from maml.training.autotune import tuned
from maml.training.iteration import Iteration, check_shared
from maml.training.loop import Learner, train


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
    with computing_in(config.precision):
        return _run_seeds(config, experiment, judge)


def _run_seeds(config: Settings, experiment: str, judge: Judge | None) -> float:
    hardware: Hardware = build(config.hardware)
    evaluation: Evaluation = build(config.evaluation)
    domain = build_domain(config, hardware)
    runs, headlines = [], []
    for seed in range(config.seed, config.seed + config.seeds):
        run = _Run(config.for_seed(seed), experiment, hardware, evaluation, domain, judge)
        if config.mode == "eval":
            headlines.append(run.evaluate_saved())
        elif (done := distributed.on_rank_zero(run.folder.finished_report)) is not None:
            _say(f"already finished: {run.folder.path} (delete the folder to run it again)")
            headlines.append(done["headline"])
        else:
            runs.append(run)
    if runs:
        check_precision(config.precision, runs[0].algorithm.domain.on_policy, hardware.device)
        check_shared(runs[0].algorithm, len(runs), config.meta_batch_size)
        _train(runs, config, hardware)
        headlines += [run.headline for run in runs]
    # A sweep needs a number where a report says that adaptation diverged.
    return sum(math.nan if headline is None else headline for headline in headlines) / len(headlines)


class _Run:
    """One seed's run: its parts, built and checked before anything is written.

    Attributes:
        folder: of the run.
        algorithm: what learns.
        headline: of its report, once there is one.
    """

    def __init__(
        self,
        config: Settings,
        experiment: str,
        hardware: Hardware,
        evaluation: Evaluation,
        domain: Domain[Any],
        judge: Judge | None,
    ) -> None:
        self.config, self.hardware, self.evaluation, self.judge = config, hardware, evaluation, judge
        is_first = distributed.rank() == 0
        self.logger: Logger = build(config.logger) if is_first else Logger()
        self.algorithm = build_algorithm(config, hardware, domain)
        evaluation.check(self.algorithm.domain)
        self.folder = RunFolder(config, experiment) if is_first else Follower(config, experiment)
        self.headline: float | None = None
        self._is_reported = False

    @contextmanager
    def opened(self, num_seeds: int) -> Iterator[dict[str, Any] | None]:
        """Holds the folder and the mirror; yields the checkpoint to resume from, and records how it ends."""
        hardware, command = self.hardware.describe(), command_line()
        if num_seeds > 1:
            hardware["seeds"] = num_seeds  # whose time this is, together
        saved = distributed.on_rank_zero(lambda: self.folder.open(hardware, command))
        status = "failed"
        try:
            folder, settings = self.folder, self.config.as_dict()
            self.logger.start(folder.path, folder.experiment, folder.run_id, settings, saved is not None)
            yield saved
        except (KeyboardInterrupt, SystemExit, Disconnected):  # the second of a launcher that requeues
            status = "interrupted"
            raise
        finally:
            status = "finished" if self._is_reported else status
            self.folder.close(status)  # first: a mirror may take its time
            self.logger.finish(status)

    def evaluate(self) -> None:
        """Evaluates what has been trained, as the run's own report."""
        report, picture = _evaluate(
            self.config, self.folder, self.algorithm, self.evaluation, self.config.num_iterations, self.judge
        )
        self.logger.report(report, {"adaptation": picture})
        self.headline, self._is_reported = report["headline"], True

    def evaluate_saved(self) -> float | None:
        """Evaluates the newest checkpoint, or the one given, beside the run's own report; returns the headline."""
        given, config = self.config.checkpoint, self.config
        saved = self.folder.load_checkpoint(Path(given) if given else None)
        if saved is None:
            raise MamlError(
                f"there is nothing to evaluate in {self.folder.path}: train first (the same command without "
                "mode=eval), or name a file with checkpoint="
            )
        execution = self.hardware.choose(self.algorithm.domain, config.num_iterations, saved["execution"])
        self.hardware.apply(execution)
        self.algorithm.task_chunk = execution.task_chunk
        self.algorithm.load_state_dict(saved["state"])
        beside = Path(given).parent if given else self.folder.path
        report, _ = _evaluate(
            config, self.folder, self.algorithm, self.evaluation, saved["iteration"], self.judge, beside
        )
        return report["headline"]


def _train(runs: Sequence[_Run], config: Settings, hardware: Hardware) -> None:
    """Trains runs that differ in their seeds alone, side by side, then evaluates each."""
    with ExitStack() as stack:
        before = signal.getsignal(signal.SIGTERM)
        with suppress(ValueError):  # not the main thread, where no signal arrives
            signal.signal(signal.SIGTERM, _stop)  # outside the training loop, which has its own way to stop
            stack.callback(signal.signal, signal.SIGTERM, before)
        for run in runs:
            distributed.on_rank_zero(run.folder.check_free)
        saved = [stack.enter_context(run.opened(len(runs))) for run in runs]
        earlier: Mapping[str, Any] = next((each["execution"] for each in saved if each), {})
        # What a checkpoint was made with is kept, so that it goes on exactly.
        execution = hardware.choose(runs[0].algorithm.domain, config.num_iterations, earlier)
        hardware.apply(execution)
        learners = []
        for run, its in zip(runs, saved, strict=True):
            run.algorithm.task_chunk = execution.task_chunk
            if its is not None:
                run.algorithm.load_state_dict(its["state"])
            stream = Stream(run.config.seed, hardware.device)
            start = its["iteration"] if its else 0
            learners.append(Learner(run.algorithm, stream, run.folder, run.logger, start))
        if not any(saved):
            algorithms, streams = [each.algorithm for each in learners], [each.stream for each in learners]
            iterate = Iteration(algorithms, streams, config.meta_batch_size, execution)
            execution = distributed.on_rank_zero(lambda: tuned(iterate, execution, hardware, runs[0].config))
            for algorithm in algorithms:
                algorithm.task_chunk = execution.task_chunk
        train(
            learners,
            execution,
            config.num_iterations,
            config.meta_batch_size,
            config.log_every,
            config.checkpoint_every,
        )
        for run in runs:
            run.evaluate()


def _stop(number: int, frame: FrameType | None) -> None:
    raise Interrupted("stopped by SIGTERM; training so far is saved: the same command goes on", number)


def _say(text: str) -> None:
    if distributed.rank() == 0:
        print(text)


def _evaluate(
    config: Settings,
    run: RunFolder,
    algorithm: Algorithm,
    evaluation: Evaluation,
    iteration: int,
    judge: Judge | None,
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
        return report, run.path
    folder = run.save_report(report, per_task_rows(curves), beside)
    picture = plot_report(report, folder / "report.png")
    verdicts = judge(run.experiment, config, report) if judge else {}
    print_report(report)
    for cell, judged in verdicts.items():
        print(f"  {cell}: {judged}")
    print(f"written to {folder}")
    return report | {"cells": verdicts}, picture


def print_report(report: Mapping[str, Any]) -> None:
    """Prints mean and 95 % interval of each curve, one column per gradient step."""
    done, planned = report["iteration"], report["num_iterations"]
    budget = "" if done == planned else f"  (reduced budget: {done} of {planned} iterations)"
    print(f"{report['experiment']} {report['run_id']}, seed {report['seed']}{budget}")
    for curve in report["curves"]:
        print(f"  {curve['metric']}, K={curve['num_shots']}, {curve['steps'][0]['num_tasks']} tasks")
        for step in curve["steps"]:
            value = "diverged" if step["ci95"] is None else f"{step['mean']:8.4f} +- {step['ci95']:.4f}"
            print(f"    step {step['step']:2d}: {value}")
