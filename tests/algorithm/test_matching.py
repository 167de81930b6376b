"""Matching networks against loops over query and support images, and PyTorch's LSTMs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maml.algorithm.matching import Matching
from maml.seeding import Stream
from maml.types import Params, expand
from tests.algorithm.test_embedding import METHODS, make
from tests.algorithm.test_prototypical import SLOW, cosine, embeddings
from tests.runs import TinyRuns

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the options with which the other tests build matching networks."""
    monkeypatch.setitem(METHODS, "matching", ("algorithm=matching",))


def built(tiny_images: TinyRuns, *overrides: str) -> Matching:
    algorithm = make(tiny_images, "matching", *overrides)
    assert isinstance(algorithm, Matching)
    return algorithm


def probabilities(similarity: list[list[Tensor]], score: str) -> list[Tensor]:
    """Returns p(y) from the similarities to each shot and way."""
    ways = range(len(similarity[0]))
    if score == "sum":
        summed = torch.stack([torch.stack([shot[way] for shot in similarity]).sum() for way in ways])
        return list(summed.exp() / summed.exp().sum())
    everything = torch.stack([torch.exp(value) for shot in similarity for value in shot]).sum()
    return [torch.stack([torch.exp(shot[way]) / everything for shot in similarity]).sum() for way in ways]


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("num_shots", [1, 5])
@pytest.mark.parametrize("similarity", SLOW)
@pytest.mark.parametrize(("score", "temperature"), [("attention", 1.0), ("attention", 0.2), ("sum", 1.0)])
def test_loss_and_gradients_equal_the_loop(
    similarity: str, num_shots: int, score: str, temperature: float, tiny_images: TinyRuns
) -> None:
    algorithm = built(
        tiny_images,
        f"algorithm.similarity={similarity}",
        f"algorithm.score={score}",
        f"algorithm.temperature={temperature}",
    )
    support, query, labels = embeddings(num_shots)
    losses, _ = algorithm.loss({}, support, query, labels)
    outputs = algorithm.scores({}, support, query).softmax(-1)
    for task in range(2):
        total = torch.zeros(())
        for i, label in enumerate(labels[task].tolist()):
            compare = [
                [SLOW[similarity](query[task, i], support[task, shot, way]) / temperature for way in range(3)]
                for shot in range(num_shots)
            ]
            p = probabilities(compare, score)
            # The network's outputs are logits of p: a softmax gives p itself, and not the softmax of a softmax.
            torch.testing.assert_close(outputs[task, i], torch.stack(p), rtol=1e-9, atol=1e-12)
            total = total - torch.log(p[label])
        torch.testing.assert_close(losses[task], total / 7, rtol=1e-10, atol=1e-12)
        ours = torch.autograd.grad(losses[task], (support, query), retain_graph=True)
        loops = torch.autograd.grad(total / 7, (support, query), retain_graph=True)
        for value, expected in zip(ours, loops, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.usefixtures("plain")
def test_learnt_temperature_starts_as_given_and_has_a_gradient_for_each_task(tiny_images: TinyRuns) -> None:
    learnt = built(tiny_images, "algorithm.temperature=0.3", "algorithm.learn_temperature=true")
    fixed = built(tiny_images, "algorithm.temperature=0.3")
    assert learnt.theta.keys() - fixed.theta.keys() == {"comparison.log_temperature"}
    support, query, labels = embeddings(2)
    params = {name: value.requires_grad_() for name, value in expand(learnt.theta, 2).items()}
    losses, _ = learnt.loss(params, support, query, labels)
    torch.testing.assert_close(losses, fixed.loss({}, support, query, labels)[0])
    (gradient,) = torch.autograd.grad(losses.sum(), params["comparison.log_temperature"])
    for task in range(2):
        sides = []
        for moved in (1e-6, -1e-6):
            fixed.temperature = 0.3 * math.exp(moved)
            sides.append(fixed.loss({}, support, query, labels)[0][task])
        torch.testing.assert_close(gradient[task, 0], (sides[0] - sides[1]) / 2e-6, rtol=1e-5, atol=1e-8)


def library_cell(params: Params, name: str, cell: Any, suffix: str = "") -> Any:
    """Copies an LSTM's weights into a layer of PyTorch."""
    with torch.no_grad():
        for kind, own in (("ih", "input"), ("hh", "state")):
            getattr(cell, f"weight_{kind}{suffix}").copy_(params[f"comparison.{name}.{own}"])
        getattr(cell, f"bias_ih{suffix}").copy_(params[f"comparison.{name}.bias"])
        getattr(cell, f"bias_hh{suffix}").zero_()
    return cell


def attend(params: Params, context: str, query: Tensor, support: Tensor, num_steps: int) -> Tensor:
    """The attention LSTM for one query embedding ``(D,)`` and support embeddings ``(S, D)``."""

    def read(hidden: Tensor) -> Tensor:
        weights = torch.stack([torch.exp(hidden @ other) for other in support])
        return torch.stack([w * other for w, other in zip(weights / weights.sum(), support, strict=True)]).sum(0)

    size = len(query)
    weights = {kind: params[f"comparison.attention.{kind}"] for kind in ("input", "state", "bias")}
    hidden, cell = (query, torch.zeros(size)) if context == "state" else (torch.zeros(size), torch.zeros(size))
    seen = read(hidden) if context == "state" else support.mean(0)
    for _ in range(num_steps):
        given = query if context == "state" else torch.cat([query, seen])
        state = torch.cat([hidden, seen]) if context == "state" else hidden
        gates = weights["input"] @ given + weights["state"] @ state + weights["bias"]
        admit, keep, candidate, emit = gates.split(size)
        cell = keep.sigmoid() * cell + admit.sigmoid() * candidate.tanh()
        hidden = emit.sigmoid() * cell.tanh() + query
        seen = read(hidden)
    return hidden


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("context", ["state", "input"])
def test_full_context_embeddings_equal_the_loop(context: str, tiny_images: TinyRuns) -> None:
    algorithm = built(tiny_images, f"algorithm.context={context}", "algorithm.num_context_steps=2")
    support, query, labels = embeddings(2)
    params = {
        name: value + Stream(5).child(name).uniform(value.shape, -0.3, 0.3)
        for name, value in algorithm.theta.items()
        if name.startswith("comparison")
    }
    size = 4
    wide, state = (2 * size, size) if context == "input" else (size, 2 * size)
    assert params["comparison.attention.input"].shape == (4 * size, wide)
    assert params["comparison.attention.state"].shape == (4 * size, state)
    both = nn.LSTM(size, size, bidirectional=True)
    library_cell(params, "forward", both, "_l0")
    library_cell(params, "backward", both, "_l0_reverse")
    losses, _ = algorithm.loss(expand(params, 2), support, query, labels)
    shared, _ = algorithm.loss(expand(params, 1), support, query, labels)
    torch.testing.assert_close(losses, shared, rtol=1e-10, atol=1e-12)
    for task in range(2):
        images = support[task].flatten(0, 1)
        read = both(images)[0]
        known = images + read[:, :size] + read[:, size:]
        total = torch.zeros(())
        for i, label in enumerate(labels[task].tolist()):
            asked = attend(params, context, query[task, i], known, 2)
            compare = [[cosine(asked, known[3 * shot + way]) for way in range(3)] for shot in range(2)]
            total = total - torch.log(probabilities(compare, "attention")[label])
        torch.testing.assert_close(losses[task], total / 7, rtol=1e-9, atol=1e-12)
        ours = torch.autograd.grad(losses[task], (support, query), retain_graph=True)
        loops = torch.autograd.grad(total / 7, (support, query), retain_graph=True)
        for value, expected in zip(ours, loops, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-7, atol=1e-11)
