"""The memory against one of plain lists, slot by slot."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from maml.algorithm.key_value_memory import EMPTY, Memory
from maml.seeding import Stream

pytestmark = pytest.mark.usefixtures("float64")

SIZE, CPU = 4, torch.device("cpu")


def product(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


class Slots:
    """A memory as a list of dictionaries."""

    def __init__(self, num_slots: int) -> None:
        self.slots: list[dict[str, Any]] = [{"key": [0.0] * SIZE, "value": None, "age": 0} for _ in range(num_slots)]

    def order(self, query: list[float]) -> list[dict[str, Any]]:
        return sorted(self.slots, key=lambda slot: -product(query, slot["key"]))

    def loss(
        self, query: list[float], label: int, pool: list[dict[str, Any]], margin: float
    ) -> tuple[float, list[float]]:
        """Returns the loss of an image and its gradient; the pool holds the nearest slots."""
        wrong = [slot for slot in pool if slot["value"] != label]
        right = [slot for slot in pool if slot["value"] == label]
        written = [slot for slot in self.slots if slot["value"] == label]
        if written:
            right.append(min(written, key=lambda slot: slot["age"]))
        keys = [
            max(found, key=lambda slot: product(query, slot["key"]))["key"] if found else [0.0] * SIZE
            for found in (wrong, right)
        ]
        excess = product(query, keys[0]) - product(query, keys[1]) + margin
        if excess <= 0:
            return -margin, [0.0] * SIZE
        return excess - margin, [a - b for a, b in zip(*keys, strict=True)]

    def write(self, queries: list[list[float]], labels: list[int], noise: list[float]) -> None:
        new: dict[int, dict[str, Any]] = {}
        missing = []
        for query, label in zip(queries, labels, strict=True):
            nearest = self.order(query)[0]
            if nearest["value"] != label:
                missing.append((query, label))
                continue
            total = [a + b for a, b in zip(query, nearest["key"], strict=True)]
            norm = math.sqrt(product(total, total))
            new[self.slots.index(nearest)] = {"key": [a / norm for a in total], "value": label, "age": 0}
        for query, label in missing:
            ages = {i: slot["age"] + noise[i] for i, slot in enumerate(self.slots) if i not in new}
            new[max(ages, key=ages.__getitem__)] = {"key": query, "value": label, "age": 0}
        for i, slot in enumerate(self.slots):
            self.slots[i] = new.get(i, {**slot, "age": slot["age"] + 1})


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def test_memory_is_that_of_plain_lists_over_500_steps() -> None:
    """Images lie around the directions of 12 classes; with 16 slots, classes are forgotten and learnt again."""
    steps, num_slots, num_images, num_neighbors, margin = 500, 16, 3, 4, 0.1
    memory, slow = Memory.empty(1, num_slots, SIZE, CPU), Slots(num_slots)
    stream = Stream(0)
    all_labels = stream.child("labels").choice((steps,), 12, num_images)
    directions = stream.child("directions").normal((12, SIZE))
    images = directions[all_labels] + stream.child("images").normal((steps, num_images, SIZE), 0.6)
    all_noise = stream.child("noise").uniform((steps, num_slots), -8.0, 8.0)
    found, expected, counts = [], [], {"right": 0, "forgotten": 0, "beyond": 0, "loss": 0}
    for step in range(steps):
        labels, noise = all_labels[step : step + 1], all_noise[step : step + 1]
        queries = unit(images[step : step + 1]).requires_grad_()
        losses, is_right = memory.losses(queries, labels, num_neighbors, margin)
        (gradient,) = torch.autograd.grad(losses.sum(), queries)
        lists = queries[0].tolist()
        for query, label in zip(lists, labels[0].tolist(), strict=True):
            pool = slow.order(query)[:num_neighbors]
            loss, slope = slow.loss(query, label, pool, margin)
            expected += [loss, *slope, float(pool[0]["value"] == label)]
            known = any(slot["value"] == label for slot in slow.slots)
            counts["right"] += pool[0]["value"] == label
            counts["forgotten"] += step > 50 and not known
            counts["beyond"] += known and all(slot["value"] != label for slot in pool)
            counts["loss"] += loss > -margin
        found.append(torch.cat([losses.unsqueeze(2), gradient, is_right.unsqueeze(2)], 2).detach().flatten())
        memory.write(queries, labels, noise)
        slow.write(lists, labels[0].tolist(), noise[0].tolist())
        assert memory.values[0].tolist() == [EMPTY if s["value"] is None else s["value"] for s in slow.slots]
        assert memory.ages[0].tolist() == [slot["age"] for slot in slow.slots]
        found.append(memory.keys.flatten().clone())
        expected += [number for slot in slow.slots for number in slot["key"]]
    torch.testing.assert_close(torch.cat(found), torch.tensor(expected), rtol=0, atol=1e-12)
    assert all(50 < count < 1450 for count in counts.values()), counts


def test_slot_whose_key_moves_is_not_overwritten_in_the_same_step() -> None:
    """Of two slots, the oldest is the nearest one of the first image and has its label; the second image is new."""
    east, north = torch.tensor([1.0, 0, 0, 0]), torch.tensor([0, 1.0, 0, 0])
    memory = Memory.empty(1, 2, SIZE, CPU)
    memory.write(east[None, None], torch.tensor([[7]]), torch.tensor([[1.0, 0.0]]))
    near = unit(east + 0.1 * north)
    images, labels = torch.stack([near, north]), torch.tensor([7, 8])
    for order in ([0, 1], [1, 0]):
        copy = Memory(*(value.clone() for value in memory))
        copy.write(images[order][None], labels[order][None], torch.tensor([[9.0, 0.0]]))
        assert copy.values.tolist() == [[7, 8]]
        torch.testing.assert_close(copy.keys[0], torch.stack([unit(near + east), north]))
        assert copy.ages.tolist() == [[0, 0]]


def test_images_that_need_a_slot_take_the_oldest_in_their_order() -> None:
    memory = Memory.empty(1, 4, SIZE, CPU)
    memory.ages.copy_(torch.tensor([[1.0, 9, 3, 6]]))
    memory.write(torch.eye(SIZE)[None, :3], torch.tensor([[5, 6, 7]]), torch.zeros(1, 4))
    assert memory.values.tolist() == [[EMPTY, 5, 7, 6]]
    assert memory.ages.tolist() == [[2, 0, 0, 0]]


def test_last_slot_of_the_label_counts_though_it_is_no_neighbour() -> None:
    """Two slots have the label; neither is near. The younger one is taken, though the other one is nearer."""
    keys = torch.tensor([[1.0, 0, 0, 0], [0.6, 0.8, 0, 0], [0.0, 1, 0, 0], [0.1, 0, math.sqrt(0.99), 0]])
    memory = Memory(keys[None], torch.tensor([[1, 2, 3, 3]]), torch.tensor([[9.0, 9, 5, 4]]))
    query = torch.tensor([[[1.0, 0, 0, 0]]])
    for label, num_neighbors, right, wrong in ((3, 2, 0.1, 1.0), (3, 4, 0.1, 1.0), (2, 1, 0.6, 1.0), (4, 4, 0, 1.0)):
        losses, _ = memory.losses(query, torch.tensor([[label]]), num_neighbors, margin=0.5)
        assert losses.item() == pytest.approx(wrong - right)
    losses, is_right = memory.losses(query, torch.tensor([[1]]), 1, margin=0.5)  # no wrong neighbour
    assert losses.item() == -0.5 and is_right.item()


def test_memories_of_several_tasks_do_not_touch_each_other() -> None:
    both = Memory.empty(2, 5, SIZE, CPU)
    alone = [Memory.empty(1, 5, SIZE, CPU) for _ in range(2)]
    for step in range(20):
        queries = unit(Stream(step).normal((2, 1, SIZE)))
        labels, noise = Stream(step).integers((2, 1), 3), Stream(step).uniform((2, 5))
        both.write(queries, labels, noise)
        for i, memory in enumerate(alone):
            memory.write(queries[i : i + 1], labels[i : i + 1], noise[i : i + 1])
    for name, value in both._asdict().items():
        torch.testing.assert_close(value, torch.cat([getattr(memory, name) for memory in alone]))
