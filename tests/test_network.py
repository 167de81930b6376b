"""Trained networks adapt and predict as the framework does, and refuse data that does not fit."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import maml
from maml.config.compose import CUSTOM, compose_experiment
from maml.config.schema import Settings, build, build_without_data
from maml.data.omniglot import load_omniglot
from maml.domain.sinusoid import Sinusoid
from maml.errors import MamlError
from maml.evaluation import Evaluation
from maml.experiment import build_algorithm
from maml.hardware.base import Hardware
from maml.hardware.precision import Precision, use_dtype, use_precision
from maml.network import Inputs, Network
from maml.seeding import Stream
from maml.types import Params, num_tasks, take
from tests.runs import ROOT, TinyRuns
from tests.scripts.test_render import trained
from tests.training.test_meta_gradient import FixedExamples

OMNIGLOT = "omniglot_5way_1shot"
SINUSOID = "sinusoid_10shot"

# Some committed networks are not trained to the end, which `maml.load` warns of; here warnings are errors.
may_be_unfinished = pytest.mark.filterwarnings("ignore:.* was trained for .* iterations:UserWarning")


@torch.no_grad()
def by_the_framework(network: Network, config: Settings, task: int, num_shots: int) -> tuple[Any, dict[str, Any]]:
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
    values = predictor(found["query"].x[0], transductive=True)
    assert isinstance(values, Tensor)
    torch.testing.assert_close(predictor(found["query"].x[0]), values)
    assert (values - found["query"].y[0]).square().mean().item() == found["measured"]["mse"].item()
    assert same(network.adapt(found["support"].x[0, :, 0], found["support"].y[0]).params, found["params"])
    assert network.adapt(found["support"].x[0], found["support"].y[0], num_steps=0)([[0.5]]).shape == (1, 1)


@may_be_unfinished
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


@may_be_unfinished
def test_examples_may_come_in_any_order() -> None:
    network = maml.load("omniglot_5way_5shot")
    images = torch.rand(25, 28, 28, 1, generator=torch.Generator().manual_seed(0))
    labels = [("class", number % 5) for number in range(25)]  # hashable is enough
    order = [number for first in range(5) for number in range(first, 25, 5)]
    predictor = network.adapt(images, labels)
    other = network.adapt(images[order], [labels[number] for number in order])
    assert predictor.classes == other.classes == labels[:5]
    assert same(predictor.params, other.params)


@pytest.mark.parametrize("experiment", ["sinusoid_pretrain", SINUSOID])
def test_step_sizes_are_those_of_meta_test_and_of_the_nearest_k(experiment: str) -> None:
    network = maml.load(experiment)
    evaluation: Evaluation = build(compose_experiment(experiment).evaluation)
    for given, known in {5: 5, 1: 5, 9: 10, 100: 20}.items():
        sizes = evaluation.step_sizes(known)
        assert network._step_sizes(given, 10) == sizes
        assert network._step_sizes(given, 12) == (sizes and [*sizes, sizes[-1], sizes[-1]])


def test_step_sizes_are_those_of_the_nearest_k_without_a_report_too() -> None:
    settings = compose_experiment(SINUSOID)
    algorithm = build_algorithm(settings, Hardware("cpu"))
    evaluation = Evaluation(num_tasks=2, num_steps=2, num_shots=[5, 10], step_size={5: 0.1, 10: 0.2})
    network = Network("own", 0, 0, algorithm, evaluation, {})
    assert [network._step_sizes(given, 3) for given in (4, 9)] == [[0.1] * 3, [0.2] * 3]


def test_zero_steps_of_meta_test_leave_the_inner_optimizers_step_size() -> None:
    network = replace(maml.load(SINUSOID), step_sizes={5: []})
    assert network._step_sizes(5, 2) is None


@pytest.mark.parametrize("precision", ["float64", "bf16"])
def test_network_computes_in_the_precision_of_its_run(precision: Precision, tiny: TinyRuns) -> None:
    overrides = (f"precision={precision}", "num_iterations=3")
    network = maml.load(tiny.run(*overrides))
    with use_precision(precision):
        _, expected = by_the_framework(network, tiny.config(*overrides), task=0, num_shots=5)
        support, query = expected["support"], expected["query"]
        outputs = network.model(expected["params"], query.x)[0]
    predictor = network.adapt(support.x[0], support.y[0])
    assert same(predictor.params, expected["params"])
    assert torch.equal(predictor(query.x[0]), outputs)
    assert torch.get_default_dtype() == torch.float32


def test_networks_of_different_precision_do_not_disturb_each_other_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    network = maml.load(SINUSOID)
    networks = [network, replace(network, precision="bf16")]
    prepare = Network.prepare

    def prepare_slowly(self: Network, x: Inputs) -> Tensor:
        time.sleep(0.02)  # the other thread starts
        return prepare(self, x)

    def predict(network: Network) -> float:
        return network.adapt([[0.0], [1.0]], [[0.5], [1.0]])([[0.3]]).item()

    alone = [predict(network) for network in networks]
    assert alone[0] != alone[1]
    monkeypatch.setattr(Network, "prepare", prepare_slowly)
    with use_dtype("float64"), ThreadPoolExecutor() as threads:
        assert [*threads.map(predict, networks)] == alone
        assert torch.get_default_dtype() == torch.float64


def test_network_works_in_inference_mode() -> None:
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.5], [1.0]])
    network = maml.load(SINUSOID)
    expected = network.adapt(x, y)(x)
    with torch.inference_mode():
        loaded, made = maml.load(SINUSOID), (x.clone(), y.clone())
        assert torch.equal(network.adapt(x, y)(x), expected)
    assert torch.equal(loaded.adapt(x, y)(x), expected)
    assert torch.equal(network.adapt(*made)(made[0]), expected)


@may_be_unfinished
@pytest.mark.parametrize("experiment", [SINUSOID, OMNIGLOT])
def test_network_keeps_its_precision_under_autocast(experiment: str) -> None:
    network = maml.load(experiment)
    x, y = Stream(0).uniform((2, *network.in_shape)), [[0.0], [1.0]] if experiment == SINUSOID else [0, 1]
    predictor = network.adapt(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert same(network.adapt(x, y).params, predictor.params)
        outputs = predictor.outputs(x)
    assert torch.equal(outputs, predictor.outputs(x))


@may_be_unfinished
def test_network_computes_on_its_own_device_whatever_the_default_device() -> None:
    points = maml.load(SINUSOID)
    expected = points.adapt([[0.0], [1.0]], [[0.5], [1.0]])([[0.3]])
    pictures = [Image.linear_gradient("L").rotate(turn) for turn in (0, 90)]
    with torch.device("meta"):
        for network in (points, maml.load(SINUSOID)):
            assert torch.equal(network.adapt([[0.0], [1.0]], [[0.5], [1.0]])([[0.3]]), expected)
        drawings = maml.load(OMNIGLOT)
        images = drawings.read(pictures)
        assert drawings.adapt(images, ["up", "left"])(images.numpy()) == ["up", "left"]


def test_network_works_in_a_program_that_sets_tf32_its_own_way() -> None:
    script = "import maml, torch; torch.backends.fp32_precision = 'tf32'; network = maml.load('sinusoid_10shot'); "
    script += "network.adapt([[0.0]], [[0.0]])([[0.5]]); assert torch.backends.fp32_precision == 'tf32'"
    subprocess.run([sys.executable, "-W", "error", "-c", script], cwd=ROOT, check=True)


@pytest.mark.parametrize("baseline", ["finetune", "nearest_neighbor"])
def test_baselines_adapt_without_the_images_they_were_trained_on(baseline: str, tmp_path: Path) -> None:
    config = compose_experiment(f"mini_imagenet_5way_1shot_{baseline}")
    config = replace(config, domain={**config.domain, "data_dir": str(tmp_path), "cache_dir": str(tmp_path)})
    algorithm = build_algorithm(config, Hardware("cpu"), build_without_data(config.domain))
    network = Network("it", 0, 0, algorithm, build(config.evaluation), {})
    images = torch.rand(5, 84, 84, 3, generator=torch.Generator().manual_seed(0))
    predictor = network.adapt(images, list("abcde"), num_steps=2)
    labels = predictor(images)
    assert pickle.loads(pickle.dumps(predictor))(images) == labels
    assert set(labels) <= set("abcde") if baseline == "finetune" else labels == list("abcde")


@may_be_unfinished
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


@may_be_unfinished
def test_drawings_on_transparent_paper_and_of_16_bits_are_read_as_drawn(tmp_path: Path) -> None:
    row, column = np.mgrid[-1:1:105j, -1:1:105j]
    ink = abs(row**2 + column**2 - 0.4) < 0.1
    plain = Image.fromarray(np.where(ink, 0, 255).astype(np.uint8))
    clear = Image.new("L", plain.size)
    clear.putalpha(Image.fromarray(np.where(ink, 255, 0).astype(np.uint8)))
    deep = Image.fromarray(np.where(ink, 45_000, 60_000).astype(np.uint16))
    files = [tmp_path / name for name in ("plain.png", "la.png", "rgba.png", "deep.png")]
    for picture, file in zip((plain, clear, clear.convert("RGBA"), deep), files, strict=True):
        picture.save(file)
    expected, *others = maml.load(OMNIGLOT).read(files)
    assert 0.05 < expected.mean() < 0.3
    assert all(torch.equal(other, expected) for other in others)


@may_be_unfinished
def test_picture_that_is_blank_or_broken_is_named(tmp_path: Path) -> None:
    network = maml.load(OMNIGLOT)
    Image.new("L", (50, 50), 255).save(tmp_path / "empty.png")
    (tmp_path / "page.png").write_text("<html>404</html>")
    (tmp_path / "half.png").write_bytes((tmp_path / "empty.png").read_bytes()[:60])
    with pytest.warns(UserWarning, match=r"empty\.png is all paper"):
        assert network.read([tmp_path / "empty.png"]).sum() == 0
    with pytest.warns(UserWarning, match="picture 1 is all ink"):
        network.read([Image.open(tmp_path / "empty.png").rotate(45), Image.new("L", (50, 50))])
    for name in ("page.png", "half.png", "gone.png"):
        with pytest.raises(MamlError, match=rf"{name} cannot be read as a picture \("):
            network.read([tmp_path / name])
    with pytest.raises(MamlError, match="no pictures to read"):
        network.read([])


@may_be_unfinished
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


@may_be_unfinished
def test_fewer_classes_than_in_training_are_those_of_meta_test_with_fewer_ways(tiny_images: TinyRuns) -> None:
    network = maml.load(OMNIGLOT)
    config = compose_experiment(OMNIGLOT, ("evaluation.num_ways=3",))
    config = replace(config, domain={**config.domain, "cache_dir": str(tiny_images.cache_dir)})
    _, found = by_the_framework(network, config, task=4, num_shots=1)
    predictor = network.adapt(found["support"].x[0], list("abc"))
    assert same(predictor.params, found["params"])
    query, truth = found["query"].x[0], ["abc"[number] for number in found["query"].y[0]]
    for transductive, metric in [(True, "accuracy_transductive"), (False, "accuracy_inductive")]:
        labels = predictor(query, transductive)
        assert np.mean([a == b for a, b in zip(labels, truth, strict=True)]) == pytest.approx(found["measured"][metric])
        assert predictor.probabilities(query, transductive).shape == (3, 3)
    with pytest.raises(MamlError, match="nothing to tell apart: the labels have 1 class"):
        network.adapt(found["support"].x[0], list("aaa"))


@may_be_unfinished
def test_network_that_compares_images_takes_more_classes_than_in_training(tiny_images: TinyRuns) -> None:
    folder = tiny_images.run("algorithm=nearest_neighbor", "num_iterations=1", "meta_batch_size=10")
    network = maml.load(folder)
    images = torch.rand(16, 28, 28, 1, generator=torch.Generator().manual_seed(0))
    labels = [*range(8)] * 2
    assert network.adapt(images, labels)(images) == labels, "every image is most similar to itself"


@may_be_unfinished
def test_labels_may_be_a_list_of_single_tensors() -> None:
    network = maml.load("omniglot_5way_1shot_prototypical")
    images, labels = torch.rand(10, 28, 28, 1), torch.arange(10) % 5
    for given in (list(labels), list(labels.numpy()), tuple(labels.tolist())):
        predictor = network.adapt(images, given)
        assert predictor.classes == [0, 1, 2, 3, 4]
        assert predictor.probabilities(images).shape == (10, 5)
    with pytest.raises(MamlError, match=r"y has shape \(10, 1\), but each of the 10 inputs needs a label.*argmax"):
        network.adapt(images, labels.unsqueeze(1))
    with pytest.raises(MamlError, match=r"y has the label \[0\]; give one label for each input"):
        network.adapt(images, labels.unsqueeze(1).tolist())


def test_predictor_does_not_follow_later_changes_of_the_examples(tiny: TinyRuns) -> None:
    network = maml.load(tiny.run("model.normalization=batch"))
    examples = torch.linspace(-1, 1, 10).unsqueeze(1)
    predictor = network.adapt(examples, examples.sin())
    before = predictor([[0.5]])
    examples.fill_(7)
    assert torch.equal(predictor([[0.5]]), before)


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
        (images, None, "y is None, but each of the 5 inputs needs a label"),
        ("abc", list("abcde"), "x is no array of numbers"),
        ([[0.0], [0.0, 1.0]], list("ab"), "x is no array of numbers"),
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
    for num_steps in (-1, 1.5, "2"):
        with pytest.raises(MamlError, match=r"num_steps=.* is no number of gradient steps; give an integer"):
            points.adapt(np.zeros((3, 1)), np.zeros((3, 1)), num_steps=num_steps)  # type: ignore[arg-type]
    points.adapt(np.zeros((3, 1)), np.zeros((3, 1)), num_steps=np.int64(2))  # type: ignore[arg-type]


class PointSequence(FixedExamples):
    """Sequences of labelled points in the plane, a domain as a user can write it."""

    measured_by = "showing"
    element_domain = FixedExamples((2,), classes=True)

    def __init__(self) -> None:
        super().__init__((4, 2 + self.element_domain.out_dim), classes=True)

    def join(self, elements: Tensor, labels: Tensor) -> Tensor:
        shown = F.one_hot(labels, self.out_dim).to(elements.dtype)
        return torch.cat([elements, F.pad(shown, (0, 0, 1, 0))], dim=2)


def test_network_of_an_own_domain_of_sequences_reads_its_elements() -> None:
    config = compose_experiment("omniglot_sequence_lstm")
    algorithm = build_algorithm(config, Hardware("cpu"), PointSequence())
    network = Network("own", 0, 0, algorithm, build(config.evaluation), {})
    assert network.in_shape == (2,)
    points = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.5, 1.0], [1.0, 0.5]])
    found = network.adapt(points[:3], ["up", "right", "up"]).probabilities(points[3:])
    x = torch.tensor([[0, 1, 0, 0], [1, 0, 1, 0], [0.5, 1, 0, 1], [1, 0.5, 1, 0]])
    x = F.pad(x, (0, algorithm.domain.out_dim - 2)).reshape(1, 1, 4, -1)
    torch.testing.assert_close(found, algorithm.model(algorithm.params_per_task(1), x)[0, :, :2].softmax(-1))


def test_values_of_a_network_with_batch_normalisation_do_not_depend_on_other_inputs() -> None:
    settings = compose_experiment(OMNIGLOT)
    images = FixedExamples((28, 28, 1), classes=False)
    algorithm = build_algorithm(settings, Hardware("cpu"), images)
    network = Network("own", 0, 0, algorithm, build(settings.evaluation), {})
    x, y = Stream(0).uniform((6, 28, 28, 1)), Stream(1).uniform((4, 1))
    predictor = network.adapt(x[:4], y)
    both, alone = predictor(x[4:6]), predictor(x[4:5])
    torch.testing.assert_close(both[:1], alone)
    assert not torch.allclose(predictor(x[4:6], transductive=True)[:1], alone, rtol=1e-2)
    with pytest.raises(MamlError, match=r"FixedExamples does not say how a picture becomes its input"):
        network.read([Image.new("L", (28, 28))])


def test_policy_is_shown_and_not_adapted_to_examples(tmp_path: Path) -> None:
    trained("point_navigation_maml", tmp_path, "evaluation.theta=best")
    (path,) = tmp_path.rglob("checkpoint.pt")
    network = maml.load(path.parent)
    assert same(network.theta, {name: network.algorithm.best[name] for name in network.theta})
    with pytest.raises(MamlError, match=r"scripts/render.py \+experiment=point_navigation_maml"):
        network.adapt([[0.0, 0.0]], [0])
    network = replace(network, experiment=CUSTOM)
    with pytest.raises(MamlError, match=r"run python scripts/render.py with the overrides of its training"):
        network.adapt([[0.0, 0.0]], [0])


def test_predictor_can_be_saved_and_predicts_the_same() -> None:
    predictor = maml.load("sinusoid_10shot").adapt([[0.1], [1.0], [2.0]], [[0.0], [0.5], [1.0]])
    file = io.BytesIO()
    torch.save(predictor, file)
    file.seek(0)
    for copied in (torch.load(file, weights_only=False), pickle.loads(pickle.dumps(predictor))):
        assert torch.equal(copied([[0.3], [4.0]]), predictor([[0.3], [4.0]]))


@pytest.mark.parametrize("experiment", [SINUSOID, "omniglot_5way_1shot_pixels"])
def test_saved_predictor_computes_where_torch_load_puts_it(experiment: str) -> None:
    network = maml.load(experiment)
    x, y = Stream(0).uniform((2, *network.in_shape)), [[0.0], [1.0]] if experiment == SINUSOID else [0, 1]
    predictor = network.adapt(x, y)
    expected = predictor.outputs(x)
    network.algorithm.stream.device = torch.device("cuda")  # as if its tensors were there, too
    file = io.BytesIO()
    torch.save(predictor, file)
    file.seek(0)
    moved = torch.load(file, weights_only=False, map_location="cpu")
    assert moved.network.device == torch.device("cpu")
    assert torch.equal(moved.outputs(x), expected)
    assert torch.equal(moved.network.adapt(x, y).outputs(x), expected)


def test_saved_network_computes_where_its_parameters_are() -> None:
    network = maml.load(SINUSOID)
    network.algorithm.stream.device = torch.device("cuda")
    assert pickle.loads(pickle.dumps(network)).device == torch.device("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_network_on_a_gpu_predicts_as_on_the_cpu() -> None:
    cpu, gpu = (maml.load("sinusoid_10shot", device=device) for device in ("cpu", "cuda"))
    x, y = [[0.1], [1.0], [2.0]], [[0.0], [0.5], [1.0]]
    assert torch.allclose(cpu.adapt(x, y)(x), gpu.adapt(x, y)(x).cpu(), atol=1e-4)


def test_sinusoid_network_learns_a_sinusoid() -> None:
    x = torch.linspace(-5, 5, 20).unsqueeze(1)
    y = 3 * torch.sin(x - 1)
    network = maml.load(SINUSOID)
    errors = [(network.adapt(x, y, num_steps)(x) - y).square().mean() for num_steps in (0, 1, 10)]
    assert errors[0] > errors[1] > errors[2]
    assert isinstance(network.algorithm.domain, Sinusoid)
