"""MANN against the formulas of docs/protocol.md#mann, written with Python numbers and lists, in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from maml.errors import MamlError
from maml.model.mann import MANN, _State
from maml.seeding import Stream
from maml.types import Params

Vector = list[float]
Matrix = list[Vector]

OUT, HIDDEN, SLOTS, WIDTH, HEADS = 3, 5, 7, 4, 2
READINGS: list[dict[str, Any]] = [
    {"writes": writes, "reads": reads} for writes in ("key", "vector") for reads in ("after_write", "before_write")
]


def small(length: int = 6, **options: Any) -> MANN:
    return MANN((length, 2, 3), OUT, HIDDEN, SLOTS, WIDTH, HEADS, **options)


def random_params(model: MANN, seed: int) -> Params:
    """Returns initial parameters plus noise, biases included, in float64."""
    return {
        name: value.double() + Stream(seed).child(name).uniform(value.shape, -0.9, 0.9, dtype=torch.float64)
        for name, value in model.init(Stream(seed)).items()
    }


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def dot(one: Vector, other: Vector) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def layer(params: dict[str, Any], name: str, x: Vector) -> Vector:
    rows, biases = params[f"{name}.weight"], params[f"{name}.bias"]
    return [dot(row, x) + bias for row, bias in zip(rows, biases, strict=True)]


def split_heads(values: Vector) -> Matrix:
    return [values[head * WIDTH : (head + 1) * WIDTH] for head in range(HEADS)]


def plain_mann(tensors: Params, sequence: Tensor, writes: str, reads: str) -> tuple[Matrix, list[dict[str, Any]]]:
    """Returns the outputs at each step of one sequence, and what happened to the memory."""
    params = {name: value.tolist() for name, value in tensors.items()}
    hidden, cell = [0.0] * HIDDEN, [0.0] * HIDDEN
    memory = [[1e-6] * WIDTH for _ in range(SLOTS)]
    read_weights = [[1.0] + [0.0] * (SLOTS - 1) for _ in range(HEADS)]
    usage, read = [1.0] + [0.0] * (SLOTS - 1), [0.0] * (HEADS * WIDTH)
    outputs, story = [], []
    for x in sequence.flatten(1).tolist():
        gates = [
            dot(params["input.weight"][i], x)
            + dot(params["hidden.weight"][i], hidden)
            + dot(params["reads.weight"][i], read)
            + params["gates.bias"][i]
            for i in range(4 * HIDDEN)
        ]
        admit, keep, candidate, emit = (gates[part * HIDDEN : (part + 1) * HIDDEN] for part in range(4))
        for i in range(HIDDEN):
            cell[i] = sigmoid(keep[i]) * cell[i] + sigmoid(admit[i]) * math.tanh(candidate[i])
        hidden = [sigmoid(emit[i]) * math.tanh(cell[i]) for i in range(HIDDEN)]

        keys = split_heads([math.tanh(value) for value in layer(params, "key", hidden)])
        written = keys
        if writes == "vector":
            written = split_heads([math.tanh(value) for value in layer(params, "vector", hidden)])
        gate = [sigmoid(value) for value in layer(params, "gate", hidden)]
        least = sorted(range(SLOTS), key=lambda slot: (usage[slot], slot))[:HEADS]
        write_weights = [
            [gate[r] * read_weights[r][i] + (1 - gate[r]) * (1.0 if i in least else 0.0) for i in range(SLOTS)]
            for r in range(HEADS)
        ]
        before = [list(slot) for slot in memory]
        memory[least[0]] = [0.0] * WIDTH
        for i, j in itertools.product(range(SLOTS), range(WIDTH)):
            memory[i][j] += sum(write_weights[r][i] * written[r][j] for r in range(HEADS))
        searched = memory if reads == "after_write" else before
        read = []
        for r in range(HEADS):
            scores = [
                dot(keys[r], slot) / (math.sqrt(dot(keys[r], keys[r])) * math.sqrt(dot(slot, slot)) + 1e-8)
                for slot in searched
            ]
            total = sum(math.exp(score) for score in scores)
            read_weights[r] = [math.exp(score) / total for score in scores]
            read += [sum(read_weights[r][i] * memory[i][j] for i in range(SLOTS)) for j in range(WIDTH)]
        usage = [
            0.95 * usage[i] + sum(read_weights[r][i] + write_weights[r][i] for r in range(HEADS)) for i in range(SLOTS)
        ]
        outputs.append(layer(params, "head", hidden + read))
        story.append({"least": least, "usage": usage, "memory": [list(slot) for slot in memory]})
    return outputs, story


@pytest.mark.parametrize("options", READINGS, ids=lambda options: "-".join(options.values()))
def test_each_sequence_is_a_plain_loop_over_its_elements(options: dict[str, Any]) -> None:
    model = small(**options)
    tasks = [random_params(model, seed) for seed in range(2)]
    x = Stream(5).uniform((2, 3, 6, 2, 3), -2.0, 2.0, dtype=torch.float64)
    outputs = model.outputs_of_each({name: torch.stack([task[name] for task in tasks]) for name in tasks[0]}, x)
    assert outputs.shape == (2, 3, 6, OUT)
    chosen = set()
    for task, example in itertools.product(range(2), range(3)):
        expected, story = plain_mann(tasks[task], x[task, example], **options)
        torch.testing.assert_close(
            outputs[task, example], torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9
        )
        chosen |= {tuple(step["least"]) for step in story}
    assert len(chosen) > 4, "the least used slots change, or this shows nothing"


def test_readings_differ() -> None:
    x = Stream(5).uniform((1, 1, 6, 2, 3), -2.0, 2.0, dtype=torch.float64)
    params = {name: value.unsqueeze(0) for name, value in random_params(small(writes="vector"), 0).items()}
    outputs = [small(**options).outputs_of_each(params, x) for options in READINGS]
    for one, other in itertools.combinations(outputs, 2):
        assert (one - other).abs().max() > 1e-4


def given_state(usage: list[float], memory: Tensor, read_weights: Tensor) -> _State:
    hidden = torch.zeros(1, 1, HIDDEN)
    return _State(hidden, hidden, memory, read_weights, torch.tensor([usage]), torch.zeros(1, 1, HEADS * WIDTH))


def access(model: MANN, before: _State, keys: Tensor, gate: float) -> _State:
    """Lets the heads of one sequence access the memory with keys, ``(HEADS, WIDTH)``, and one gate before sigmoid."""
    interface = torch.cat([torch.atanh(keys).flatten(), torch.full((HEADS,), gate)])
    return model._access(before, before.hidden, before.cell, interface.reshape(1, 1, -1))


def test_least_used_slot_is_erased_and_as_many_slots_as_heads_are_written() -> None:
    memory = Stream(1).uniform((1, SLOTS, WIDTH), 1.0, 2.0)
    before = given_state([3.0, 0.4, 5.0, 0.1, 5.0, 6.0, 7.0], memory, torch.full((1, HEADS, SLOTS), 1 / SLOTS))
    keys = Stream(2).uniform((HEADS, WIDTH), -0.9, 0.9)
    after = access(small(), before, keys, gate=-60.0)  # writes to the least used slots alone
    torch.testing.assert_close(after.memory[0, 3], keys.sum(0))  # erased before
    torch.testing.assert_close(after.memory[0, 1], memory[0, 1] + keys.sum(0))  # not erased
    others = [0, 2, 4, 5, 6]
    assert torch.equal(after.memory[0, others], memory[0, others])


def test_open_gate_writes_where_each_head_has_read() -> None:
    memory = Stream(1).uniform((1, SLOTS, WIDTH), 1.0, 2.0)
    read_weights = torch.zeros(1, HEADS, SLOTS)
    read_weights[0, 0, 5] = read_weights[0, 1, 6] = 1
    before = given_state([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0], memory, read_weights)
    keys = Stream(2).uniform((HEADS, WIDTH), -0.9, 0.9)
    after = access(small(), before, keys, gate=60.0)
    torch.testing.assert_close(after.memory[0, 5], memory[0, 5] + keys[0])
    torch.testing.assert_close(after.memory[0, 6], memory[0, 6] + keys[1])
    assert torch.equal(after.memory[0, 0], torch.zeros(WIDTH)), "the least used slot is erased without being written to"
    assert torch.equal(after.memory[0, 1:5], memory[0, 1:5])


def test_usage_fades_and_counts_reads_and_writes() -> None:
    memory = Stream(1).uniform((1, SLOTS, WIDTH), 1.0, 2.0)
    read_weights = torch.full((1, HEADS, SLOTS), 1 / SLOTS)
    usage = [3.0, 0.4, 5.0, 0.1, 5.0, 6.0, 7.0]
    before = given_state(usage, memory, read_weights)
    after = access(small(), before, Stream(2).uniform((HEADS, WIDTH), -0.9, 0.9), gate=-60.0)
    writes = torch.tensor([0.0, HEADS, 0.0, HEADS, 0.0, 0.0, 0.0])
    torch.testing.assert_close(after.usage[0], 0.95 * torch.tensor(usage) + after.read_weights[0].sum(0) + writes)
    torch.testing.assert_close(after.read_weights.sum(2), torch.ones(1, HEADS))


def test_of_equally_used_slots_the_first_are_least_used() -> None:
    memory = torch.ones(1, SLOTS, WIDTH)
    before = given_state([1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], memory, torch.full((1, HEADS, SLOTS), 1 / SLOTS))
    after = access(small(), before, torch.full((HEADS, WIDTH), 0.5), gate=-60.0)
    # Slot 1 is erased and gets 0.5 from both heads, slot 2 keeps its 1 and gets as much.
    assert after.memory[0, :, 0].tolist() == [1, 1, 2, 1, 1, 1, 1]


@pytest.mark.parametrize("options", READINGS, ids=lambda options: "-".join(options.values()))
def test_gradient_is_that_of_finite_differences(options: dict[str, Any]) -> None:
    model = small(4, **options)
    params = {name: value.unsqueeze(0).requires_grad_() for name, value in random_params(model, 3).items()}
    x = Stream(4).uniform((1, 2, 4, 2, 3), -1.0, 1.0, dtype=torch.float64)
    names = list(params)
    assert torch.autograd.gradcheck(
        lambda *values: model.outputs_of_each(dict(zip(names, values, strict=True)), x),
        tuple(params.values()),
        fast_mode=True,
    )


def test_memory_belongs_to_its_sequence() -> None:
    model = small()
    params = {name: value.unsqueeze(0) for name, value in random_params(model, 0).items()}
    x = Stream(5).uniform((3, 2, 6, 2, 3), -2.0, 2.0, dtype=torch.float64)
    together = model.outputs_of_each(params, x)
    for task, example in itertools.product(range(3), range(2)):
        alone = model.outputs_of_each(params, x[task : task + 1, example : example + 1])
        torch.testing.assert_close(together[task, example], alone[0, 0], rtol=1e-12, atol=1e-12)


def test_papers_sizes_give_the_number_of_parameters_of_a_known_count() -> None:
    def count(**options: Any) -> int:
        return sum(value.numel() for value in MANN((50, 405), 5, **options).init(Stream(0)).values())

    assert count(writes="vector") == 679_729
    assert count() == 679_729 - 160 * 201


def test_more_heads_than_slots_are_refused() -> None:
    with pytest.raises(MamlError, match=r"model\.num_heads=8, but model\.num_slots=7"):
        MANN((6, 2), 3, num_slots=7, num_heads=8)
