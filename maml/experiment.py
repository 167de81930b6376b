"""Runs one experiment from its settings to its report; everything is built and checked before anything is written."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from maml.algorithm.base import Algorithm, Parts
from maml.config.identity import evaluation_config
from maml.config.schema import TRAINING_PARTS, Part, Settings, build
from maml.curve import Curve, per_task_rows
from maml.domain.base import Domain
from maml.errors import MamlError
from maml.evaluation import Evaluation
from maml.feasibility import check_tasks_fit, check_training_fits, naming_the_largest_setting
from maml.hardware import distributed
from maml.hardware.base import Hardware
from maml.hardware.precision import check_precision, use_precision
from maml.logger.base import Logger
from maml.model.base import Model
from maml.outer.checks import check_step
from maml.record.classes import class_tables, confusion
from maml.record.extension import extend_finished_run
from maml.record.plot import plot_report
from maml.record.report import Judgement, print_report
from maml.record.run_files import read_metrics
from maml.seeding import Stream
from maml.status import announce
from maml.training.autotune import tune_execution
from maml.training.iteration import Iteration, check_parallelism
from maml.training.learner import Learner
from maml.training.loop import stop_at_once, train


def build_domain(settings: Settings, hardware: Hardware) -> Domain[Any]:
    """Builds the domain and moves its data to the device.

    Raises:
        MamlError: if data is missing, or the domain's sizes are none.
    """
    domain: Domain[Any] = build(settings.domain)
    domain.check_sizes()
    domain.to(hardware.device)
    return domain


def build_algorithm(settings: Settings, hardware: Hardware, domain: Domain[Any] | None = None) -> Algorithm:
    """Builds the domain, model, inner and outer optimizer, and the algorithm from them.

    Args:
        settings: the checked settings of one seed.
        hardware: its device holds theta and the data.
        domain: the domain, if it is built already; None builds it.

    Raises:
        MamlError: if data is missing or the parts do not fit each other.
    """
    domain = domain or build_domain(settings, hardware)
    stream = Stream(settings.seed, hardware.device).child("init")
    parts = Parts(domain, partial(_make_model, settings.model), build(settings.inner), build(settings.outer), stream)
    algorithm: Algorithm = build(settings.algorithm, parts=parts)
    if settings.validate_every:
        algorithm.keep_best_of_validation()
    return algorithm


def _make_model(model: Part, in_shape: Sequence[int], out_dim: int) -> Model:
    return build(model, in_shape=in_shape, out_dim=out_dim)


Judge = Callable[[str, Settings, Mapping[str, Any]], Mapping[str, Judgement]]
"""Compares a report with other results, such as the paper's.

