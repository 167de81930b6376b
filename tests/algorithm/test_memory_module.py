"""The memory module: its streams, its updates against a plain loop, meta-test, and whole runs."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import maml
from maml.algorithm.key_value_memory import EMPTY, Memory
from maml.algorithm.memory_module import MemoryModule
from maml.config.schema import build
from maml.errors import MamlError
from maml.experiment import build_algorithm, run_experiment
from maml.pictures import Lines
from maml.record.run_files import read_json
from maml.seeding import Stream
from maml.training.autotune import tune_execution
from maml.training.iteration import Iteration, check_parallelism
from maml.types import Params, Tasks
from tests import algorithms, plain_adam
from tests.algorithm.test_key_value_memory import unit
from tests.runs import TinyRuns, assert_same_run, before_iteration, checkpoint_tensors

WAYS, SHOTS, QUERY = 3, 2, 1
LENGTH = WAYS * (SHOTS + QUERY)
SMALL = (
    "algorithm=memory_module",
    "algorithm.num_slots=40",
    "algorithm.num_neighbors=10",
    "model=conv_pairs",
    "model.num_filters=2",
    "model.rep_dim=12",
    "algorithm.dropout=0.6",
    f"domain.num_ways={WAYS}",
    f"domain.num_shots={SHOTS}",
    f"domain.num_query={QUERY}",
    "outer.step_size=0.01",
    "outer.eps=1e-4",
    "outer.clip_norm=0.5",
    "evaluation.num_steps=0",
)


@pytest.fixture(autouse=True)
def _small_picture(float64: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Computes in float64, and draws a small picture after each run."""
    monkeypatch.setattr("maml.algorithm.memory_module._NUM_IMAGES", 10 * WAYS)


def config_of(tiny_images: TinyRuns, *overrides: str) -> Any:
    base = ("domain=omniglot", "evaluation=accuracy", "num_iterations=10", "meta_batch_size=3", "precision=float64")
    return tiny_images.on_domain("sinusoid").config(*base, "evaluation.num_shots=null", *SMALL, *overrides)


def make(tiny_images: TinyRuns, *overrides: str) -> MemoryModule:
    config = config_of(tiny_images, *overrides)
    algorithm = build_algorithm(config, build(config.hardware))
    assert isinstance(algorithm, MemoryModule)
    return algorithm


def test_every_class_is_shown_once_before_any_is_shown_twice(tiny_images: TinyRuns) -> None:
    algorithm = make(tiny_images, "domain.rotations=task", "algorithm.age_noise=3")
    drawn, tasks = algorithm.domain.sample_tasks(3, Stream(5)), algorithm.sample_tasks(3, Stream(5))
    assert all(len(value) == LENGTH for value in tasks.values())
    orders = set()
    for episode in range(3):
        labels = tasks["labels"][:, episode].tolist()
        for start in range(0, LENGTH, WAYS):
            shown = labels[start : start + WAYS]
            assert sorted(shown) == [episode * WAYS + way for way in range(WAYS)]
            orders.add(tuple(label - episode * WAYS for label in shown))
        images = torch.cat([drawn["support_images"], drawn["query_images"]], 2)[episode]
        for way in range(WAYS):
            times = [time for time, label in enumerate(labels) if label == episode * WAYS + way]
            assert tasks["support_images"][times, episode, 0].tolist() == images[way].tolist()
            for name in ("classes", "rotations"):
                assert tasks[name][times, episode].unique().tolist() == [drawn[name][episode, way].item()]
    assert len(orders) > 2, "the order within a round is random"
    assert 0.25 < tasks["kept"].double().mean() < 0.55
    assert 2 < tasks["age_noise"].abs().max() <= 3
    again, other = algorithm.sample_tasks(3, Stream(5)), algorithm.sample_tasks(3, Stream(6))
    assert all(torch.equal(tasks[name], again[name]) for name in tasks)
    assert not any(torch.equal(tasks[name], other[name]) for name in tasks if name != "labels")


def features_of(params: Params, x: Tensor) -> Tensor:
    """The network of PyTorch's functions, for images ``(B, H, W, C)``."""
    x = x.permute(0, 3, 1, 2)
    for i in range(1, 5):
        x = F.conv2d(x, params[f"conv{i}.weight"], params[f"conv{i}.bias"], padding=1).relu()
        x = F.max_pool2d(x, 2) if i % 2 == 0 else x
    return x.permute(0, 2, 3, 1).flatten(1) @ params["representation.weight"].T + params["representation.bias"]


