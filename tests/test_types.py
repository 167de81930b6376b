"""The vocabulary of tensors: batches of tasks, parameters with a task axis, and ranges of settings."""

from __future__ import annotations

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from maml.types import Interval, concatenate, expand, num_tasks, select_entries, take, without_copies

TASKS = {"x": torch.arange(12).reshape(4, 3), "amplitude": torch.arange(4)}


def test_tasks_are_taken_from_each_tensor_alike() -> None:
    taken = take(TASKS, 1, 3)
    assert {name: value.tolist() for name, value in taken.items()} == {
        "x": [[3, 4, 5], [6, 7, 8]],
        "amplitude": [1, 2],
    }
    assert (num_tasks(TASKS), num_tasks(taken), num_tasks(take(TASKS, 3, 9))) == (4, 2, 1)


def test_every_task_starts_at_a_view_of_theta_whose_gradients_add_up() -> None:
    theta = {"w": torch.tensor([1.0, 2.0], requires_grad=True), "b": torch.tensor(3.0, requires_grad=True)}
    params = expand(theta, 3)
    assert {name: tuple(value.shape) for name, value in params.items()} == {"w": (3, 2), "b": (3,)}
    assert all(params[name].data_ptr() == value.data_ptr() for name, value in theta.items()), "nothing is copied"
    loss = (params["w"].sum(1) * torch.tensor([1.0, 10.0, 100.0]) + params["b"]).sum()
    gradients = torch.autograd.grad(loss, list(theta.values()))
    assert [gradient.tolist() for gradient in gradients] == [[111.0, 111.0], 3.0]


def test_copies_and_their_gradient_keep_the_order_of_memory() -> None:
    kernel = torch.rand(2, 3, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    copies = expand({"w": kernel}, 5)["w"]
    assert copies.data_ptr() == kernel.data_ptr() and all(torch.equal(copy, kernel) for copy in copies)
    factors = torch.rand(5, 2, 3, 3, 3)
    (gradient,) = torch.autograd.grad((copies * factors).sum(), kernel)
    torch.testing.assert_close(gradient, factors.sum(0))
    assert gradient.stride() == kernel.stride(), "sums and steps of mixed orders take several times as long"


def test_entries_of_what_was_concatenated_are_the_parts() -> None:
    parts = [{"x": torch.rand(2, 3), "y": torch.rand(2)}, {"x": torch.rand(1, 3), "y": torch.rand(1)}]
    joined = concatenate(parts)
    for which, part in ((torch.tensor([0, 1]), parts[0]), (torch.tensor([False, False, True]), parts[1])):
        assert all(torch.equal(value, part[name]) for name, value in select_entries(joined, which).items())
    assert torch.equal(select_entries(joined, 2)["x"], parts[1]["x"][0])


@pytest.mark.parametrize(("interval", "reason"), [([2.0, 1.0], "2.0 is not below 1.0; swap them"), ([1.0, 1.0], "not")])
def test_interval_goes_upwards(interval: list[float], reason: str) -> None:
    assert TypeAdapter(Interval).validate_python([1, 2.5]) == (1.0, 2.5)
    with pytest.raises(ValidationError, match=reason):
        TypeAdapter(Interval).validate_python(interval)


def test_copies_that_expand_made_are_one_again() -> None:
    theta = {"w": torch.ones(2, 3), "scalar": torch.ones(())}
    own = torch.zeros(4, 2)
    found = without_copies(expand(theta, 4) | {"own": own})
    assert {name: value.shape[0] for name, value in found.items()} == {"w": 1, "scalar": 1, "own": 4}
    assert found["own"] is own and torch.equal(found["w"][0], theta["w"])
    assert without_copies(expand(theta, 1))["w"].shape == (1, 2, 3)