Takes an experiment's name, its settings and its report. Returns a judgement for each compared number, by name.
"""


def run_experiment(settings: Settings, experiment: str, judge: Judge | None = None) -> float:
    """Trains (or resumes), evaluates and records one run for each seed.

    Args:
        settings: the checked settings.
        experiment: the experiment's name, which is the first folder under ``runs_dir``.
        judge: compares the report with other results; its judgements are printed with the report and sent to the
            logger. None compares nothing.

    Returns:
        The headline number: the domain's headline metric at its own K after the last gradient step; the mean over
        several seeds; NaN if adaptation diverged.

    Raises:
        MamlError: for anything that the user can mend. Saved files stay intact.
        Interrupted: on SIGTERM or SIGINT, after a checkpoint was saved.
    """
    if settings.checkpoint is not None and settings.mode == "train":
        raise MamlError("checkpoint= is for mode=eval; training resumes from its own run folder by itself")
    if settings.validate_every and not settings.num_iterations:
        raise MamlError(
            f"validate_every={settings.validate_every} measures theta during training, but num_iterations=0 trains "
            "nothing; set validate_every=null"
        )
    if settings.seed + settings.seeds > 2**63:
        raise MamlError(
            f"seeds={settings.seeds} from seed={settings.seed} on end above 2^63 - 1, the largest seed; lower one"
        )
    if settings.seeds > 1 and (settings.run_dir or settings.checkpoint):
        raise MamlError(
            "run_dir= and checkpoint= are for one run, but seeds= makes several runs; start each seed with its own "
            "command"
        )
    with ExitStack() as stack:
        with suppress(ValueError):  # outside the main thread, no handler can be set
            # For the time before and after the training loop, which has its own handler.
            stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, stop_at_once))
        distributed.start(torch.cuda.is_available() and settings.hardware.get("device") != "cpu")
        stack.enter_context(use_precision(settings.precision))
        return _run_seeds(settings, experiment, judge or (lambda *_: {}))


def _run_seeds(settings: Settings, experiment: str, judge: Judge) -> float:
    hardware: Hardware = build(settings.hardware)
    evaluation: Evaluation = build(settings.evaluation)
    untrained, headlines = [], []
    for learner in _build_learners(settings, experiment, hardware, evaluation):
        if settings.mode == "eval":
            headlines.append(_evaluate_saved(learner, hardware, evaluation, judge))
            continue
        missing = distributed.on_rank_zero(learner.folder.missing)
        if missing & {"report.json", *learner.folder.tables}:
            untrained.append(learner)
        else:
            headlines.append(_complete(learner, hardware, missing, judge))
    if untrained:
        _train(untrained, settings, hardware, evaluation, judge)
        headlines += [learner.report["headline"] for learner in untrained if learner.report]
    # The headline of a report is None if adaptation diverged.
    return sum(math.nan if headline is None else headline for headline in headlines) / len(headlines)


def _build_learners(
    settings: Settings, experiment: str, hardware: Hardware, evaluation: Evaluation
) -> Iterator[Learner]:
    """Yields the learner of each seed, all on one domain. Checks everything that can be checked before training."""
    with naming_the_largest_setting(settings, "domain"):
        domain = build_domain(settings, hardware)
    hardware.check(domain.workload)
    check_tasks_fit(settings, domain, evaluation)
    for seed in range(settings.seed, settings.seed + settings.seeds):
        seed_settings = settings.for_seed(seed)
        with naming_the_largest_setting(settings, *TRAINING_PARTS):
            algorithm = build_algorithm(seed_settings, hardware, domain)
            if seed == settings.seed:  # the other seeds have the same data and sizes
                if settings.validate_every:
                    algorithm.check_validation()
                check_training_fits(settings, algorithm, hardware)
        learner = Learner(seed_settings, experiment, algorithm)
        if seed == settings.seed and settings.mode == "train":
            begun = distributed.on_rank_zero(learner.folder.has_begun)
            check_step(algorithm.outer, algorithm.theta, 0 if begun else settings.num_iterations)
        distributed.on_rank_zero(partial(learner.logger.check_seeds, settings.seeds))
        evaluation.check(domain)
        evaluation.check_algorithm(algorithm)
        if seed == settings.seed and settings.mode == "train":
            evaluation.check_measurements(algorithm)
        distributed.on_rank_zero(learner.folder.check_sources)
        yield learner


def _train(
    learners: Sequence[Learner], settings: Settings, hardware: Hardware, evaluation: Evaluation, judge: Judge
) -> None:
    """Trains learners that differ in their seeds only, all at once, then evaluates each."""
    algorithms, streams = [each.algorithm for each in learners], [each.stream for each in learners]
    check_precision(settings.precision, algorithms[0].domain.on_policy, hardware.device)
    check_parallelism(algorithms[0], len(learners), settings.meta_batch_size)
    with ExitStack() as stack:
        for learner in learners:  # all of them before the first one writes
            distributed.on_rank_zero(learner.folder.check_ready)
        for learner in learners:
            distributed.on_rank_zero(partial(_extend, learner))
        checkpoints = [stack.enter_context(learner.open(hardware, len(learners))) for learner in learners]
        # A resumed run keeps the execution of its checkpoint, so that it computes the same bits.
        earlier: Mapping[str, Any] = next((saved["execution"] for saved in checkpoints if saved), {})
        workload = algorithms[0].domain.workload
        execution = hardware.choose(workload, settings.num_iterations, earlier)
        hardware.apply(execution)
        for learner, saved in zip(learners, checkpoints, strict=True):
            if saved is not None:
                learner.restore(saved)
        if (first := algorithms[0].inner.second_order_from or 0) > settings.num_iterations:
            announce(f"all iterations are of first order: inner.second_order_from={first} comes after the last one")
        if not any(checkpoints):
            # Measured with the order of the last iterations, which take the most time and memory.
            last = max(settings.num_iterations, algorithms[0].inner.second_order_from or 1)
            iterate = Iteration(algorithms, streams, settings.meta_batch_size, execution, last)
            execution = distributed.on_rank_zero(
                lambda: tune_execution(iterate, execution, hardware, learners[0].settings)
            )
            hardware.apply(execution)
        execution = train(learners, execution)
        hardware.apply(execution.for_meta_test(workload))
        problems = []
        for learner in learners:
            try:
                learner.algorithm.check_result()
            except MamlError as error:
                problems.append(MamlError(f"{learner.folder.path}: {error}"))
                continue
            learner.finish(*_evaluate(learner, evaluation, settings.num_iterations, execution.task_chunk, judge))
        if problems:  # after the evaluation of the other seeds
            raise problems[0]


def _extend(learner: Learner) -> None:
    """Goes on from a finished run with fewer iterations, and says so."""
    if shorter := extend_finished_run(learner.folder):
        announce(f"goes on from {shorter}, which has the same settings but for num_iterations")
        learner.folder.check_sources()  # warns if changes are accepted


def _complete(learner: Learner, hardware: Hardware, missing: set[str], judge: Judge) -> float | None:
    """Does what is left to do after a run's evaluation, and returns the headline number.

    Args:
        learner: the run.
        hardware: the machine.
        missing: what is left to do: nothing, the plot, or the end of a run that was killed after its evaluation.
        judge: see `run_experiment`.
    """
    folder = learner.folder
    report = distributed.on_rank_zero(folder.finished_report)
    assert report is not None
    if not missing:
        judgements = judge(folder.experiment, learner.settings, report)
        _print_on_rank_zero(f"already finished: {folder.path} (another run_dir=, or deleting it, trains anew)")
        if distributed.rank() == 0:
            print_report(report, learner.algorithm.name, list(judgements.values()))
        learner.send_finished(report, lambda: _texts(judgements))
        return report["headline"]
    if missing == {"report.png"}:  # the run is finished, so its logger has the report
        learner.logger = Logger()
    with learner.open(hardware, num_seeds=1):
        plot = folder.report_folder / "report.png"
        if distributed.rank() == 0 and not plot.exists():
            plot_report(report, plot, read_metrics(folder.path / "metrics.jsonl"))
        learner.finish(report | {"cells": _texts(judge(folder.experiment, learner.settings, report))}, plot)
    _print_on_rank_zero(f"{folder.path} was evaluated, but lacked {', '.join(sorted(missing))}: now it is finished")
    return report["headline"]


def _evaluate_saved(learner: Learner, hardware: Hardware, evaluation: Evaluation, judge: Judge) -> float | None:
    """Evaluates the run's newest checkpoint, or the file ``checkpoint=``; returns the headline number.

    The report gets its own folder below the checkpoint's folder, so that it replaces no other report.
    """
    settings, folder = learner.settings, learner.folder
    saved = folder.load_checkpoint()
    if saved is None:
        raise MamlError(
            f"there is nothing to evaluate in {folder.path}: train first (the same command without mode=eval), or "
            "name a file with checkpoint="
        )
    workload = learner.algorithm.domain.workload
    execution = hardware.choose(workload, settings.num_iterations, saved["execution"])
    hardware.apply(execution.for_meta_test(workload))
    learner.restore(saved)
    report, plot = _evaluate(learner, evaluation, saved["iteration"], execution.task_chunk, judge)
    learner.send_evaluation(report, plot)
    return report["headline"]


def _print_on_rank_zero(text: str) -> None:
    if distributed.rank() == 0:
        print(text)


def _evaluate(
    learner: Learner, evaluation: Evaluation, iteration: int, task_chunk: int | None, judge: Judge
) -> tuple[dict[str, Any], Path]:
    """Evaluates one run; writes the report, the values per task and the plot; and prints the report.

    Args:
        learner: the run.
        evaluation: the meta-test.
        iteration: number of iterations that the evaluated state was trained for.
        task_chunk: number of tasks that are adapted at once; None uses a default.
        judge: see `run_experiment`.

    Returns:
        The report, with the judge's texts under ``cells``, and the path of the plot.
    """
    settings, folder, algorithm = learner.settings, learner.folder, learner.algorithm
    curves, banks, step_sizes = evaluation(algorithm, task_chunk)
    report = _make_report(learner, iteration, curves, banks, step_sizes)
    if distributed.rank():
        return report, folder.path
    counted = [
        confusion(curve.num_shots, curve.predictions, algorithm.domain.class_names)
        for curve in curves
        if curve.predictions
    ]
    pictures = partial(evaluation.pictures, algorithm)
    tables = class_tables(counted) if evaluation.per_class else {}
    written_to = folder.save_report(report, per_task_rows(curves), tables, pictures)
    plot = plot_report(report, written_to / "report.png", read_metrics(folder.path / "metrics.jsonl"))
    judgements = judge(folder.experiment, settings, report)
    with suppress(BrokenPipeError):  # a reader such as `head` has enough; the run does not end because of it
        print_report(report, algorithm.name, list(judgements.values()))
        for each in counted:
            print(f"  classes, {each.summary()}")
        if evaluation.per_class and len(counted) < len(banks):
            print("  classes are not counted at a K where adaptation diverged")
        print(f"written to {written_to}")
    return report | {"cells": _texts(judgements)}, plot


def _make_report(
    learner: Learner,
    iteration: int,
    curves: Sequence[Curve],
    banks: Mapping[str, str],
    step_sizes: Mapping[str, list[float] | None],
) -> dict[str, Any]:
    """Returns the content of ``report.json``.

    Args:
        learner: the run.
        iteration: number of iterations that the evaluated state was trained for.
        curves: the curves of the meta-test.
        banks: the hash of the frozen bank for each K.
        step_sizes: the step sizes for each K; None stands for the inner optimizer's own.
    """
    settings, domain = learner.settings, learner.algorithm.domain
    summaries = [curve.summary() for curve in curves]
    headline_curves = [curve for curve in summaries if curve["metric"] == domain.headline]
    if not headline_curves:
        raise MamlError(
            f"{type(domain).__name__}.headline is {domain.headline}, but its measure returns "
            f"{', '.join(sorted({curve['metric'] for curve in summaries}))} only; name one of these as headline. The "
            "training is saved: then the same command with changed_sources=accept evaluates it"
        )
    headline_curve = next(
        (curve for curve in headline_curves if curve["num_shots"] == domain.num_shots), headline_curves[0]
    )
    return {
        "experiment": learner.folder.experiment,
        "run_id": learner.folder.run_id,
        "seed": settings.seed,
        "iteration": iteration,
        "num_iterations": settings.num_iterations,
        "evaluation": evaluation_config(settings),
        "banks": banks,
        "step_sizes": step_sizes,
        "headline_metric": domain.headline,
        "larger_is_better": domain.larger_is_better,
        **({} if domain.measured_by == "gradient step" else {"measured_by": domain.measured_by}),
        "headline": headline_curve["steps"][-1]["mean"],
        "headline_num_shots": headline_curve["num_shots"],
        "curves": summaries,
    }


def _texts(judgements: Mapping[str, Judgement]) -> dict[str, str]:
    return {cell: judged.text for cell, judged in judgements.items()}
