"""Loading a trained network and adapting it to one's own data: the same bits as the framework's own adaptation."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import maml
from maml import api
from maml.config.compose import compose_experiment
from maml.config.paths import CHECKPOINTS
from maml.config.schema import Settings, build, without_data
from maml.data.omniglot import load_omniglot
from maml.domain.classification import FewShotClassification
from maml.domain.sinusoid import Sinusoid
from maml.errors import MamlError
from maml.evaluation import Evaluation
from maml.experiment import build_algorithm
from maml.hardware.base import Hardware
from maml.record.exported import read_index
from maml.types import Params, num_tasks, take
from tests.runs import TinyRuns
from tests.scripts.test_render import trained

OMNIGLOT = "omniglot_5way_1shot"
SINUSOID = "sinusoid_10shot"


@torch.no_grad()
def by_the_framework(network: api.Network, config: Settings, task: int, num_shots: int) -> tuple[Any, dict[str, Any]]:
    """Evaluates one task of the bank, by the algorithm built with its real domain; returns its data and results."""
    algorithm = build_algorithm(config, Hardware("cpu"))
    algorithm.load_state_dict(network.algorithm.state_dict())
    evaluation: Evaluation = build(config.evaluation)
    domain = algorithm.domain
    tasks = take(evaluation.bank(domain, num_shots), task, task + 1)
    *_, params = algorithm.adapt(
        algorithm.params_per_task(num_tasks(tasks)), tasks, evaluation.num_steps, evaluation.step_sizes(num_shots)
    )
    support, query = domain.data(tasks, "support"), domain.data(tasks, "query")
    measured = domain.measure(algorithm.model, params, support, query, evaluation.num_steps)
    return domain, {"params": params, "support": support, "query": query, "measured": measured, "tasks": tasks}


def same(params: Params, other: Params) -> bool:
    return params.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in params.items())


def test_sinusoid_adapts_and_predicts_as_the_framework() -> None:
    network = maml.load(SINUSOID)
    assert (network.iteration, network.complete) == (70_000, True)
    _, found = by_the_framework(network, compose_experiment(SINUSOID), task=3, num_shots=5)
    predictor = network.adapt(found["support"].x[0].numpy(), found["support"].y[0].tolist())
    assert same(predictor.params, found["params"])
    values = predictor(found["query"].x[0])
    assert isinstance(values, Tensor)
    assert (values - found["query"].y[0]).square().mean().item() == found["measured"]["mse"].item()
    assert same(network.adapt(found["support"].x[0, :, 0], found["support"].y[0]).params, found["params"])
    assert network.adapt(found["support"].x[0], found["support"].y[0], num_steps=0)([[0.5]]).shape == (1, 1)


@pytest.mark.parametrize("experiment", [OMNIGLOT, "omniglot_5way_1shot_context_vector"])
def test_omniglot_adapts_and_predicts_as_the_framework(tiny_images: TinyRuns, experiment: str) -> None:
    network = maml.load(experiment)
    config = compose_experiment(experiment)
    config = replace(config, domain={**config.domain, "cache_dir": str(tiny_images.cache_dir)})
    domain, found = by_the_framework(network, config, task=1, num_shots=1)
    raw = (found["support"].x[0, ..., 0] * domain.scale).to(torch.uint8)
    predictor = network.adapt(raw.numpy(), list("abcde"))
    assert same(predictor.params, found["params"])
    assert predictor.classes == list("abcde")
    query, truth = found["query"].x[0], ["abcde"[number] for number in found["query"].y[0]]
    for transductive, metric in [(True, "accuracy_transductive"), (False, "accuracy_inductive")]:
        labels = predictor(query, transductive)
        assert np.mean([a == b for a, b in zip(labels, truth, strict=True)]) == pytest.approx(found["measured"][metric])
        chances = predictor.probabilities(query, transductive)
        assert torch.allclose(chances.sum(1), torch.ones(5))
        assert ["abcde"[best] for best in chances.argmax(1)] == labels
    together = predictor.probabilities(query)
    assert torch.allclose(predictor.probabilities(query[2:3]), together[2:3], atol=1e-6)  # no matter what is beside it


def test_examples_may_come_in_any_order() -> None:
    network = maml.load("omniglot_5way_5shot")
    images = torch.rand(25, 28, 28, 1, generator=torch.Generator().manual_seed(0))
    labels = [("class", number % 5) for number in range(25)]  # hashable is enough
    order = [number for first in range(5) for number in range(first, 25, 5)]
    predictor = network.adapt(images, labels)
    other = network.adapt(images[order], [labels[number] for number in order])
    assert predictor.classes == other.classes == labels[:5]
    assert same(predictor.params, other.params)


def test_tiny_run_is_loaded_from_folder_and_file(tiny: TinyRuns) -> None:
    folder = tiny.run()
    network = maml.load(folder)
    assert (network.experiment, network.iteration, network.complete) == ("custom", 200, True)
    assert repr(network) == "<custom, iteration 200 of 200>"
    x, y = torch.linspace(-5, 5, 10).unsqueeze(1), torch.zeros(10, 1)
    assert same(network.adapt(x, y).params, maml.load(folder / "checkpoint.pt").adapt(x, y).params)
    before = {name: value.clone() for name, value in network.theta.items()}
    network.adapt(x, y, num_steps=40)
    assert same(network.theta, before)


@pytest.mark.parametrize("experiment", ["sinusoid_pretrain", SINUSOID])
def test_step_sizes_are_those_of_meta_test_and_of_the_nearest_k(experiment: str) -> None:
    network = maml.load(experiment)
    evaluation: Evaluation = build(compose_experiment(experiment).evaluation)
    for given, known in {5: 5, 1: 5, 9: 10, 100: 20}.items():
        sizes = evaluation.step_sizes(known)
        assert network._step_sizes(given, 10) == sizes
        assert network._step_sizes(given, 12) == (sizes and [*sizes, sizes[-1], sizes[-1]])


@pytest.mark.parametrize("name", ["omniglot", "mini_imagenet", "cifar_fs"])
def test_domain_without_its_images_is_like_the_one_with_them(name: str, tiny_images: TinyRuns) -> None:
    config = tiny_images.config(f"domain={name}").domain
    bare: FewShotClassification = build(without_data(config))
    try:
        domain: FewShotClassification = build(config)
    except MamlError as error:
        pytest.skip(str(error))
    for attribute in ("in_shape", "out_dim", "scale", "rotate", "num_shots", "num_query", "workload"):
        assert getattr(bare, attribute) == getattr(domain, attribute)
    assert len(bare.splits["train"]) == len(domain.splits["train"]) == domain.num_train_classes
    assert domain.images.shape[2:] == (domain.in_shape[0] * domain.in_shape[1], domain.in_shape[2])
    assert 0.5 < domain.images[:3].max() / domain.scale <= 1


@pytest.mark.parametrize("baseline", ["finetune", "nearest_neighbor"])
def test_baselines_adapt_without_the_images_they_were_trained_on(baseline: str, tmp_path: Path) -> None:
    config = compose_experiment(f"mini_imagenet_5way_1shot_{baseline}")
    config = replace(config, domain={**config.domain, "data_dir": str(tmp_path), "cache_dir": str(tmp_path)})
    algorithm = build_algorithm(replace(config, domain=without_data(config.domain)), Hardware("cpu"))
    network = api.Network("it", 0, 0, algorithm, build(config.evaluation), {})
    images = torch.rand(5, 84, 84, 3, generator=torch.Generator().manual_seed(0))
    labels = network.adapt(images, list("abcde"), num_steps=2)(images)
    assert set(labels) <= set("abcde") if baseline == "finetune" else labels == list("abcde")


def test_pictures_become_what_the_domain_has(tiny_images: TinyRuns, tmp_path: Path) -> None:
    data = load_omniglot(Path(tiny_images.config().domain["data_dir"]), tiny_images.cache_dir)
    drawing = data.images[7, 3]
    large = Image.fromarray((1 - drawing.numpy()) * np.uint8(255)).resize((105, 105), Image.Resampling.NEAREST)
    large.convert("RGBA").save(tmp_path / "drawing.png")
    network = maml.load(OMNIGLOT)
    assert torch.equal(network.read([tmp_path / "drawing.png"])[0, ..., 0], drawing.float())
    photo = Image.fromarray(np.full((50, 60, 3), [0, 51, 255], np.uint8))
    (pixels,) = maml.load("cifar_fs_5way_1shot").read([photo])
    assert torch.allclose(pixels, torch.tensor([0, 0.2, 1]).expand(32, 32, 3))


def test_own_images_in_ten_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of docs/python.md, on drawings of five shapes."""
    monkeypatch.chdir(tmp_path)
    row, column = np.mgrid[-1:1:105j, -1:1:105j]
    shapes = {
        "ring": abs(row**2 + column**2 - 0.4),
        "cross": 3 * np.minimum(abs(row), abs(column)),
        "stripe": 3 * abs(row - 0.5),
        "diagonal": 2 * abs(row - column),
        "square": 3 * abs(np.maximum(abs(row), abs(column)) - 0.7),
    }
    Path("unknown").mkdir()
    for name, distance in shapes.items():
        (Path("drawings") / name).mkdir(parents=True)
        ink = Image.fromarray(np.where(distance < 0.2, 0, 255).astype(np.uint8))
        ink.save(f"drawings/{name}/1.png")
        ink.rotate(2, translate=(3, -2), fillcolor=255).save(f"unknown/{name}.png")
    said: list[tuple[str, str]] = []

    network = maml.load("omniglot_5way_1shot")
    examples = sorted(Path("drawings").glob("*/*.png"))
    predictor = network.adapt(network.read(examples), [file.parent.name for file in examples])
    unknown = sorted(Path("unknown").glob("*.png"))
    labels = predictor(network.read(unknown))
    chances = predictor.probabilities(network.read(unknown))
    for file, label, chance in zip(unknown, labels, chances.amax(1), strict=True):
        said.append((file.stem, str(label)))
        assert 0.2 < chance <= 1
    assert sum(stem == label for stem, label in said) >= 4


