"""Meta-test: adaptation to a frozen bank of tasks, measured after every gradient step."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge, MinLen
from torch import Tensor

from maml.algorithm.base import Algorithm
from maml.domain.base import Domain, Split
from maml.errors import MamlError
from maml.seeding import Stream
from maml.types import Count, NonNegativeInt, PositiveFloat, Tasks, num_tasks, take

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


class Evaluation:
    """Adapts to every task of a bank and measures after each step. The bank depends on nothing but these settings.

    Args:
        num_tasks: tasks in the bank; an interval takes two.
        num_steps: gradient steps (training has its own number).
        num_shots: every K at which to evaluate; None is the domain's.
        num_query: query examples (per class); None is K, as in the authors' code.
        step_size: of every step, or one per step; None is the inner step size of training.
        split: which tasks: ``test``, or ``val`` for choosing settings.
        bank_seed: which bank.
    """

    def __init__(
        self,
        num_tasks: Annotated[int, Ge(2)],
        num_steps: NonNegativeInt,
        num_shots: Annotated[list[Count], MinLen(1)] | None = None,
        num_query: Count | None = None,
        step_size: PositiveFloat | list[PositiveFloat] | None = None,
        split: Split = "test",
        bank_seed: NonNegativeInt = 0,
    ) -> None:
        if isinstance(step_size, list) and len(step_size) != num_steps:
            raise MamlError(
                f"evaluation.step_size lists {len(step_size)} sizes for evaluation.num_steps={num_steps}; "
                "give one per step, or a single one"
            )
        if num_shots is not None and len(set(num_shots)) != len(num_shots):
            raise MamlError(f"evaluation.num_shots={num_shots} names a K twice")
        self.num_tasks, self.num_steps = num_tasks, num_steps
        self.num_shots, self.num_query = num_shots, num_query
        self.step_sizes = [step_size] * num_steps if isinstance(step_size, float | int) else step_size
        self.split, self.bank_seed = split, bank_seed

    def bank(self, domain: Domain[Any], num_shots: int, num_tasks: int | None = None) -> Tasks:
        """Draws the frozen tasks at one K, on the CPU."""
        stream = Stream(self.bank_seed).child("bank")
        return domain.sample_tasks(
            num_tasks or self.num_tasks, stream, self.split, num_shots, self.num_query or num_shots
        )

    def check(self, domain: Domain[Any]) -> None:
        """Makes sure, before any training, that the bank can be drawn.

        Raises:
            MamlError: if the domain has too little data for one of the K.
        """
        for num_shots in self.num_shots or [domain.num_shots]:
            try:
                self.bank(domain, num_shots, num_tasks=1)
            except MamlError as error:
                raise MamlError(
                    f"evaluation at K={num_shots}, num_query={self.num_query or num_shots}: {error}"
                ) from error

    def __call__(self, algorithm: Algorithm) -> tuple[list[Curve], dict[str, str]]:
        """Returns the curves, and the hash of the task bank at each K."""
        domain = algorithm.domain
        banks = {num_shots: self.bank(domain, num_shots) for num_shots in self.num_shots or [domain.num_shots]}
        curves = [curve for num_shots, tasks in banks.items() for curve in self._curves(algorithm, num_shots, tasks)]
        return curves, {str(num_shots): bank_hash(tasks) for num_shots, tasks in banks.items()}

    @torch.no_grad()
    def _curves(self, algorithm: Algorithm, num_shots: int, bank: Tasks) -> list[Curve]:
        domain, model = algorithm.domain, algorithm.model
        device = next(iter(algorithm.theta.values())).device
        chunk = algorithm.task_chunk or _DEFAULT_CHUNK
        parts: dict[str, list[Tensor]] = {}
        for start in range(0, num_tasks(bank), chunk):
            tasks = {name: value.to(device) for name, value in take(bank, start, start + chunk).items()}
            steps: dict[str, list[Tensor]] = {}
            adaptation = algorithm.adapt(algorithm.theta, tasks, self.num_steps, self.step_sizes)
            for step, params in enumerate(adaptation):
                support = domain.collect(tasks, "support", model, params, step)
                query = domain.collect(tasks, "query", model, params, step)
                for name, value in domain.measure(model, params, support, query, step).items():
                    steps.setdefault(name, []).append(value)
            for name, values in steps.items():
                parts.setdefault(name, []).append(torch.stack(values).double().cpu())
        return [Curve(num_shots, name, torch.cat(values, dim=1)) for name, values in parts.items()]


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
