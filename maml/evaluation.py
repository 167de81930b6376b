"""Meta-test: adapts to a frozen bank of tasks and measures after every gradient step."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, MinLen
from torch import Tensor

from maml.algorithm.base import Algorithm
from maml.algorithm.best import SCORE
from maml.curve import Curve
from maml.domain.base import Domain, Metrics, Predictions
from maml.errors import Diverged, MamlError
from maml.hardware import distributed
from maml.hardware.memory import halve_chunk_on_oom
from maml.pictures import Picture
from maml.seeding import Stream
from maml.training.progress import EvaluationProgress
from maml.types import (
    Count,
    NonNegativeFloat,
    NonNegativeInt,
    Params,
    PositiveFloat,
    Seed,
    Split,
    Tasks,
    form_of,
    num_tasks,
    take,
)

# Number of tasks that are adapted at once if the execution sets no chunk.
_DEFAULT_CHUNK = 100

# Number of tasks of which an algorithm can make pictures.
_NUM_PICTURED = 4


class StepSizeSearch:
    """Chooses the step sizes for meta-test: those of a grid with the best last step on validation tasks.

    Args:
        step_sizes: grid of step sizes to try.
        decays: grid of decays to try with every step size. With decay d, step s (from 0) has the size
            step_size / (1 + s * d). None does not decay.
        num_tasks: number of validation tasks.
        later_factor: factor of the sizes of all steps after the first; 0.5 halves them, as in the authors' RL code.
    """

    def __init__(
        self,
        step_sizes: Annotated[list[PositiveFloat], MinLen(1)],
        num_tasks: Annotated[int, Ge(2)],
        decays: Annotated[list[NonNegativeFloat], MinLen(1)] | None = None,
        later_factor: PositiveFloat = 1.0,
    ) -> None:
        self.step_sizes, self.num_tasks, self.decays = step_sizes, num_tasks, decays or [0.0]
        self.later_factor = later_factor

    @property
    def num_candidates(self) -> int:
        """Number of step sizes and decays that are tried."""
        return len(self.step_sizes) * len(self.decays)

    def __call__(
        self,
        evaluation: Evaluation,
        algorithm: Algorithm,
        num_shots: int,
        task_chunk: int | None = None,
        progress: EvaluationProgress | None = None,
    ) -> list[float]:
        """Returns the chosen step sizes at one K, one per step.

        Step sizes with which adaptation diverged are never chosen. The first of equally good ones wins.

        Args:
            evaluation: draws the validation tasks and measures.
            algorithm: the algorithm with the state to evaluate.
            num_shots: K.
            task_chunk: number of tasks that are adapted at once; None uses a default.
            progress: the display; None shows nothing.

        Raises:
            MamlError: if adaptation diverged with all of them.
        """
        domain = algorithm.domain
        bank = evaluation.bank(domain, num_shots, self.num_tasks, split="val")
        sign = 1 if domain.larger_is_better else -1
        best, chosen = -math.inf, None
        for step_size, decay in itertools.product(self.step_sizes, self.decays):
            sizes = [step_size / (1 + step * decay) for step in range(evaluation.num_steps)]
            sizes[1:] = [size * self.later_factor for size in sizes[1:]]
            if progress:
                progress.what = f"K={num_shots}, trying step size {step_size:g}" + f", decay {decay:g}" * bool(decay)
            try:
                curves = evaluation.curves(algorithm, num_shots, bank, sizes, task_chunk, progress)
            except Diverged:
                continue
            score = next(sign * curve.values[-1].mean().item() for curve in curves if curve.metric == domain.headline)
            if score > best:  # a NaN is never better
                best, chosen = score, sizes
        if chosen is None:
            raise MamlError(
                f"adaptation at K={num_shots} diverged with every step size of evaluation.search.step_sizes="
                f"{self.step_sizes}; add smaller ones"
            )
        return chosen


class Evaluation:
    """Adapts to every task of a frozen bank and measures after each step.

    The bank depends on these settings and the domain only: every run is evaluated on the same tasks.

    Args:
        num_tasks: number of tasks in the bank; at least 2, for an interval.
        num_steps: number of gradient steps (training has its own number).
        num_shots: every K to evaluate at; None evaluates at the domain's K only.
        num_query: number of query examples (per class, in classification); None is K, as in the authors' code.
        step_size: inner step size in meta-test: one number, a list with one per step, or a mapping from K to a number.
            None uses the inner optimizer's own.
        search: searches the step size at each K on validation tasks, instead of ``step_size``.
        split: which tasks to evaluate on: ``test``, or ``val`` to choose settings.
        bank_seed: seed of the frozen bank, the fixed set of test tasks.
        bank: whose test tasks the bank has: ``seeded`` draws them from ``bank_seed``; ``authors`` rebuilds those of the
            authors, in domains where that is possible. Validation tasks are always drawn from ``bank_seed``.
        theta: which theta to evaluate: the ``last`` one or, if training keeps it, the ``best``, by its training
            returns or, with ``validate_every``, on validation tasks.
        num_ways: N of the tasks, in domains whose tasks draw their own classes; None is the domain's, as in training.
            With a smaller N, tasks have the labels 0 to N - 1 of the network. A larger one needs an algorithm that
            does not fix it.
        per_class: whether to count which class of the data set was taken for which, in ``classes.csv`` and
            ``confusion.csv``.
    """

    def __init__(
        self,
        num_tasks: Annotated[int, Ge(2)],
        num_steps: NonNegativeInt,
        num_shots: Annotated[list[Count], MinLen(1)] | None = None,
        num_query: Count | None = None,
        step_size: PositiveFloat | list[PositiveFloat] | Annotated[dict[int, PositiveFloat], MinLen(1)] | None = None,
        search: StepSizeSearch | None = None,
        split: Literal["test", "val"] = "test",
        bank_seed: Seed = 0,
        theta: Literal["last", "best"] = "last",
        bank: Literal["seeded", "authors"] = "seeded",
        num_ways: Annotated[int, Ge(2)] | None = None,
        per_class: bool = False,
    ) -> None:
        if isinstance(step_size, list) and len(step_size) != num_steps:
            raise MamlError(
                f"evaluation.step_size lists {len(step_size)} sizes for evaluation.num_steps={num_steps}; "
                "give one per step, or a single one"
            )
        if num_shots is not None and len(set(num_shots)) != len(num_shots):
            raise MamlError(f"evaluation.num_shots={num_shots} names a K twice")
        if step_size is not None and search is not None:
            raise MamlError("evaluation.step_size and evaluation.search both set the step size; set one to null")
        if num_steps == 0 and (search or step_size is not None):
            key = "search" if search else "step_size"
            raise MamlError(
                f"evaluation.{key} sets the size of steps, but evaluation.num_steps=0 takes none; set evaluation.{key}="
                "null, or a number of steps"
            )
        if search is not None and split == "val":
            raise MamlError(
                "evaluation.search chooses on validation tasks, so evaluation.split=val would report the tasks that it "
                "chose on; set evaluation.search=null, or evaluation.split=test"
            )
        if bank == "authors" and split == "test" and bank_seed != 0:
            raise MamlError(
                f"evaluation.bank=authors is one fixed set of test tasks, but evaluation.bank_seed={bank_seed} asks "
                "for others; set evaluation.bank=seeded, or bank_seed=0"
            )
        self.num_tasks, self.num_steps = num_tasks, num_steps
        self.num_ways, self.num_shots, self.num_query = num_ways, num_shots, num_query
        self.step_size, self.search = step_size, search
        self.split, self.bank_seed, self.theta = split, bank_seed, theta
        self.per_class = per_class
        self.uses_authors_bank = bank == "authors"

    def step_sizes(self, num_shots: int) -> list[float] | None:
        """Returns the step sizes at one K, one per step; None if the inner optimizer's own are used.

        Raises:
            MamlError: if ``step_size`` is a mapping without this K.
        """
        if isinstance(self.step_size, dict):
            sizes = {int(shots): size for shots, size in self.step_size.items()}
            if num_shots not in sizes:
                raise MamlError(
                    f"evaluation.step_size has no entry for K={num_shots}, only for {', '.join(map(str, sizes))}; "
                    f"add one, as in +evaluation.step_size.{num_shots}=0.01"
                )
            return [sizes[num_shots]] * self.num_steps
        return self.step_size if isinstance(self.step_size, list | None) else [self.step_size] * self.num_steps

    def bank(
        self, domain: Domain[Any], num_shots: int, num_tasks: int | None = None, split: Split | None = None
    ) -> Tasks:
        """Draws the frozen bank at one K, on the CPU.

        Args:
            domain: the source of the tasks.
            num_shots: K.
            num_tasks: number of tasks; None is the evaluation's own.
            split: which tasks; None is the evaluation's own split.

        Raises:
            MamlError: if the domain has too little data, if the authors' bank is asked for and the domain cannot
                rebuild it, or if ``num_ways`` is set and its tasks do not draw classes.
        """
        if self.num_ways is not None:
            domain = domain.with_ways(self.num_ways)
        count, split, num_query = num_tasks or self.num_tasks, split or self.split, self.num_query or num_shots
        if self.uses_authors_bank and split == "test":
            if num_query != num_shots:
                raise MamlError("evaluation.bank=authors has K query points; set evaluation.num_query=null")
            return domain.authors_test_tasks(count, num_shots)
        return domain.sample_tasks(count, Stream(self.bank_seed).child("bank"), split, num_shots, num_query)

    def measure(self, algorithm: Algorithm, adapted: Params, tasks: Tasks, step: int) -> Metrics:
        """Returns the metrics of each task after ``step`` gradient steps, each ``(T,)``; a subclass can add some.

        Args:
            algorithm: the algorithm, whose own metrics these are.
            adapted: parameters adapted to each task, name -> ``(T, ...)``.
            tasks: T tasks, with their rollouts if the domain is on-policy.
            step: the gradient step.
        """
        return algorithm.measure(adapted, tasks, step)

    def check_algorithm(self, algorithm: Algorithm) -> None:
        """Checks, before any training, that an algorithm has what the evaluation asks for.

        Raises:
            MamlError: if steps have no size, but one is set; if tasks have more classes than the network has outputs;
                or if the best theta is evaluated, but training does not keep it.
        """
        if not algorithm.inner.has_step_size and (self.step_size is not None or self.search is not None):
            key = "evaluation.search" if self.step_size is None else "evaluation.step_size"
            raise MamlError(
                f"{key} sets the size of steps, but this inner optimizer computes its steps without one; set {key}=null"
            )
        out_dim = algorithm.domain.out_dim
        if self.num_ways is not None and algorithm.fixes_ways and self.num_ways > out_dim:
            raise MamlError(
                f"evaluation.num_ways={self.num_ways}, but the network has an output for each of the {out_dim} classes "
                "of a training task; lower it, or choose an algorithm that compares images (algorithm=prototypical)"
            )
        if self.theta == "best" and not algorithm.best:
            raise MamlError(
                f"evaluation.theta=best, but training on {type(algorithm.domain).__name__} keeps the last theta only; "
                "choose last, or set validate_every to keep the theta that is best on validation tasks"
            )

    def check(self, domain: Domain[Any]) -> None:
        """Checks, before any training, that the evaluation is possible on a domain.

        Raises:
            MamlError: if the domain has too little data at some K, or lacks the authors' bank, classes or query
                examples; if some K has no step size; or if there are gradient steps in a domain that measures by
                showing.
        """
        if domain.measured_by == "showing" and self.num_steps:
            raise MamlError(
                f"evaluation.num_steps={self.num_steps}, but {type(domain).__name__} measures by showing, after 0, 1, "
                "2, ... labelled examples of a class, and nothing adapts by gradient steps; set evaluation.num_steps=0 "
                "(evaluation=accuracy_by_showing)"
            )
        if self.num_query is not None and (domain.on_policy or domain.measured_by == "showing"):
            raise MamlError(
                f"evaluation.num_query={self.num_query}, but {type(domain).__name__} has no query examples apart from "
                "the K of a task; set evaluation.num_query=null"
            )
        if self.num_ways is not None:
            domain.with_ways(self.num_ways)  # refuses domains whose tasks do not draw classes
        if self.per_class and not domain.class_names:
            raise MamlError(
                f"evaluation.per_class=true counts the classes of a data set, but {type(domain).__name__} has none; "
                "set evaluation.per_class=false"
            )
        for num_shots in self.num_shots or [domain.num_shots]:
            self.step_sizes(num_shots)
            try:
                # One task shows whether there is enough data. The authors' bank also has a limited number of tasks, and
                # of those of RL, which are only goals, each may be impossible.
                banks = [self.bank(domain, num_shots, None if self.uses_authors_bank or domain.on_policy else 1)]
                if self.search:
                    count = self.search.num_tasks if domain.on_policy else 1
                    banks.append(self.bank(domain, num_shots, count, split="val"))
            except MamlError as error:
                raise MamlError(
                    f"evaluation at K={num_shots}, num_query={self.num_query or num_shots}: {error}"
                ) from error
            if domain.on_policy:  # `check_measurements` checks other tasks
                for bank in banks:
                    domain.check_tasks(bank)

    def __call__(
        self, algorithm: Algorithm, task_chunk: int | None = None
    ) -> tuple[list[Curve], dict[str, str], dict[str, list[float] | None]]:
        """Evaluates at every K.

        Args:
            algorithm: the algorithm with the state to evaluate.
            task_chunk: number of tasks that are adapted at once; None uses a default.

        Returns:
            The curves; the hash of the frozen bank for each K; and the step sizes for each K, None if the inner
            optimizer's own were used.
        """
        domain = algorithm.domain
        curves, hashes, sizes = [], {}, {}
        all_shots = self.num_shots or [domain.num_shots]
        searched = self.search.num_tasks * self.search.num_candidates if self.search else 0
        with EvaluationProgress((self.num_tasks + searched) * len(all_shots)) as progress:
            for num_shots in all_shots:
                bank = self.bank(domain, num_shots)
                chosen = self.step_sizes(num_shots)
                if self.search:
                    chosen = self.search(self, algorithm, num_shots, task_chunk, progress)
                progress.what = f"K={num_shots}, {self.num_tasks} tasks"
                curves += self.curves(algorithm, num_shots, bank, chosen, task_chunk, progress)
                hashes[str(num_shots)], sizes[str(num_shots)] = bank_hash(bank), chosen
        return curves, hashes, sizes

    @torch.no_grad()
    def check_measurements(self, algorithm: Algorithm) -> None:
        """Adapts to a single task and measures, so that a wrong return of a user's class is an error before training.

        Rollouts are not tried.

        Raises:
            MamlError: if inputs do not have the domain's shape, what `Algorithm.adapt` yields or `Algorithm.measure`
                returns has another form than they say, or the domain's headline is not measured.
        """
        domain = algorithm.domain
        if domain.on_policy:
            return
        num_shots = (self.num_shots or [domain.num_shots])[0]
        tasks = self.bank(domain, num_shots, 1)
        tasks = {name: value.to(algorithm.stream.device) for name, value in tasks.items()}
        domain.check_tasks(tasks)
        num_steps = min(1, self.num_steps)
        sizes = self.step_sizes(num_shots)
        with suppress(Diverged):
            metrics, _ = self._measure_steps(
                algorithm, algorithm.params_per_task(1), tasks, num_steps, sizes and sizes[:num_steps]
            )
            if domain.headline not in metrics:
                raise MamlError(
                    f"{type(domain).__name__}.headline is {domain.headline}, but its measure returns "
                    f"{', '.join(sorted(metrics))} only; name one of these as headline"
                )

    @torch.no_grad()
    def pictures(self, algorithm: Algorithm) -> dict[str, Picture]:
        """Returns the algorithm's pictures on the first tasks of the bank, by name; none on validation tasks.

        Args:
            algorithm: the algorithm with the state to evaluate.
        """
        if self.split != "test":
            return {}
        num_shots = algorithm.domain.num_shots if self.num_shots is None else max(self.num_shots)
        theta, device = self.choose_theta(algorithm), algorithm.stream.device

        def compute(count: int) -> dict[str, Picture]:
            tasks = {name: value.to(device) for name, value in self.bank(algorithm.domain, num_shots, count).items()}
            return algorithm.pictures(algorithm.params_per_task(count, theta), tasks, self.num_steps)

        # Meta-test is over, but not written yet. Where memory is short, fewer tasks are pictured.
        return halve_chunk_on_oom(compute, min(_NUM_PICTURED, self.num_tasks))[0]

    def choose_theta(self, algorithm: Algorithm) -> Params:
        """Returns the theta to evaluate, and its buffers if training has kept them with it, without a task axis.

        Raises:
            MamlError: if it is the best one, and none has been measured yet.
        """
        if self.theta == "last":
            return algorithm.theta
        if not algorithm.domain.selected_by and algorithm.best[SCORE].isneginf():
            raise MamlError(
                "evaluation.theta=best, but theta has not been measured on validation tasks yet, or never with a "
                "number; train for validate_every iterations, or choose evaluation.theta=last"
            )
        return {name: algorithm.best[name] for name in algorithm.theta | algorithm.buffers if name in algorithm.best}

    @torch.no_grad()
    def curves(
        self,
        algorithm: Algorithm,
        num_shots: int,
        bank: Tasks,
        step_sizes: list[float] | None,
        task_chunk: int | None = None,
        progress: EvaluationProgress | None = None,
    ) -> list[Curve]:
        """Adapts to the tasks of a bank and measures after each step.

        The processes of a run share the tasks; all processes get the values of all tasks.

        Args:
            algorithm: the algorithm with the state to evaluate.
            num_shots: K of the bank.
            bank: the tasks, on the CPU.
            step_sizes: one step size per step; None uses the inner optimizer's own.
            task_chunk: number of tasks that are adapted at once; None uses a default.
            progress: the display; None shows nothing.

        Raises:
            Diverged: if adaptation diverged and the domain cannot measure such parameters.
        """
        is_shared = num_tasks(bank) >= distributed.world_size()
        diverged, parts, predicted = None, dict[str, Tensor](), list[Tensor]()
        own_tasks = distributed.shard(bank) if is_shared else bank
        whole_bank = algorithm.domain.workload.whole_bank
        first_chunk = num_tasks(own_tasks) if whole_bank else task_chunk or _DEFAULT_CHUNK
        done_before = progress.done if progress else 0

        def show(done: float) -> None:
            if progress:
                progress.reach(done_before + done * num_tasks(bank))

        try:
            (parts, predicted), _ = halve_chunk_on_oom(
                lambda chunk: self._measure(algorithm, own_tasks, step_sizes, chunk, show), first_chunk
            )
        except Diverged as error:
            diverged = error
        show(1.0)
        if distributed.all_reduce_max(diverged is not None):
            raise diverged or Diverged("adaptation diverged in another process of this run")
        values = {name: distributed.all_gather(part) if is_shared else part for name, part in parts.items()}
        predictions = None
        if predicted:
            predictions = Predictions(*(distributed.all_gather(part) if is_shared else part for part in predicted))
        domain = algorithm.domain
        return [
            Curve(
                num_shots,
                name,
                value.T.contiguous(),
                predictions if name == domain.headline and value[:, -1].isfinite().all() else None,
                domain.measured_by,
            )
            for name, value in values.items()
        ]

    def _measure(
        self,
        algorithm: Algorithm,
        bank: Tasks,
        step_sizes: list[float] | None,
        chunk: int,
        show: Callable[[float], None],
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Adapts in chunks of tasks, and measures. After each step, it calls ``show`` with the share that is done.

        Returns:
            Each metric for every task and step, ``(T, num_steps + 1)``, or every showing, ``(T, M)``, float64; and the
            parts of the `Predictions` after the last step, none without ``per_class``.
        """
        device = algorithm.stream.device
        theta = self.choose_theta(algorithm)
        parts: dict[str, list[Tensor]] = {}
        predicted: list[Predictions] = []
        for start in range(0, num_tasks(bank), chunk):
            tasks = {name: value.to(device) for name, value in take(bank, start, start + chunk).items()}
            start_params = algorithm.params_per_task(num_tasks(tasks), theta)

            def show_step(share: float, start: int = start, count: int = num_tasks(tasks)) -> None:
                show((start + count * share) / num_tasks(bank))

            metrics, adapted = self._measure_steps(
                algorithm, start_params, tasks, self.num_steps, step_sizes, show_step
            )
            if self.per_class:
                predicted.append(algorithm.domain.predict_classes(algorithm.model, adapted, tasks))
            for name, values in metrics.items():
                parts.setdefault(name, []).append(values.double())
        measured = {name: torch.cat(values).cpu() for name, values in parts.items()}
        return measured, [torch.cat(group).cpu() for group in zip(*predicted, strict=True)]

    def _measure_steps(
        self,
        algorithm: Algorithm,
        params: Params,
        tasks: Tasks,
        num_steps: int,
        step_sizes: list[float] | None,
        show: Callable[[float], None] = lambda share: None,
    ) -> tuple[dict[str, Tensor], Params]:
        """Adapts to tasks and measures after each step. After each, it calls ``show`` with the share that is done.

        Returns:
            Each metric for every task and step, ``(T, num_steps + 1)``, or every showing, ``(T, M)``; and the
            parameters after the last step.

        Raises:
            MamlError: if there are not as many steps, or a metric is not measured at each or not for each task.
        """
        domain, name = algorithm.domain, type(algorithm).__name__
        by_showing = domain.measured_by == "showing"
        steps: list[Metrics] = []
        adaptation = algorithm.adapt(params, tasks, num_steps, step_sizes)
        if not isinstance(adaptation, Iterable):
            raise MamlError(f"{name}.adapt has to yield parameters, but returns {type(adaptation).__name__}")
        for adapted in adaptation:
            metrics = self.measure(algorithm, adapted, tasks, len(steps))
            if not isinstance(metrics, dict):
                raise MamlError(f"{type(domain).__name__}.measure returns no dictionary, but {type(metrics).__name__}")
            if steps and metrics.keys() != steps[0].keys():
                raise MamlError(
                    f"{type(domain).__name__}.measure returns {', '.join(sorted(metrics))} after {len(steps)} gradient "
                    f"steps, but {', '.join(sorted(steps[0]))} before; return the same metrics after every step"
                )
            for metric, value in metrics.items():
                if not isinstance(value, Tensor) or value.dim() != 1 + by_showing or len(value) != num_tasks(tasks):
                    raise MamlError(
                        f"{type(domain).__name__}.measure returns {metric!r} of {form_of(value)}, but for "
                        f"{num_tasks(tasks)} tasks it is a tensor ({num_tasks(tasks)},{' showings' * by_showing})"
                    )
            steps.append(metrics)
            show(len(steps) / (num_steps + 1))
        if len(steps) != num_steps + 1:
            raise MamlError(
                f"{name}.adapt has to yield parameters after 0, 1, ..., {num_steps} gradient steps: {num_steps + 1} "
                f"times, but it does so {len(steps)} times"
            )
        return {
            metric: first if by_showing else torch.stack([each[metric] for each in steps], dim=1)
            for metric, first in steps[0].items()
        }, adapted


def bank_hash(tasks: Tasks) -> str:
    """Returns a hash of a frozen bank: on the same data or environment, equal hashes mean identical tasks."""
    content = hashlib.sha256()
    for name in sorted(tasks):
        content.update(f"{name} {tuple(tasks[name].shape)}".encode())
        content.update(tasks[name].contiguous().numpy().tobytes())
    return content.hexdigest()[:16]
