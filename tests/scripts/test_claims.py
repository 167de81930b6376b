"""The claims of section 5.2: counts compared with networks of PyTorch's layers, and a tiny run of the script."""

from __future__ import annotations

import csv
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from maml.hardware.base import Hardware
from maml.hardware.kernels import kernels_apply, use_kernels
from tests.runs import ROOT

MINI, OMNIGLOT = ("mini_imagenet_5way_1shot", (84, 84, 3)), ("omniglot_5way_1shot", (28, 28, 1))


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))  # the script imports other scripts
    return runpy.run_path(str(ROOT / "scripts" / "claims.py"))["main"]


def embedding(channels: int, filters: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for num_in in (channels, filters, filters, filters):
        layers += [nn.Conv2d(num_in, filters, 3, padding=1), nn.BatchNorm2d(filters), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten())


def size(*modules: nn.Module) -> int:
    return sum(value.numel() for module in modules for value in module.parameters())


@pytest.mark.parametrize("in_shape", [(84, 84, 3), (28, 28, 1)])
def test_counts_of_the_others_are_those_of_built_networks(
    main: Callable[..., Any], in_shape: tuple[int, int, int]
) -> None:
    script = main.__globals__
    height, width, channels = in_shape
    images = torch.zeros(2, channels, height, width)
    for filters in (32, 64):
        net = embedding(channels, filters)
        assert script["embedding_size"](in_shape, filters) == (size(net), net(images).shape[1])
    assert script["matching_networks_size"](in_shape, False) == size(embedding(channels, 64))

    assert script["lstm_size"](3, 7) == size(nn.LSTM(3, 7)) - 4 * 7  # PyTorch's LSTM has two biases

    classifier, gates = nn.Linear(embedding(channels, 32)(images).shape[1], 5), nn.Linear(20 + 2, 2)
    expected = size(embedding(channels, 32), classifier, nn.LSTM(4, 20), gates) - 4 * 20
    assert script["meta_learner_lstm_size"](in_shape, 5) == expected


def test_full_context_adds_three_lstms(main: Callable[..., Any]) -> None:
    script = main.__globals__
    added = script["matching_networks_size"]((28, 28, 1), True) - script["matching_networks_size"]((28, 28, 1), False)
    assert added == size(nn.LSTM(64, 64, bidirectional=True), nn.LSTM(128, 64)) - 3 * 4 * 64


@pytest.mark.parametrize(("experiment", "published"), [(MINI, 32_773), (OMNIGLOT, 112_005)])
def test_maml_has_the_classifiers_parameters_and_no_more(
    main: Callable[..., Any], experiment: tuple[str, tuple[int, int, int]], published: int
) -> None:
    ours, beyond, *others = (row.ours for row in main.__globals__["parameter_counts"](*experiment))
    assert (ours, beyond) == (f"{published:,}", "0")
    if experiment == MINI:  # on Omniglot the embedding alone is as large
        assert all(int(other.replace(",", "")) > published for other in others)
        assert others == ["113,088", "71,812,288", "34,947"]


def test_measured_meta_gradient_has_the_kernels_of_training(
    main: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        for trained_with in (False, True):
            use_kernels(False)
            monkeypatch.setattr(Hardware, "_can_compile_kernels", lambda _, can=trained_with: can)
            meta_gradient, _ = main.__globals__["build_meta_gradient"](OMNIGLOT[0], "maml")
            assert meta_gradient.execution.kernels == kernels_apply(torch.zeros(1)) == trained_with
            assert torch.get_num_threads() == 1
    finally:
        use_kernels(False)


@pytest.mark.slow  # it measures for twenty seconds
def test_script_writes_what_it_measured(
    main: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = {MINI[0]: (16, 16, 3), OMNIGLOT[0]: (16, 16, 1)}
    monkeypatch.setitem(main.__globals__, "SHAPES", shapes)
    main(["--rounds", "2", "--out", str(tmp_path)])
    rows = list(csv.DictReader((tmp_path / "claims.csv").read_text().splitlines()))
    assert list(rows[0]) == ["claim", "published", "ours", "range", "shape", "hardware", "commit", "command"]
    written = (tmp_path / "claims.md").read_text()
    assert all(f"| {row['claim']} | {row['shape']} |" in written for row in rows)
    for shape in shapes:
        faster, saved = (percentages(row) for row in rows if row["shape"] == shape and "FOMAML" in row["claim"])
        assert faster[0] <= faster[1] <= faster[2]
        for ends in (0, 2):  # two readings of one ratio
            assert faster[ends] == pytest.approx(1 / (1 - saved[ends]) - 1, abs=0.01)


def percentages(row: dict[str, str]) -> tuple[float, float, float]:
    """Returns the lowest, median and highest percentage."""
    low, high = row["range"].split(" to ")
    return tuple(float(text.removesuffix("%")) / 100 for text in (low, row["ours"], high))  # type: ignore[return-value]
