"""What methods that compare embeddings share: one theta for all tasks, normalisation, and whole runs."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import maml
from maml.algorithm.embedding import SUPPORT, Embedding
from maml.config.schema import build
from maml.errors import MamlError
from maml.experiment import build_algorithm, run_experiment
from maml.hardware.base import Execution
from maml.hardware.kernels import library, use_kernels
from maml.record.run_files import read_json
from maml.seeding import Stream
from maml.training.meta_gradient import MetaGradient
from maml.types import Params, Tasks
from tests import algorithms
from tests.hardware.test_distributed import Processes, assert_alike
from tests.model.test_conv4 import library_network, library_values
from tests.runs import TinyRuns, assert_same_run, before_iteration

pytestmark = pytest.mark.usefixtures("float64")

needs_compiler = pytest.mark.skipif(library() is None, reason="needs a C++ compiler")

METHODS = {
    "prototypical": ("algorithm=prototypical",),
    "matching": (
        "algorithm=matching",
        "algorithm.learn_temperature=true",
        "algorithm.context=state",
        "model.dropout=0.2",
    ),
    "siamese": ("algorithm=siamese",),
}
SMALL = (
    "model.num_filters=4",
    "model.pooling=max",
    "model.head=flatten",
    "model.head_std=null",
    "model.norm_scale=true",
    "domain.num_ways=6",
    "domain.num_query=2",
    "inner.step_size=0.1",
)


@pytest.fixture(params=[False, pytest.param(True, marks=needs_compiler)], ids=["plain", "kernels"])
def _kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    use_kernels(request.param)
    yield
    use_kernels(False)


def make(tiny_images: TinyRuns, method: str, *overrides: str, num_updates: int = 0) -> Any:
    """Builds a small network for Omniglot in float64, and trains it for some iterations of two tasks."""
    config = tiny_images.config(*METHODS[method], *SMALL, *overrides)
    algorithm = build_algorithm(config, build(config.hardware))
    assert isinstance(algorithm, Embedding)
    for iteration in range(num_updates):
        algorithms.step(algorithm, algorithm.sample_tasks(2, Stream(iteration)))
    return algorithm


def body_of(params: Params) -> nn.Sequential:
    """Returns PyTorch's network of one task without its last layer."""
    head = {"head.weight": torch.zeros(1, 4), "head.bias": torch.zeros(1)}
    own = {name: value for name, value in params.items() if name.startswith(("conv", "norm"))}
    net = library_network(own | head)
    net.head = nn.Identity()
    return net


