"""Meta-test: adaptation to a frozen bank of tasks, measured after every gradient step."""

from __future__ import annotations

import hashlib
import itertools
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, MinLen
from torch import Tensor

from maml.algorithm.base import Algorithm
from maml.domain.base import Domain, Split
from maml.errors import Diverged, MamlError
from maml.hardware import distributed
from maml.hardware.memory import halve_chunk_on_oom
from maml.seeding import Stream
from maml.types import Count, NonNegativeFloat, NonNegativeInt, Params, PositiveFloat, Tasks, num_tasks, take

# Tasks whose adapted parameters are held at once where the hardware sets no chunk.
_DEFAULT_CHUNK = 100


@dataclass(frozen=True)
class Curve:
    """One metric over gradient steps at one K.

    Attributes:
        num_shots: K.
        metric: its name.
        values: per step and task, ``(num_steps + 1, tasks)``, float64.
    """

    num_shots: int
    metric: str
    values: Tensor

    def summary(self) -> dict[str, Any]:
        """Returns mean and 95 % interval over tasks per step: 1.96 population std / sqrt(n), as the authors' code.

        A mean or interval that is not finite, because adaptation diverged on some task, is None.
        """
        count = self.values.shape[1]
        half = 1.96 * self.values.std(1, correction=0) / math.sqrt(count)
        return {
            "num_shots": self.num_shots,
            "metric": self.metric,
            "steps": [
                {"step": step, "mean": _finite(mean), "ci95": _finite(ci95), "num_tasks": count}
                for step, (mean, ci95) in enumerate(zip(self.values.mean(1).tolist(), half.tolist(), strict=True))
            ],
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


class StepSizeSearch:
    """Chooses step sizes for meta-test: those of a grid that do best on validation tasks after the last step.

    Args:
        step_sizes: the grid.
        decays: d in step_size / (1 + step * d); every step size is tried with every one.
        num_tasks: validation tasks.
    """

    def __init__(
        self,
        step_sizes: Annotated[list[PositiveFloat], MinLen(1)],
        num_tasks: Annotated[int, Ge(2)],
        decays: Annotated[list[NonNegativeFloat], MinLen(1)] | None = None,
    ) -> None:
        self.step_sizes, self.num_tasks, self.decays = step_sizes, num_tasks, decays or [0.0]

    def __call__(
        self, evaluation: Evaluation, algorithm: Algorithm, num_shots: int, task_chunk: int | None = None
    ) -> list[float]:
        """Returns the chosen step sizes at one K, one per step; of equals the first, and never one that diverged.

        Raises:
            MamlError: if all of them diverged.
        """
        domain = algorithm.domain
        bank = evaluation.bank(domain, num_shots, self.num_tasks, split="val")
        sign = 1 if domain.larger_is_better else -1
        best, chosen = -math.inf, None
        for step_size, decay in itertools.product(self.step_sizes, self.decays):
            sizes = [step_size / (1 + step * decay) for step in range(evaluation.num_steps)]
            try:
                curves = evaluation.curves(algorithm, num_shots, bank, sizes, task_chunk)
            except Diverged:
                continue
            score = next(sign * curve.values[-1].mean().item() for curve in curves if curve.metric == domain.headline)
            if score > best:  # false where it is not a number
                best, chosen = score, sizes
        if chosen is None:
            raise MamlError(
                f"adaptation at K={num_shots} diverged with every step size of evaluation.search.step_sizes="
                f"{self.step_sizes}; add smaller ones"
            )
        return chosen


class Evaluation:
    """Adapts to every task of a bank and measures after each step. The bank depends on nothing but these settings.

    Args:
        num_tasks: tasks in the bank; an interval takes two.
        num_steps: gradient steps (training has its own number).
        num_shots: every K at which to evaluate; None is the domain's.
        num_query: query examples (per class); None is K, as in the authors' code.
        step_size: of every step, or one per step, or one for each K; None is the inner optimizer's own.
        search: chooses the step size at each K on validation tasks instead.
        split: which tasks: ``test``, or ``val`` for choosing settings.
        bank_seed: which bank.
        theta: the ``last`` one, or where training keeps it the ``best`` by its own returns.
    """

    def __init__(
        self,
        num_tasks: Annotated[int, Ge(2)],
        num_steps: NonNegativeInt,
        num_shots: Annotated[list[Count], MinLen(1)] | None = None,
        num_query: Count | None = None,
        step_size: PositiveFloat | list[PositiveFloat] | dict[int, PositiveFloat] | None = None,
        search: StepSizeSearch | None = None,
        split: Split = "test",
        bank_seed: NonNegativeInt = 0,
        theta: Literal["last", "best"] = "last",
    ) -> None:
        if isinstance(step_size, list) and len(step_size) != num_steps:
            raise MamlError(
                f"evaluation.step_size lists {len(step_size)} sizes for evaluation.num_steps={num_steps}; "
                "give one per step, or a single one"
            )
        if num_shots is not None and len(set(num_shots)) != len(num_shots):
            raise MamlError(f"evaluation.num_shots={num_shots} names a K twice")
        if step_size is not None and search is not None:
            raise MamlError("evaluation.step_size and evaluation.search both say the step size; set one to null")
        if search is not None and split == "val":
            raise MamlError("evaluation.search tunes on validation tasks, which evaluation.split=val would report")
        self.num_tasks, self.num_steps = num_tasks, num_steps
        self.num_shots, self.num_query = num_shots, num_query
        self.step_size, self.search = step_size, search
        self.split, self.bank_seed, self.theta = split, bank_seed, theta

    def step_sizes(self, num_shots: int) -> list[float] | None:
        """Returns the step sizes at one K, one per step; None leaves them to the inner optimizer.

        Raises:
            MamlError: if step sizes are given for other K only.
        """
        if isinstance(self.step_size, dict):
            sizes = {int(known): size for known, size in self.step_size.items()}
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
        """Draws the frozen tasks at one K, on the CPU."""
        stream = Stream(self.bank_seed).child("bank")
        return domain.sample_tasks(
            num_tasks or self.num_tasks, stream, split or self.split, num_shots, self.num_query or num_shots
        )

    def check(self, domain: Domain[Any]) -> None:
        """Makes sure, before any training, that the bank can be drawn.

        Raises:
            MamlError: if the domain has too little data for one of the K, or its training keeps no best theta.
        """
        if self.theta == "best" and domain.selected_by is None:
            raise MamlError(
                f"evaluation.theta=best, but training on {type(domain).__name__} keeps the last theta only; choose last"
            )
        for num_shots in self.num_shots or [domain.num_shots]:
            self.step_sizes(num_shots)
            try:
                self.bank(domain, num_shots, num_tasks=1)
            except MamlError as error:
                raise MamlError(
                    f"evaluation at K={num_shots}, num_query={self.num_query or num_shots}: {error}"
                ) from error

    def __call__(
        self, algorithm: Algorithm, task_chunk: int | None = None
    ) -> tuple[list[Curve], dict[str, str], dict[str, list[float] | None]]:
        """Returns the curves; and by K the hash of the task bank, and the step sizes (None: the inner optimizer's).

        Args:
            algorithm: with the state to evaluate.
            task_chunk: number of tasks adapted at once; None is as many as usually fit.
        """
        domain = algorithm.domain
        curves, hashes, sizes = [], {}, {}
        for num_shots in self.num_shots or [domain.num_shots]:
            bank = self.bank(domain, num_shots)
            chosen = self.search(self, algorithm, num_shots, task_chunk) if self.search else self.step_sizes(num_shots)
            curves += self.curves(algorithm, num_shots, bank, chosen, task_chunk)
            hashes[str(num_shots)], sizes[str(num_shots)] = bank_hash(bank), chosen
        return curves, hashes, sizes

    def choose_theta(self, algorithm: Algorithm) -> Params:
        """Returns the theta that is evaluated."""
        return algorithm.theta if self.theta == "last" else {name: algorithm.best[name] for name in algorithm.theta}

    @torch.no_grad()
    def curves(
        self,
        algorithm: Algorithm,
        num_shots: int,
        bank: Tasks,
        step_sizes: list[float] | None,
        task_chunk: int | None = None,
    ) -> list[Curve]:
        """Adapts to the tasks of a bank and measures after each step.

        The processes of a run share the tasks; each gets the values of all.

        Raises:
            Diverged: if adaptation did, in a domain where nothing more can be measured then.
        """
        shared = num_tasks(bank) >= distributed.world_size()
        failed, parts = None, dict[str, Tensor]()
        own = distributed.shard(bank) if shared else bank
        whole_bank = algorithm.domain.workload.whole_bank
        together = num_tasks(own) if whole_bank else task_chunk or _DEFAULT_CHUNK
        try:
            parts, _ = halve_chunk_on_oom(lambda chunk: self._measure(algorithm, own, step_sizes, chunk), together)
        except Diverged as error:
            failed = error
        if distributed.all_reduce_max(failed is not None):
            raise failed or Diverged("adaptation diverged in another process of this run")
        values = {name: distributed.all_gather(part) if shared else part for name, part in parts.items()}
        return [Curve(num_shots, name, value.T.contiguous()) for name, value in values.items()]

    def _measure(
        self, algorithm: Algorithm, bank: Tasks, step_sizes: list[float] | None, chunk: int
    ) -> dict[str, Tensor]:
        """Returns each metric per task and step, ``(T, num_steps + 1)``, float64; of so many tasks at once."""
        domain, model = algorithm.domain, algorithm.model
        device = next(iter(algorithm.theta.values())).device
        theta = self.choose_theta(algorithm)
        parts: dict[str, list[Tensor]] = {}
        for start in range(0, num_tasks(bank), chunk):
            tasks = {name: value.to(device) for name, value in take(bank, start, start + chunk).items()}
            steps: dict[str, list[Tensor]] = {}
            start_params = algorithm.params_per_task(num_tasks(tasks), theta)
            adaptation = algorithm.adapt(start_params, tasks, self.num_steps, step_sizes)
            for step, adapted in enumerate(adaptation):
                support = domain.data(tasks, "support", step)
                query = domain.data(tasks, "query", step)
                for name, value in domain.measure(model, adapted, support, query, step).items():
                    steps.setdefault(name, []).append(value)
            for name, values in steps.items():
                parts.setdefault(name, []).append(torch.stack(values, dim=1).double())
        return {name: torch.cat(values).cpu() for name, values in parts.items()}


def bank_hash(tasks: Tasks) -> str:
    """Returns a hash of all that was drawn for a bank: equal hashes, identical tasks."""
    content = hashlib.sha256()
    for name in sorted(tasks):
        content.update(f"{name} {tuple(tasks[name].shape)}".encode())
        content.update(tasks[name].contiguous().numpy().tobytes())
    return content.hexdigest()[:16]


def per_task_rows(curves: list[Curve]) -> list[dict[str, Any]]:
    """Returns one row per K, metric and task, with a column per gradient step to 7 digits, for ``tasks.csv``."""
    rows = []
    for curve in curves:
        for task, values in enumerate(curve.values.T.tolist()):
            columns = {f"step_{step}": float(f"{value:.7g}") for step, value in enumerate(values)}
            rows.append({"num_shots": curve.num_shots, "metric": curve.metric, "task": task} | columns)
    return rows