@pytest.mark.parametrize("clear", [True, False])
def test_iterations_are_one_update_for_each_time_step(clear: bool, tiny_images: TinyRuns) -> None:
    """Two iterations against a loop over time, with autograd on all similarities and Adam from its formula."""
    algorithm = make(tiny_images, f"algorithm.clear={str(clear).lower()}")
    theta = {name: value.clone() for name, value in algorithm.theta.items()}
    state, clipped, expected = dict.fromkeys(theta, plain_adam.NEW), 0, []
    memory = Memory.empty(1, 40, 12, torch.device("cpu"))
    for iteration in range(2):
        tasks = algorithm.sample_tasks(3, Stream(iteration))
        if clear:
            memory = Memory.empty(1, 40, 12, torch.device("cpu"))
        losses, accuracies = [], []
        for step in range(LENGTH):
            now = {name: value[step : step + 1] for name, value in tasks.items()}
            labels = now["labels"][0] + (0 if clear else iteration * 3 * WAYS)
            x, kept = algorithm.domain.data(now, "support").x[0], now["kept"][0]
            params = {name: value.clone().requires_grad_() for name, value in theta.items()}
            dropped = features_of(params, x) * kept / 0.4  # scaling changes nothing
            queries = unit(dropped @ params["comparison.projection"].T)
            image_losses = []
            for query, label in zip(queries, labels.tolist(), strict=True):
                products = memory.keys[0] @ query
                near = products.topk(10).indices.tolist()
                values, ages = memory.values[0].tolist(), memory.ages[0].tolist()
                accuracies.append(float(values[near[0]] == label))
                own = [slot for slot in range(40) if values[slot] == label]
                last = [min(own, key=ages.__getitem__)] if own else []
                right = [products[slot] for slot in [*near, *last] if values[slot] == label]
                wrong = [products[slot] for slot in near if values[slot] != label]
                zero = torch.zeros(())
                excess = max(wrong, default=zero) - max(right, default=zero) + 0.1
                image_losses.append(max(excess, zero) - 0.1)
            loss = torch.stack(image_losses).mean()
            losses.append(loss.item())
            gradients = dict(
                zip(theta, torch.autograd.grad(loss, list(params.values()), allow_unused=True), strict=True)
            )
            if any(gradient is None for gradient in gradients.values()):  # the first step: there is no key yet
                gradients = {name: torch.zeros_like(value) for name, value in theta.items()}
            norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients.values()))
            clipped += norm > 0.5
            for name, gradient in gradients.items():
                scaled = gradient * min(1.0, 0.5 / max(norm, 1e-300))
                theta[name], state[name] = plain_adam.step(theta[name], scaled, state[name], 0.01, eps=1e-4)
            memory.write(queries.detach()[None], labels[None], now["age_noise"])
        metrics = algorithms.step(algorithm, tasks)
        assert set(metrics) == {"loss", "accuracy"}
        assert metrics["loss"].item() == pytest.approx(sum(losses) / LENGTH, rel=1e-9)
        query_images = accuracies[-3 * WAYS * QUERY :]
        assert metrics["accuracy"].item() == pytest.approx(sum(query_images) / len(query_images))
        expected.append(metrics["loss"].item())
    assert clipped and expected[0] != expected[1]
    for name, value in theta.items():
        torch.testing.assert_close(algorithm.theta[name], value, rtol=1e-7, atol=1e-9, msg=name)
    assert algorithm.outer_state["step"] == 2 * LENGTH
    if clear:
        assert not algorithm.buffers
        return
    assert algorithm.buffers.pop("memory.num_labels") == 2 * 3 * WAYS
    for name, value in memory._asdict().items():
        torch.testing.assert_close(algorithm.buffers[f"memory.{name}"], value[0], rtol=1e-7, atol=1e-9)
    assert algorithm.buffers["memory.values"].max() >= 3 * WAYS


class Slow:
    """The memory of one task as a list of keys and labels."""

    def __init__(self, theta: Params) -> None:
        self.theta, self.keys, self.labels, self.num_moved = theta, list[Tensor](), list[int](), 0

    def project(self, x: Tensor) -> Tensor:
        return unit(features_of(self.theta, x) @ self.theta["comparison.projection"].T)

    def nearest(self, query: Tensor) -> int:
        return max(range(len(self.keys)), key=lambda i: float(self.keys[i] @ query), default=-1)

    def answer(self, query: Tensor) -> int:
        return self.labels[self.nearest(query)] if self.keys else EMPTY

    def write(self, image: Tensor, label: int) -> None:
        if self.answer(image) == label:
            slot = self.nearest(image)
            self.keys[slot] = unit(self.keys[slot] + image)
            self.num_moved += 1
        else:
            self.keys.append(image)
            self.labels.append(label)