def of_torch(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("method", METHODS)
def test_shared_weights_have_the_gradient_of_a_copy_for_each_task(
    method: str, tiny_images: TinyRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    algorithm = make(tiny_images, method, num_updates=1)
    tasks, params = algorithm.sample_tasks(4, Stream(3)), algorithm.theta | algorithm.buffers
    found = {}
    for shares in (True, False):
        monkeypatch.setattr(type(algorithm), "shares_weights", shares)
        for chunk in (None, 3):
            found[shares, chunk] = MetaGradient(algorithm, Execution(1, chunk, compile=False)).gradient(params, tasks)
    expected_gradient, expected_metrics = found.pop((False, None))
    for gradient, metrics in found.values():
        for name, value in expected_gradient.items():
            torch.testing.assert_close(gradient[name], value, rtol=1e-8, atol=1e-12, msg=name)
        for name, value in expected_metrics.items():
            torch.testing.assert_close(metrics[name], value, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("method", METHODS)
def test_two_seeds_at_once_have_the_gradients_of_each(method: str, tiny_images: TinyRuns) -> None:
    both = [make(tiny_images, method, f"seed={seed}", num_updates=1) for seed in (0, 1)]
    batches = [algorithm.sample_tasks(3, Stream(seed)) for seed, algorithm in enumerate(both)]
    alone = [
        algorithms.gradient(algorithm, algorithm.theta, tasks) for algorithm, tasks in zip(both, batches, strict=True)
    ]
    params = [algorithm.theta | algorithm.buffers for algorithm in both]
    stacked = {name: torch.stack([each[name] for each in params]) for name in params[0]}
    tasks = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    together = MetaGradient(both[0], Execution(1, 2, compile=False), num_seeds=2).gradient(stacked, tasks)
    for seed, (gradient, metrics) in enumerate(alone):
        for expected, found in ((gradient, together[0]), (metrics, together[1])):
            for name, value in expected.items():
                torch.testing.assert_close(found[name][seed], value, rtol=1e-8, atol=1e-12, msg=name)


@pytest.mark.usefixtures("_kernels")
def test_training_normalises_an_episode_as_one_batch_and_averages_its_statistics(tiny_images: TinyRuns) -> None:
    """PyTorch's network in training mode, on support and query images together, one episode after the other."""
    algorithm = make(tiny_images, "prototypical")
    assert not any(name.startswith("head.") for name in algorithm.theta)
    net = body_of(algorithm.theta | algorithm.buffers)
    for iteration in range(3):
        tasks = algorithm.sample_tasks(1, Stream(iteration))
        support, query = (algorithm.domain.data(tasks, role) for role in ("support", "query"))
        with torch.no_grad():
            for name, value in library_values(net, list(algorithm.theta)).items():
                value.copy_(algorithm.theta[name])
            features = net(of_torch(torch.cat([support.x[0], query.x[0]])))
        means, asked = features[:6], features[6:]
        scores = -torch.stack([torch.stack([(q - mean).square().sum() for mean in means]) for q in asked])
        loss = F.cross_entropy(scores, query.y[0])
        metrics = algorithms.step(algorithm, tasks)
        torch.testing.assert_close(metrics["loss"], loss, rtol=1e-9, atol=1e-12)
        assert set(metrics) == {"loss", "accuracy"}
        for name, value in library_values(net, list(algorithm.buffers)).items():
            torch.testing.assert_close(algorithm.buffers[name], value, rtol=1e-8, atol=1e-12)


def test_dropout_is_drawn_for_each_image_of_a_task_and_training_alone_drops(tiny_images: TinyRuns) -> None:
    algorithm = make(tiny_images, "matching")
    drawn, more, other = (algorithm.sample_tasks(count, Stream(seed)) for count, seed in ((2, 0), (3, 0), (2, 1)))
    kept = [name for name in drawn if name.startswith("dropout.")]
    assert [tuple(drawn[name].shape) for name in kept] == [
        (2, 6 * 1 + 6 * 2, size, size, 4) for size in (14, 7, 3, 1)
    ], "6 ways, 1 shot and 2 query images"
    assert drawn[kept[0]].double().mean() == pytest.approx(0.8, abs=0.01)
    for name in kept:
        assert torch.equal(drawn[name], more[name][:2])
        assert not torch.equal(drawn[name], other[name])
    assert not torch.equal(drawn[kept[0]][0], drawn[kept[0]][1])
    params = algorithm.params_per_task(2)
    losses = [
        algorithm.task_losses(params, tasks)[0] for tasks in (drawn, drawn | {name: other[name] for name in kept})
    ]
    assert not torch.allclose(*losses)
    assert not any(name.startswith("dropout.") for name in next(iter(algorithm.adapt(params, drawn, 0))))


@pytest.mark.parametrize("method", ["prototypical", "siamese"])
def test_prediction_of_an_image_depends_on_no_other(method: str, tiny_images: TinyRuns) -> None:
    algorithm = make(tiny_images, method, num_updates=2)
    tasks = algorithm.domain.sample_tasks(3, Stream(7), "test", 2, 3)
    (params,) = algorithm.adapt(algorithm.params_per_task(3), tasks, 0)
    query = algorithm.domain.data(tasks, "query")
    outputs = algorithm.model(params, query.x)
    alone = torch.cat([algorithm.model(params, image.unsqueeze(1)) for image in query.x.unbind(1)], dim=1)
    torch.testing.assert_close(outputs, alone, rtol=1e-9, atol=1e-10)
    net = body_of(algorithm.theta | algorithm.buffers).eval()
    for task in range(3):
        features = net(of_torch(algorithm.domain.data(tasks, "support").x[task]))
        torch.testing.assert_close(params[SUPPORT][task], features.reshape(2, 6, -1), rtol=1e-8, atol=1e-10)
    measured = algorithm.measure(params, tasks, 0)
    assert torch.equal(measured["accuracy_transductive"], measured["accuracy_inductive"])


def test_model_without_running_statistics_has_two_accuracies(tiny_images: TinyRuns) -> None:
    module = ("model=module", "model.module._target_=tests.algorithm.test_embedding.SmallNet")
    config = tiny_images.on_domain("sinusoid").config(
        "domain=omniglot", "evaluation=accuracy", *module, *METHODS["prototypical"], "domain.num_ways=5"
    )
    algorithm = build_algorithm(config, build(config.hardware))
    assert not algorithm.buffers and set(algorithm.theta) == {"conv.weight", "conv.bias", "norm.weight", "norm.bias"}
    algorithms.step(algorithm, algorithm.sample_tasks(2, Stream(0)))
    tasks = algorithm.domain.sample_tasks(2, Stream(7), "test", 1, 15)
    (params,) = algorithm.adapt(algorithm.params_per_task(2), tasks, 0)
    query, support = algorithm.domain.data(tasks, "query"), algorithm.domain.data(tasks, "support")
    both = algorithm.model(params, torch.cat([support.x, query.x], 1), num_reference=5)[:, 5:]
    assert (both - algorithm.model(params, query.x)).abs().max() > 1e-3
    assert set(algorithm.measure(params, tasks, 0)) == {"accuracy_transductive", "accuracy_inductive"}


class SmallNet(nn.Module):
    """A convolution with batch normalisation, and a last layer."""

    def __init__(self, out_dim: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 5, stride=5), nn.BatchNorm2d(2)
        self.head = nn.Linear(50, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().flatten(1))


@pytest.mark.parametrize("method", METHODS)
def test_ways_of_meta_test_differ_from_those_of_training(method: str, tiny_images: TinyRuns) -> None:
    """Trained with 6 classes; the test has 3 and 9."""
    algorithm = make(tiny_images, method, num_updates=1)
    for ways in (3, 9):
        tasks = algorithm.domain.with_ways(ways).sample_tasks(2, Stream(7), "test", 2, 2)
        (params,) = algorithm.adapt(algorithm.params_per_task(2), tasks, 0)
        assert algorithm.model(params, algorithm.domain.data(tasks, "query").x).shape == (2, 2 * ways, ways)
        assert params[SUPPORT].shape == (2, 2, ways, 4)


@pytest.mark.parametrize("method", METHODS)
def test_network_that_sees_nothing_is_right_by_chance_alone(method: str, tiny_images: TinyRuns) -> None:
    """All scores tie. Counting ties as right, or the right class always first, would give an accuracy of 1."""
    algorithm = make(tiny_images, method)
    for name, value in algorithm.theta.items():
        if name.startswith("conv"):
            value.zero_()
    tasks = algorithm.domain.sample_tasks(4, Stream(7), "test", 1, 3)
    (params,) = algorithm.adapt(algorithm.params_per_task(4), tasks, 0)
    for name, value in algorithm.measure(params, tasks, 0).items():
        torch.testing.assert_close(value, torch.full((4,), 1 / 6), msg=name)


def fine_tuned(theta: Params, buffers: Params, support: Any, loss: Callable[..., Tensor], step_size: float) -> Params:
    """Takes one gradient step on the support images of one task, with PyTorch's network; returns what changes."""
    net = body_of(theta | buffers).eval()
    rest = {name: value.clone().requires_grad_() for name, value in theta.items() if name.startswith("comparison")}
    loss(net(of_torch(support.x[0])), rest).backward()
    values = library_values(net, [name for name in theta if name not in rest]) | rest
    assert all(value.grad is not None for value in values.values())
    return {
        name: value.detach() - step_size * value.grad  # type: ignore[operator]
        for name, value in values.items()
        if not name.endswith(".shift")
    }


def test_fine_tuning_descends_the_loss_of_the_support_images(tiny_images: TinyRuns) -> None:
    algorithm = make(tiny_images, "prototypical", num_updates=2)
    tasks = algorithm.domain.sample_tasks(1, Stream(7), "test", 2, 1)
    support = algorithm.domain.data(tasks, "support")

    def loss(features: Tensor, rest: Params) -> Tensor:
        means = features.reshape(2, 6, -1).mean(0)
        return F.cross_entropy(-torch.cdist(features, means).square(), support.y[0])

    before, after = algorithm.adapt(algorithm.params_per_task(1), tasks, 1, [0.5])
    expected = fine_tuned(algorithm.theta, algorithm.buffers, support, loss, 0.5)
    for name, value in expected.items():
        torch.testing.assert_close(after[name][0], value, rtol=1e-6, atol=1e-9, msg=name)
    assert all(torch.equal(before[name], after[name]) for name in algorithm.buffers)
    assert not torch.equal(before[SUPPORT], after[SUPPORT])


def test_parts_that_do_not_fit_are_refused(tiny: TinyRuns, tiny_images: TinyRuns) -> None:
    policy = ("domain=omniglot", "domain.num_ways=6", "model=gaussian_policy")  # a model without features
    for config, reason in (
        (tiny.config("algorithm=prototypical"), "compares images with those of other classes: choose domain="),
        (tiny_images.on_domain("sinusoid").config("algorithm=prototypical", *policy), "has no features"),
        (
            tiny_images.config("algorithm=siamese", "inner=learned_sgd", "inner.num_steps=1"),
            "does not differentiate through adaptation",
        ),
        (
            tiny_images.config("algorithm=siamese", "inner.num_steps=1"),
            r"inner\.num_steps=1, but Siamese adapts nothing in training; set it to 0",
        ),
        (
            tiny_images.config("algorithm=context_vector", "model.dropout=0.1"),
            r"model\.dropout=0\.1, but ContextVector drops no values .* set it to 0, or",
        ),
        (tiny_images.config("model.dropout=0.1"), r"model\.dropout=0\.1, but MAML drops no values .* set it to 0, or"),
    ):
        with pytest.raises(MamlError, match=reason):
            build_algorithm(config, build(config.hardware))


RUN = ("num_iterations=10", "evaluation.num_ways=4", "evaluation.num_query=2", "precision=float64")


def run_of(tiny_images: TinyRuns, method: str, *overrides: str) -> tuple[str, ...]:
    return (*METHODS[method], *SMALL, *RUN, *overrides)


@pytest.mark.parametrize("method", ["matching", "siamese"])
def test_interrupted_run_resumes_with_the_same_bits(
    method: str, tiny_images: TinyRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = run_of(tiny_images, method)
    whole = tiny_images.run(*overrides)
    parts = tiny_images.in_folder("parts")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        before_iteration(patch, 9, lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        parts.run(*overrides)
    assert_same_run(whole, parts.run(*overrides))


def test_seeds_together_and_processes_give_the_numbers_of_one_run(tiny_images: TinyRuns) -> None:
    overrides = run_of(tiny_images, "matching")
    alone = tiny_images.run(*overrides)
    together = tiny_images.in_folder("together")
    run_experiment(together.config(*overrides, "seeds=2"), "custom")
    assert_alike(alone, together.folder(*overrides))
    shared = tiny_images.in_folder("shared")
    assert Processes(shared.config(*overrides), 2).join() == [0, 0]
    assert_alike(alone, shared.folder(*overrides))


@pytest.mark.parametrize("method", METHODS)
def test_trained_network_predicts_for_own_images_what_meta_test_measures(method: str, tiny_images: TinyRuns) -> None:
    """A run, its evaluation again with fine-tuning, and its network on the images of a task of meta-test."""
    overrides = run_of(tiny_images, method, "evaluation.num_steps=0", "num_iterations=3")
    folder = tiny_images.run(*overrides)
    report = read_json(folder / "report.json")
    assert report is not None and len(report["curves"][0]["steps"]) == 1
    tuned = run_of(tiny_images, method, "evaluation.num_steps=2", "num_iterations=3", "mode=eval")
    run_experiment(tiny_images.config(*tuned), "custom")
    (other,) = (read_json(path) for path in folder.glob("evaluations/*/report.json"))
    assert other is not None and len(other["curves"][0]["steps"]) == 3
    assert other["curves"][0]["steps"][0] == pytest.approx(report["curves"][0]["steps"][0], rel=1e-12)
    compare_with_predictor(folder)


def compare_with_predictor(folder: Path) -> None:
    network = maml.load(folder)
    algorithm = network.algorithm
    images = Stream(1).uniform((8, 28, 28, 1))
    labels = list("abcdabcd")  # four classes, with two examples each; six in training
    predictor = network.adapt(images, labels)
    asked = Stream(2).uniform((3, 28, 28, 1))
    expected = algorithm.model(predictor.params, asked.unsqueeze(0))[0]
    torch.testing.assert_close(predictor.outputs(asked), expected, rtol=1e-9, atol=1e-10)
    assert predictor(asked) == [labels[best] for best in expected.argmax(-1).tolist()]
    assert torch.equal(pickle.loads(pickle.dumps(predictor)).outputs(asked), predictor.outputs(asked))
    shuffled: Tasks = {"order": torch.tensor([5, 0, 3, 6, 1, 2, 7, 4])}
    again = network.adapt(images[shuffled["order"]], [labels[i] for i in shuffled["order"].tolist()])
    if algorithm.name != "Matching":  # with context, the order of the support images matters
        assert again(asked) == predictor(asked)


def test_meta_test_embeds_once_where_both_accuracies_are_one(
    tiny_images: TinyRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    algorithm = make(tiny_images, "prototypical")
    tasks = algorithm.domain.sample_tasks(2, Stream(0), "test")
    *_, adapted = algorithm.adapt(algorithm.params_per_task(2), tasks, 0)
    calls = []
    features = algorithm.network.features

    def counted(*given: Any) -> Tensor:
        calls.append(given)
        return features(*given)

    monkeypatch.setattr(algorithm.network, "features", counted)
    metrics = algorithm.measure(adapted, tasks, 0)
    assert len(calls) == 1
    assert torch.equal(metrics["accuracy_transductive"], metrics["accuracy_inductive"])