def test_wrong_data_is_refused_with_what_to_give() -> None:
    network = maml.load(OMNIGLOT)
    images = np.zeros((5, 28, 28), np.uint8)
    for x, y, message in [
        (np.zeros((7, 28, 28)), range(7), "this network tells 5 classes apart, the labels have 7"),
        (images, list("abcd"), "5 inputs, but 4 labels"),
        (np.zeros((6, 28, 28)), list("abcdea"), "there are 2 of 'a', 1 of 'b'"),
        (np.zeros((5, 27, 28)), list("abcde"), r"x has shape \(5, 27, 28\); omniglot.*\('S', 28, 28, 1\)"),
        (np.zeros((0, 28, 28)), [], "x has shape"),
        (images + np.uint8(255), list("abcde"), "as uint8 they have to lie in 0 to 1"),
        (images - 0.5, list("abcde"), "as float64 they have to lie in 0 to 1"),
        (images * np.nan, list("abcde"), "x has values that are not finite"),
    ]:
        with pytest.raises(MamlError, match=message):
            network.adapt(x, y)  # type: ignore[arg-type]
    points = maml.load(SINUSOID)
    with pytest.raises(MamlError, match=r"y has shape \(4, 1\); the targets of x have shape \(3, 1\)"):
        points.adapt(np.zeros((3, 1)), np.zeros((4, 1)))
    with pytest.raises(MamlError, match=r"takes inputs of shape \('S', 1\)"):
        points.adapt(np.zeros((3, 2)), np.zeros((3, 1)))
    with pytest.raises(MamlError, match="diverge"):
        points.adapt(np.zeros((3, 1)), np.full((3, 1), 1e30))
    with pytest.raises(MamlError, match="values, which have no probabilities"):
        points.adapt(np.zeros((3, 1)), np.zeros((3, 1))).probabilities([[0.0]])
    with pytest.raises(MamlError, match="which are no images"):
        points.read([])