@pytest.mark.parametrize("ways", [2, 5])
def test_meta_test_writes_the_support_images_one_after_the_other(ways: int, tiny_images: TinyRuns) -> None:
    """Other ways and shots than in training. Images of a class are much alike, so that keys move."""
    algorithm = make(tiny_images)
    algorithms.step(algorithm, algorithm.sample_tasks(3, Stream(0)))
    tasks = algorithm.domain.with_ways(ways).sample_tasks(3, Stream(7), "test", 4, 3)
    (params,) = algorithm.adapt(algorithm.params_per_task(3), tasks, 0)
    support, query = algorithm.domain.data(tasks, "support"), algorithm.domain.data(tasks, "query")
    outputs = algorithm.model(params, query.x)
    num_moved = 0
    for task in range(3):
        memory = Slow(algorithm.theta)
        for image, label in zip(memory.project(support.x[task]), support.y[task].tolist(), strict=True):
            memory.write(image, label)
        num_moved += memory.num_moved
        queries = memory.project(query.x[task])
        assert outputs[task].argmax(1).tolist() == [memory.answer(image) for image in queries]
        for name in range(ways):
            keys = torch.stack([key for key, label in zip(memory.keys, memory.labels, strict=True) if label == name])
            torch.testing.assert_close(outputs[task, :, name], (queries @ keys.T).amax(1))
    assert num_moved
    measured = algorithm.measure(params, tasks, 0)
    assert torch.equal(measured["accuracy_transductive"], measured["accuracy_inductive"])
    alone = torch.cat([algorithm.model(params, image.unsqueeze(1)) for image in query.x.unbind(1)], dim=1)
    torch.testing.assert_close(outputs, alone)


def test_any_network_with_features_has_a_memory(tiny_images: TinyRuns) -> None:
    """A network with normalisation: meta-test has running statistics, which every step updates."""
    overrides = [override for override in SMALL if not override.startswith("model")]
    config = tiny_images.config(*overrides, "meta_batch_size=3", "precision=float64", "model.num_filters=4")
    algorithm = build_algorithm(config, build(config.hardware))
    assert algorithm.theta["comparison.projection"].shape == (4, 4)
    before = {name: value.clone() for name, value in algorithm.buffers.items()}
    algorithms.step(algorithm, algorithm.sample_tasks(3, Stream(0)))
    assert before.keys() == {f"norm{i}.{name}" for i in range(1, 5) for name in ("mean", "variance")}
    assert not any(torch.equal(value, before[name]) for name, value in algorithm.buffers.items())
    tasks = algorithm.domain.sample_tasks(2, Stream(7), "test", 2, 3)
    (params,) = algorithm.adapt(algorithm.params_per_task(2), tasks, 0)
    assert algorithm.measure(params, tasks, 0)["accuracy_inductive"].shape == (2,)


def test_fine_tuning_descends_the_margin_loss(tiny_images: TinyRuns) -> None:
    algorithm = make(tiny_images)
    tasks = algorithm.domain.sample_tasks(2, Stream(7), "test", 3, 1)
    before, after = algorithm.adapt(algorithm.params_per_task(2), tasks, 1, [0.0001])
    support = algorithm.domain.data(tasks, "support")
    losses = []
    for params in (before, after):
        features = algorithm.network.features(params, support.x)
        losses.append(algorithm.loss(params, features.unflatten(1, (3, -1)), features, support.y)[0])
    assert (losses[1] < losses[0]).all()


def test_kept_memory_gives_every_class_a_label_of_its_own(tiny_images: TinyRuns) -> None:
    algorithm = make(tiny_images, "algorithm.clear=false")
    for iteration in range(4):
        algorithms.step(algorithm, algorithm.sample_tasks(3, Stream(iteration)))
    values = algorithm.buffers["memory.values"]
    assert EMPTY not in values.tolist(), "40 slots are full after 108 images"
    assert values.max() < 36 and (values < 27).any() and (values >= 27).any()


