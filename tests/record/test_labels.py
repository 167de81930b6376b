"""Names of numbers for the reader."""

from __future__ import annotations

from maml.record.labels import in_percent, metric_label, number_label, step_label


def test_metrics_have_names_for_readers() -> None:
    assert metric_label("mse") == "mean squared error"
    assert metric_label("accuracy_transductive") == "accuracy transductive"


def test_shares_are_printed_in_percent() -> None:
    assert all(map(in_percent, ("accuracy", "accuracy_transductive")))
    assert not any(map(in_percent, ("mse", "return")))


def test_showings_count_from_one_and_gradient_steps_from_zero() -> None:
    assert [step_label(step, "showing") for step in (0, 4)] == ["showing 1", "showing 5"]
    assert [step_label(step, "gradient step") for step in (0, 4)] == ["step 0", "step 4"]
    assert step_label(8, "showing", width=2) == "showing  9"


def test_number_is_named_with_all_that_its_meaning_depends_on() -> None:
    assert number_label("mse", 10, 10, "gradient step", 600) == "mse (K=10, step 10, n=600)"
    assert number_label("accuracy", 1, 0, "showing", 100) == "accuracy (K=1, showing 1, n=100)"
