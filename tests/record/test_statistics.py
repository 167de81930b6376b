"""The interval over tasks and trainings: its coverage in simulations, and its limits."""

import math

import numpy as np
import pytest

from maml.record.statistics import combine, student_t


def readings(values: np.ndarray) -> list[tuple[float, float]]:
    """Returns mean and half-width over tasks of each run, as reports have them."""
    half = 1.96 * values.std(1) / math.sqrt(values.shape[1])
    return list(zip(values.mean(1).tolist(), half.tolist(), strict=True))


@pytest.mark.parametrize("num_runs", [3, 5, 8])
@pytest.mark.parametrize(
    ("trainings", "tasks", "noise"),
    [
        (0.0, 1.0, 0.3),  # all trainings are equally good
        (0.02, 1.0, 0.5),
        (0.1, 1.0, 0.5),  # both parts of the interval are about as large
        (0.2, 1.0, 1.0),
        (1.0, 1.0, 1.0),
        (1.0, 0.1, 0.1),  # tasks hardly differ
    ],
)
def test_interval_covers_the_truth_in_95_percent_of_simulations(
    num_runs: int, trainings: float, tasks: float, noise: float
) -> None:
    rng, num_tasks, repeats = np.random.default_rng(0), 60, 2000
    covered = 0
    for _ in range(repeats):
        values = trainings * rng.normal(size=(num_runs, 1)) + tasks * rng.normal(size=num_tasks)
        values = values + noise * rng.normal(size=(num_runs, num_tasks))
        found = combine(readings(values), values)
        covered += abs(found.mean) <= found.ci95
    assert 0.93 <= covered / repeats <= 0.97


def test_interval_over_tasks_alone_misses_the_truth_when_trainings_differ() -> None:
    rng, covered = np.random.default_rng(0), 0
    for _ in range(500):
        values = 0.2 * rng.normal(size=(5, 1)) + rng.normal(size=(5, 200))
        found = combine(readings(values), values)
        covered += abs(found.mean) <= found.tasks_ci95
    assert covered < 0.7 * 500


def test_one_run_keeps_the_numbers_of_its_report() -> None:
    found = combine([(0.7, 0.1)])
    assert (found.mean, found.ci95, found.tasks_ci95, found.num_runs) == (0.7, 0.1, 0.1, 1)


def test_two_runs_have_an_interval_over_tasks_only() -> None:
    values = np.array([[0.0, 1.0, 2.0, 3.0], [10.0, 11.0, 12.0, 13.0]])
    found = combine(readings(values), values)
    assert (found.mean, found.lowest, found.highest) == (6.5, 1.5, 11.5)
    assert found.ci95 == found.tasks_ci95 == pytest.approx(1.96 * math.sqrt(1.25 / 4))


def test_three_runs_follow_the_formula() -> None:
    values = np.array([[0.0, 1.0], [1.0, 4.0], [5.0, 6.0]])
    means, per_task = [0.5, 2.5, 5.5], [2.0, 11 / 3]
    grand = sum(means) / 3
    residuals = sum((values[r, t] - means[r] - per_task[t] + grand) ** 2 for r in range(3) for t in range(2))
    noise = residuals / (2 * 1) / 6
    spread = sum((mean - grand) ** 2 for mean in means) / 2
    tasks = 1.96**2 * sum((value - grand) ** 2 for value in per_task) / 2 / 2
    expected = math.sqrt(tasks + 4.303**2 * (spread / 3 - noise))
    assert combine(readings(values), values).ci95 == pytest.approx(expected)


def test_runs_without_common_tasks_get_an_interval_that_is_not_too_narrow() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(4, 300)) + 0.1 * rng.normal(size=(4, 1))
    apart, together = combine(readings(values)), combine(readings(values), values)
    assert apart.ci95 > together.ci95


def test_a_run_that_diverged_makes_the_mean_diverge() -> None:
    values = np.array([[1.0, 2.0], [math.nan, math.inf], [1.0, 2.0]])
    found = combine([(1.5, 0.5), (math.nan, math.nan), (1.5, 0.5)], values)
    assert math.isnan(found.mean)
    assert math.isnan(found.ci95)
    assert math.isnan(found.lowest)


@pytest.mark.parametrize("degrees", [2, 3, 7, 30, 31, 60, 1000])
def test_students_quantile_leaves_two_and_a_half_percent_above(degrees: int) -> None:
    x = np.linspace(0, student_t(degrees), 200_001)
    log_constant = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - 0.5 * math.log(degrees * math.pi)
    density = np.exp(log_constant - (degrees + 1) / 2 * np.log1p(x**2 / degrees))
    assert np.trapezoid(density, x) == pytest.approx(0.475, abs=1e-4)