def test_policy_is_shown_and_not_adapted_to_examples(tmp_path: Path) -> None:
    trained("point_navigation_maml", tmp_path, "evaluation.theta=best")
    (path,) = tmp_path.rglob("checkpoint.pt")
    network = maml.load(path.parent)
    assert same(network.theta, {name: network.algorithm.best[name] for name in network.theta})
    with pytest.raises(MamlError, match=r"scripts/render.py \+experiment=point_navigation_maml"):
        network.adapt([[0.0, 0.0]], [0])


def test_unknown_sources_say_what_there_is(tmp_path: Path) -> None:
    for source, message in {
        "omniglot_5way_1shto": "did you mean omniglot_5way_1shot",
        "ant_velocity_oracle": "has no committed checkpoint: train it",
        str(tmp_path): "is no run folder",
        str(tmp_path / "a.safetensors"): "has no entry for a.safetensors",
    }.items():
        with pytest.raises(MamlError, match=message):
            maml.load(source)


def test_import_of_the_package_stays_light() -> None:
    code = (
        "import sys, maml; assert 'torch' not in sys.modules; assert callable(maml.load); assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        maml.lod  # noqa: B018


def test_sinusoid_network_learns_a_sinusoid() -> None:
    x = torch.linspace(-5, 5, 20).unsqueeze(1)
    y = 3 * torch.sin(x - 1)
    network = maml.load(SINUSOID)
    errors = [(network.adapt(x, y, num_steps)(x) - y).square().mean() for num_steps in (0, 1, 10)]
    assert errors[0] > errors[1] > errors[2]
    assert isinstance(network.algorithm.domain, Sinusoid)


@pytest.mark.parametrize("experiment", sorted({entry.experiment for entry in read_index(CHECKPOINTS).cells.values()}))
def test_every_committed_network_can_be_loaded(experiment: str) -> None:
    network = maml.load(experiment)
    assert all(value.isfinite().all() for value in network.theta.values())
    assert all(value.any() for value in network.algorithm.buffers.values()), "they are the trained ones"