@pytest.mark.parametrize("clear", ["true", "false"])
def test_interrupted_run_resumes_with_the_same_bits(
    clear: str, tiny_images: TinyRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was stopped in the fourth iteration, after a checkpoint of the second."""
    runs, parts = (tiny_images.in_folder(name) for name in ("whole", "parts"))
    few = ("num_iterations=4", "checkpoint_every=2", f"algorithm.clear={clear}")
    configs = [config_of(each, *few) for each in (runs, parts)]
    run_experiment(configs[0], "custom")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        before_iteration(patch, 4, lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        run_experiment(configs[1], "custom")
    run_experiment(configs[1], "custom")
    whole, resumed = (next((each.runs_dir / "custom").iterdir()) for each in (runs, parts))
    assert_same_run(whole, resumed)
    assert ("buffers.memory.keys" in checkpoint_tensors(whole)) == (clear == "false")


def test_loaded_network_and_picture_of_a_run(tiny_images: TinyRuns) -> None:
    config = config_of(tiny_images, "num_iterations=2")
    run_experiment(config, "custom")
    folder: Path = next((tiny_images.runs_dir / "custom").iterdir())
    assert read_json(folder / "report.json")
    assert (folder / "picture_accuracy_by_showing.png").exists()
    network = maml.load(folder)
    images, asked = Stream(1).uniform((8, 28, 28, 1)), Stream(2).uniform((3, 28, 28, 1))
    predictor = network.adapt(images, list("abcdabcd"))  # four classes; three in training
    expected = network.algorithm.model(predictor.params, asked.unsqueeze(0))[0]
    assert predictor(asked) == ["abcd"[best] for best in expected.argmax(-1).tolist()]
    assert torch.equal(pickle.loads(pickle.dumps(predictor)).outputs(asked), predictor.outputs(asked))


def test_stream_of_classes_is_answered_before_it_is_written(tiny_images: TinyRuns) -> None:
    algorithm = make(tiny_images)
    tasks = algorithm.domain.sample_tasks(2, Stream(0), "test")
    picture = algorithm.pictures(algorithm.params_per_task(2), tasks, 0)["accuracy_by_showing"]
    assert isinstance(picture, Lines)
    (values,) = picture.lines.values()
    assert len(values) == 10 and values[0] == 0, "an image of a new class cannot be answered"
    drawn = algorithm.domain.sample_tasks(1, Stream(0).child("showings"), "test", 9, 1)
    memory, right = Slow(algorithm.theta), []
    x = torch.cat([algorithm.domain.data(drawn, role).x[0] for role in ("support", "query")])
    for i, image in enumerate(memory.project(x)):
        right.append(float(memory.answer(image) == i % WAYS))
        memory.write(image, i % WAYS)
    assert values == pytest.approx(torch.tensor(right).view(10, WAYS).mean(1).tolist())
    few: Tasks = {**tasks, "classes": tasks["classes"][:, :1].expand(-1, 2000)}
    assert algorithm.pictures(algorithm.params_per_task(2), few, 0) == {}, "there are no 2,000 test classes"


def test_settings_that_do_not_fit_are_refused(tiny_images: TinyRuns) -> None:
    with pytest.raises(MamlError, match=r"algorithm\.num_neighbors=10 slots .* algorithm\.num_slots=9; lower"):
        make(tiny_images, "algorithm.num_slots=9")
    conv4 = [override for override in SMALL if not override.startswith("model")]
    dropping = tiny_images.config(*conv4, "model.dropout=0.2")
    with pytest.raises(MamlError, match=r"model\.dropout=0\.2, but MemoryModule drops no values of the network"):
        build_algorithm(dropping, build(dropping.hardware))
    with pytest.raises(MamlError, match=r"makes an update after every image .* set outer\.schedule=null"):
        make(tiny_images, "outer=adam_cosine")
    algorithm = make(tiny_images)
    reason = r"algorithm\.num_slots=40 is less than the 45 images of a meta-batch, meta_batch_size=5 episodes of 9"
    with pytest.raises(MamlError, match=reason):
        algorithm.sample_tasks(5, Stream(0))
    with pytest.raises(MamlError, match=r"seeds=2: MemoryModule cannot train several seeds as one computation"):
        check_parallelism(algorithm, 2, 3)
    config = config_of(tiny_images, "algorithm.num_slots=10")
    with pytest.raises(MamlError, match=r"algorithm\.num_slots=10 is less than the 27 images"):
        run_experiment(config, "custom")
    assert not tiny_images.runs_dir.exists()


def test_chunks_of_time_steps_are_not_measured(tiny_images: TinyRuns) -> None:
    config = config_of(tiny_images, "num_iterations=1000")
    hardware = build(config.hardware)
    algorithm = build_algorithm(config, hardware)
    execution = hardware.choose(algorithm.domain.workload, 1000, {})
    iterate = Iteration([algorithm], [Stream(0)], 3, execution)
    assert tune_execution(iterate, execution, hardware, config) is execution
