"""The base class of domains: default numbers of examples, and domains without their data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from maml.config.compose import compose_experiment
from maml.config.schema import build, build_without_data
from maml.domain.omniglot import Omniglot
from maml.domain.sinusoid import Sinusoid
from maml.errors import MamlError
from maml.model.mlp import MLP
from maml.seeding import Stream
from maml.types import Split, Tasks, expand
from tests.runs import ROOT, TinyRuns


class Recorded(Sinusoid):
    """Records the numbers of examples that each draw is asked for."""

    def draw_tasks(self, num_tasks: int, stream: Stream, split: Split, num_shots: int, num_query: int) -> Tasks:
        self.asked = (num_tasks, stream.key, split, num_shots, num_query)
        return super().draw_tasks(num_tasks, stream, split, num_shots, num_query)


@pytest.mark.parametrize(
    ("own_query", "given", "expected"),
    [
        (None, (None, None), (7, 7)),
        (4, (None, None), (7, 4)),
        (4, (2, None), (2, 2)),
        (4, (None, 3), (7, 3)),
        (None, (2, 3), (2, 3)),
    ],
)
def test_numbers_of_examples_not_given_are_the_domains(
    own_query: int | None, given: tuple[int | None, int | None], expected: tuple[int, int]
) -> None:
    domain = Recorded(num_shots=7, num_query=own_query)
    tasks = domain.sample_tasks(2, Stream(3), "val", *given)
    assert domain.asked == (2, Stream(3).child("val").key, "val", *expected)
    assert (tasks["support_x"].shape[1], tasks["query_x"].shape[1]) == expected


@pytest.mark.parametrize("experiment", ["sinusoid_10shot", "point_navigation_maml"])
def test_domain_that_reads_nothing_is_the_same_without_data(experiment: str) -> None:
    config = compose_experiment(experiment).domain
    bare, domain = build_without_data(config), build(config)
    assert type(bare) is type(domain)
    bare.check_available()
    first, second = (each.sample_tasks(2, Stream(0)) for each in (bare, domain))
    assert all(torch.equal(first[name], second[name]) for name in first)


class Sized(Sinusoid):
    """A domain that has these sizes."""

    def __init__(self, in_shape: Any, out_dim: Any) -> None:
        super().__init__()
        self.in_shape, self.out_dim = in_shape, out_dim


@pytest.mark.parametrize(
    ("in_shape", "out_dim"), [([0], 1), ([1], 0), (1, 1), ([1, -2], 1), ([1.5], 1), (["a"], 1), ([1], None), ("a", 1)]
)
def test_sizes_that_are_none_are_refused_before_anything_is_drawn(in_shape: Any, out_dim: Any, tiny: TinyRuns) -> None:
    own = f"domain={{_target_: tests.domain.test_base.Sized, in_shape: {in_shape}, out_dim: {out_dim or 'null'}}}"
    own = own if out_dim != 0 else own.replace("null", "0")
    with pytest.raises(MamlError, match=r"Sized has in_shape=.* and out_dim=.*, but in_shape is a tuple of sizes"):
        tiny.run("~domain", f"+{own}")


def test_sizes_of_numpy_and_a_list_are_sizes() -> None:
    Sized([np.int64(3)], np.int64(1)).check_sizes()
    Sized(torch.Size([3]), 1).check_sizes()


def test_ways_are_refused_where_tasks_draw_no_classes() -> None:
    with pytest.raises(
        MamlError, match=r"evaluation\.num_ways=3 is for tasks that draw their own .* those of Recorded"
    ):
        Recorded(num_shots=7).with_ways(3)


def test_core_does_not_ask_which_domain_it_has() -> None:
    for module in ("hardware/base.py", "training/autotune.py", "evaluation.py", "paper/plan.py"):
        source = (Path(ROOT) / "maml" / module).read_text()
        assert "in_shape" not in source, module
        assert "isinstance(domain" not in source and "maml.domain.r" not in source, module


def test_network_with_too_many_outputs_is_refused() -> None:
    domain, model = Sinusoid(num_shots=5), MLP((1,), 3, [6])
    support = domain.data(domain.sample_tasks(2, Stream(0)), "support")
    with pytest.raises(MamlError, match="MLP gives 3 numbers for each example, but the domain has out_dim=1"):
        domain.inner_loss(model, expand(model.init(Stream(0)), 2), support)


class Glyphs(Sinusoid):
    """A domain of a user that has another one among its arguments."""

    def __init__(self, characters: Omniglot) -> None:
        super().__init__()
        self.characters = characters


def test_domain_within_a_domain_is_built_without_data_too() -> None:
    characters = {"_target_": "maml.domain.omniglot.Omniglot", "num_ways": 5, "num_shots": 1}
    folders = {"data_dir": "/nowhere", "cache_dir": "/nowhere"}
    built: Any = build_without_data({"_target_": f"{__name__}.Glyphs", "characters": characters | folders})
    assert built.characters.in_shape == (28, 28, 1)
