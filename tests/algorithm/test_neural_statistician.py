"""The neural statistician: its bound against loops and integrals, its draws, its predictions, and whole runs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Normal, kl_divergence

from maml.algorithm.embedding import SUPPORT
from maml.algorithm.neural_statistician import NeuralStatistician, dilate
from maml.config.schema import build
from maml.data.cache import ImageSet
from maml.domain.classification import FewShotClassification, Splits
from maml.errors import MamlError
from maml.experiment import build_algorithm, run_experiment
from maml.hardware.base import Execution
from maml.inner.sgd import SGD
from maml.model.conv4 import Conv4
from maml.model.statistician import Statistician
from maml.pictures import Images
from maml.seeding import Stream
from maml.training.meta_gradient import MetaGradient
from maml.types import Tasks
from tests import algorithms
from tests.algorithm.test_embedding import compare_with_predictor
from tests.hardware.test_distributed import Processes, assert_alike
from tests.model.test_statistician import PlainStatistician, with_noise
from tests.runs import TinyRuns, assert_same_run, before_iteration

pytestmark = pytest.mark.usefixtures("float64")

SMALL = {"num_filters": 2, "context_size": 3, "latent_size": 2, "hidden_size": 4}


class Stamps(FewShotClassification):
    """Tiny images of random pixels, from white to black, in a few shades."""

    in_shape = (5, 4, 1)
    scale = 4.0
    num_train_classes = 12

    def load(self, data_dir: Path, cache_dir: Path) -> tuple[ImageSet, Splits]:
        pixels = Stream(5).integers((20, 8, *self.in_shape[:2]), 5).to(torch.uint8)
        return ImageSet(pixels, [], ""), {"train": torch.arange(12), "test": torch.arange(12, 20)}


class ColouredStamps(Stamps):
    in_shape = (5, 4, 3)

    def load(self, data_dir: Path, cache_dir: Path) -> tuple[ImageSet, Splits]:
        return ImageSet(torch.zeros(20, 8, *self.in_shape, dtype=torch.uint8), [], ""), {"train": torch.arange(20)}


def stamps(cls: type[Stamps] = Stamps, num_ways: int = 3, num_shots: int = 4) -> Stamps:
    return cls(num_ways=num_ways, num_shots=num_shots, num_query=1, data_dir="data", cache_dir="cache")


def make(
    domain: FewShotClassification | None = None,
    sizes: dict[str, int] | None = None,
    num_updates: int = 0,
    **options: Any,
) -> NeuralStatistician:
    """Builds a small statistician on stamps, with noise on all parameters, and trains it for some iterations."""
    domain = domain or stamps()
    model = Statistician(domain.in_shape, domain.out_dim, **(sizes or SMALL))
    algorithm = algorithms.build_from(NeuralStatistician, domain, model, SGD(0.1, 0, order=1, adapt=["*"]), **options)
    algorithm.theta = with_noise(algorithm.theta)
    for iteration in range(num_updates):
        algorithms.step(algorithm, algorithm.sample_tasks(2, Stream(iteration)))
    return algorithm


def loop_loss(net: PlainStatistician, sizes: list[tuple[int, int]], tasks: Tasks, task: int) -> dict[str, Tensor]:
    """Returns the terms of one task, from a loop over its sets and images."""
    x, pooled = tasks["sets"][task], tasks["is_pooled"][task]
    shots, ways = pooled.shape
    images = x.permute(0, 3, 1, 2)  # K blocks with one image of each set
    codes = net.encode(images)
    embedded = net.embed(codes)
    seen = [torch.stack([embedded[k * ways + n] for k in range(shots) if pooled[k, n]]) for n in range(ways)]
    contexts = net.context(seen)
    c = torch.stack([q.mean + q.stddev * tasks["context_noise"][task, n] for n, q in enumerate(contexts)])
    spread = torch.stack([c[number % ways] for number in range(shots * ways)])
    posteriors, priors = net.posterior(codes, spread), net.prior(c)
    z = torch.stack([q.mean + q.stddev * tasks["latent_noise"][task, i] for i, q in enumerate(posteriors)])
    logits = net.decode(z, spread, sizes)
    reconstruction, kl_context, kl_latent = torch.zeros(()), torch.zeros(()), torch.zeros(())
    for n in range(ways):
        standard = Normal(torch.zeros(c.shape[1]), torch.ones(c.shape[1]))
        kl_context = kl_context + kl_divergence(contexts[n], standard).sum()
        for k in range(shots):
            number = k * ways + n
            reconstruction = reconstruction - Bernoulli(logits=logits[number]).log_prob(images[number]).sum()
            kl_latent = kl_latent + kl_divergence(posteriors[number], priors[n]).sum()
    count = shots * ways
    return {
        "reconstruction": reconstruction / count,
        "kl_context": kl_context / count,
        "kl_latent": kl_latent / count,
    }


def test_loss_gradient_and_statistics_equal_the_loop_over_sets_and_images() -> None:
    algorithm = make(num_updates=2)
    assert not any(name.startswith("head") for name in algorithm.theta)
    tasks = algorithm.sample_tasks(2, Stream(3))
    theta = {name: value.clone().requires_grad_() for name, value in algorithm.theta.items()}
    expected: dict[str, list[Tensor]] = {}
    for task in range(2):
        net = PlainStatistician(theta)
        terms = loop_loss(net, algorithm.statistician.sizes, tasks, task)
        statistics = {}
        for layer, batch in net.batches.items():
            rows = batch.movedim(1, -1).flatten(0, -2)
            for name, value in (("mean", rows.mean(0)), ("variance", rows.var(0))):
                statistics[f"{layer}.{name}"] = 0.9 * algorithm.buffers[f"{layer}.{name}"] + 0.1 * value
        assert statistics.keys() == algorithm.buffers.keys()
        for name, value in ({"loss": sum(terms.values(), torch.zeros(()))} | terms | statistics).items():
            expected.setdefault(name, []).append(value)
    means = {name: torch.stack(values).mean(0) for name, values in expected.items()}
    slow = torch.autograd.grad(means["loss"], list(theta.values()), materialize_grads=True)
    gradient, metrics = algorithms.gradient(algorithm, algorithm.theta, tasks)
    assert metrics.keys() == means.keys()
    for name, value in means.items():
        torch.testing.assert_close(metrics[name], value.detach(), msg=name)
    for name, value in zip(theta, slow, strict=True):
        torch.testing.assert_close(gradient[name], value, rtol=1e-6, atol=1e-9, msg=name)


def test_terms_of_the_bound_are_the_integrals_in_one_dimension() -> None:
    """With running statistics the networks are fixed, so the terms are expectations over c and z of size 1."""
    sizes = {"num_filters": 1, "context_size": 1, "latent_size": 1, "hidden_size": 3}
    algorithm = make(stamps(num_ways=2, num_shots=2), sizes, num_updates=3)
    params = algorithm.theta | algorithm.buffers
    # The same tasks again and again, with the noise of a grid, whose points have the probabilities of a normal.
    grid = torch.linspace(-7, 7, 81)
    weights = Normal(0.0, 1.0).log_prob(grid).exp() * (grid[1] - grid[0])
    noise = torch.cartesian_prod(grid, grid)
    one = algorithm.sample_tasks(1, Stream(3))
    one["is_pooled"][:] = True
    tasks = {name: value.expand(len(noise), *value.shape[1:]) for name, value in one.items()}
    tasks["context_noise"] = noise[:, :1, None].expand(-1, 2, -1)
    tasks["latent_noise"] = noise[:, 1:, None].expand(-1, 4, -1)
    with torch.no_grad():
        terms = algorithm.terms({name: value.unsqueeze(0) for name, value in params.items()}, tasks)
    ours = {name: (value.view(81, 81) * weights[:, None] * weights).sum() for name, value in terms.items()}

    # Densities on a grid of c and z, for each set and each image.
    net, points = PlainStatistician(params), torch.linspace(-12, 12, 181)
    step, pairs = points[1] - points[0], torch.cartesian_prod(points, points)
    images = one["sets"][0].permute(0, 3, 1, 2)
    expected = dict.fromkeys(ours, 0.0)
    with torch.no_grad():
        codes, c = net.encode(images), points.unsqueeze(1)
        embedded = net.embed(codes)
        contexts = net.context([embedded[[n, n + 2]] for n in range(2)])
        prior = net.prior(c)
        log_prior = torch.stack([p.log_prob(points) for p in prior])  # (c, z)
        logits = net.decode(pairs[:, 1:], pairs[:, :1], algorithm.statistician.sizes)
        for n, context in enumerate(contexts):
            q = context.log_prob(points).exp()
            assert (q.sum() * step).item() == pytest.approx(1, abs=1e-6)
            p = Normal(0.0, 1.0).log_prob(points)
            expected["kl_context"] += (q * (context.log_prob(points) - p)).sum().item() * step.item() / 4
            for image in (n, n + 2):
                posterior = net.posterior(codes[image].expand(181, -1), c)
                log_q = torch.stack([each.log_prob(points) for each in posterior])
                both = q[:, None] * log_q.exp() * step**2
                likelihood = Bernoulli(logits=logits).log_prob(images[image]).flatten(1).sum(1).view(181, 181)
                expected["reconstruction"] -= (both * likelihood).sum().item() / 4
                expected["kl_latent"] += (both * (log_q - log_prior)).sum().item() / 4
    for name, value in expected.items():
        assert ours[name].item() == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert min(expected.values()) > 1e-3


def test_bound_is_below_the_likelihood_of_the_sets() -> None:
    """log p(D) of sets of two images, by integrating over c and both z on a grid."""
    sizes = {"num_filters": 1, "context_size": 1, "latent_size": 1, "hidden_size": 3}
    algorithm = make(stamps(num_ways=2, num_shots=2), sizes, num_updates=3)
    params = algorithm.theta | algorithm.buffers
    tasks = algorithm.sample_tasks(1, Stream(3))
    net, points = PlainStatistician(params), torch.linspace(-10, 10, 161)
    log_step, images = math.log(points[1] - points[0]), tasks["sets"][0].permute(0, 3, 1, 2)
    pairs = torch.cartesian_prod(points, points)
    samples = {name: value.expand(400, *value.shape[1:]) for name, value in tasks.items()}
    samples["context_noise"] = Stream(8).normal((400, 2, 1))
    samples["latent_noise"] = Stream(9).normal((400, 4, 1))
    with torch.no_grad():
        terms = algorithm.terms({name: value.unsqueeze(0) for name, value in params.items()}, samples)
        logits = net.decode(pairs[:, 1:], pairs[:, :1], algorithm.statistician.sizes)
        log_prior = torch.stack([p.log_prob(points) for p in net.prior(points.unsqueeze(1))])
        total = 0.0
        for n in range(2):
            log_c = Normal(0.0, 1.0).log_prob(points)
            for image in (n, n + 2):
                likelihood = Bernoulli(logits=logits).log_prob(images[image]).flatten(1).sum(1).view(161, 161)
                log_c = log_c + (likelihood + log_prior + log_step).logsumexp(1)
            total += (log_c + log_step).logsumexp(0).item() / 4
    bound = -torch.stack(list(terms.values())).sum(0).mean().item()
    assert bound < total < bound + 20


@pytest.mark.parametrize("kl", ["query_to_class", "class_to_query"])
def test_prediction_is_the_class_of_least_divergence_in_a_double_loop(kl: str) -> None:
    algorithm = make(num_updates=2, kl=kl)
    net = PlainStatistician(algorithm.theta | algorithm.buffers)
    for num_shots in (1, 3):
        tasks = algorithm.domain.sample_tasks(2, Stream(7), "test", num_shots, 2)
        (params,) = algorithm.adapt(algorithm.params_per_task(2), tasks, 0)
        support, query = (algorithm.domain.data(tasks, role) for role in ("support", "query"))
        scores = algorithm.model(params, query.x)
        for task in range(2):
            embedded = net.embed(net.encode(support.x[task].permute(0, 3, 1, 2)))
            classes = [net.context([embedded[n::3]])[0] for n in range(3)]
            for number, image in enumerate(query.x[task]):
                asked = net.context([net.embed(net.encode(image.permute(2, 0, 1).unsqueeze(0)))])[0]
                for n, of_class in enumerate(classes):
                    pair = (asked, of_class) if kl == "query_to_class" else (of_class, asked)
                    torch.testing.assert_close(scores[task, number, n], -kl_divergence(*pair).sum())
        right = (scores.argmax(2) == query.y).double().mean(1)
        for value in algorithm.measure(params, tasks, 0).values():
            assert torch.equal(value, right)


def test_ways_of_meta_test_differ_from_those_of_training() -> None:
    algorithm = make(num_updates=1)
    for ways in (2, 7):
        tasks = algorithm.domain.with_ways(ways).sample_tasks(2, Stream(7), "test", 2, 2)
        (params,) = algorithm.adapt(algorithm.params_per_task(2), tasks, 0)
        assert algorithm.model(params, algorithm.domain.data(tasks, "query").x).shape == (2, 2 * ways, ways)
        assert params[SUPPORT].shape == (2, 2, ways, 4)


def test_fine_tuning_lowers_the_divergence_of_the_support_images_to_their_class() -> None:
    algorithm = make(num_updates=2)
    tasks = algorithm.domain.sample_tasks(2, Stream(7), "test", 2, 1)
    support = algorithm.domain.data(tasks, "support")
    losses = [
        algorithm.loss(params, params[SUPPORT], params[SUPPORT].flatten(1, 2), support.y)[0]
        for params in algorithm.adapt(algorithm.params_per_task(2), tasks, 2, [0.01, 0.01])
    ]
    assert (losses[0] > losses[1]).all() and (losses[1] > losses[2]).all()


def test_draws_are_a_pure_function_of_the_stream_and_of_each_task_alone() -> None:
    algorithm = make()
    first, again, other, longer = (
        algorithm.sample_tasks(count, Stream(seed)) for count, seed in ((2, 1), (2, 1), (2, 2), (5, 1))
    )
    for name, value in first.items():
        assert torch.equal(value, again[name]) and torch.equal(value, longer[name][:2]), name
        assert not torch.equal(value, other[name]), name


def test_sets_are_the_support_images_mirrored_widened_and_black_or_white() -> None:
    domain = stamps(num_ways=6)
    count = 200
    seen = {
        name: make(domain, **{"dilation": 0.0, "reflections": False, **options}).sample_tasks(count, Stream(1))
        for name, options in {
            "none": dict[str, Any](),
            "mirrored": {"reflections": True},
            "wide": {"dilation": 0.5},
            "all_wide": {"dilation": 1.0},
            "whole": {"sample_dropout": 0.0},
        }.items()
    }
    grey = domain.data(seen["none"], "support").x
    sets = {name: tasks["sets"].unflatten(1, (4, 6)) for name, tasks in seen.items()}
    assert all(((value == 0) | (value == 1)).all() for value in sets.values())
    assert (sets["none"].flatten(1, 2)[grey == 1] == 1).all() and (sets["none"].flatten(1, 2)[grey == 0] == 0).all()
    assert sets["none"].flatten(1, 2)[grey == 0.25].mean().item() == pytest.approx(0.25, abs=0.02)
    # A set is mirrored as a whole. The threshold of a pixel stays where it is, so only extreme pixels are compared.
    x, extreme = grey.unflatten(1, (4, 6)), lambda value: (value == 0) | (value == 1)
    mirrored = x.flip(4)
    as_they_are = ((sets["mirrored"] == x) | ~extreme(x)).flatten(3).all(3).all(1)
    turned = ((sets["mirrored"] == mirrored) | ~extreme(mirrored)).flatten(3).all(3).all(1)
    assert (as_they_are ^ turned).all()
    assert turned.double().mean().item() == pytest.approx(0.5, abs=0.05)
    is_wide = (sets["wide"] == sets["all_wide"]).flatten(3).all(3)
    assert is_wide.double().mean().item() == pytest.approx(0.5, abs=0.06)
    assert (is_wide | (sets["wide"] == sets["none"]).flatten(3).all(3)).all()
    pooled = seen["none"]["is_pooled"]
    assert pooled[:, 0].all() and seen["whole"]["is_pooled"].all()
    assert pooled[:, 1:].double().mean().item() == pytest.approx(0.5, abs=0.05)


def test_dilation_takes_the_largest_of_a_pixel_and_its_four_neighbours() -> None:
    x = Stream(1).uniform((2, 3, 4, 5, 1))
    for found, image in zip(dilate(x).flatten(0, 1), x.flatten(0, 1), strict=True):
        for i in range(4):
            for j in range(5):
                places = [(i, j), (i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)]
                assert found[i, j] == max(image[a, b] for a, b in places if 0 <= a < 4 and 0 <= b < 5)


def test_image_that_is_left_out_does_not_change_the_context() -> None:
    """The context of a set is that of the set without the image; a smaller set by hand gives the same."""
    algorithm = make(num_updates=2)
    params = {name: value.unsqueeze(0) for name, value in (algorithm.theta | algorithm.buffers).items()}
    tasks = algorithm.sample_tasks(1, Stream(3))
    tasks["is_pooled"][:] = torch.tensor([True, False, True, True])[:, None]
    smaller = dict(tasks)
    for name in ("sets", "latent_noise"):
        smaller[name] = tasks[name].unflatten(1, (4, 3))[:, [0, 2, 3]].flatten(1, 2)
    smaller["is_pooled"] = torch.ones(1, 3, 3, dtype=torch.bool)
    context = algorithm.terms(params, tasks)["kl_context"] * 4
    torch.testing.assert_close(context, algorithm.terms(params, smaller)["kl_context"] * 3)
    everything = algorithm.terms(params, tasks | {"is_pooled": torch.ones(1, 4, 3, dtype=torch.bool)})
    assert (context - everything["kl_context"] * 4).abs() > 1e-6


def test_shared_weights_have_the_gradient_of_a_copy_for_each_task(monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm = make(num_updates=1)
    tasks, params = algorithm.sample_tasks(4, Stream(3)), algorithm.theta | algorithm.buffers
    found = {}
    for shares in (True, False):
        monkeypatch.setattr(NeuralStatistician, "shares_weights", shares)
        for chunk in (None, 3):
            found[shares, chunk] = MetaGradient(algorithm, Execution(1, chunk, compile=False)).gradient(params, tasks)
    expected_gradient, expected_metrics = found.pop((False, None))
    for gradient, metrics in found.values():
        for name, value in expected_gradient.items():
            torch.testing.assert_close(gradient[name], value, rtol=1e-8, atol=1e-11, msg=name)
        for name, value in expected_metrics.items():
            torch.testing.assert_close(metrics[name], value, rtol=1e-9, atol=1e-12, msg=name)


def test_picture_shows_samples_of_the_prior_given_the_support_images() -> None:
    algorithm = make(stamps(num_ways=6), num_updates=2)
    tasks = algorithm.domain.sample_tasks(3, Stream(7), "test", 2, 1)
    (picture,) = algorithm.pictures(algorithm.params_per_task(3), tasks, 0).values()
    assert isinstance(picture, Images) and len(picture.rows) == 8
    support, net = algorithm.domain.data(tasks, "support").x[0], PlainStatistician(algorithm.theta | algorithm.buffers)
    embedded = net.embed(net.encode(support.permute(0, 3, 1, 2)))
    noise = Stream(0).child("pictures").normal((5, 4, 2))
    for number in range(4):
        assert torch.equal(picture.rows[f"given {number + 1}"], support[number::6, :, :, 0])
        c = net.context([embedded[number::6]])[0].mean.unsqueeze(0)
        prior = net.prior(c)[0]
        z = prior.mean + prior.stddev * noise[:, number]
        expected = net.decode(z, c.expand(5, -1), algorithm.statistician.sizes)[:, 0].sigmoid()
        torch.testing.assert_close(picture.rows[f"drawn {number + 1}"], expected)


def test_parts_that_do_not_fit_are_refused(tiny: TinyRuns) -> None:
    domain, inner = stamps(), SGD(0.1, 0, order=1, adapt=["*"])
    with pytest.raises(MamlError, match="choose model=statistician"):
        algorithms.build_from(NeuralStatistician, domain, Conv4((28, 28, 1), 3, 2), inner)
    coloured = stamps(ColouredStamps)
    with pytest.raises(MamlError, match=r"have 3 channels: choose domain=omniglot"):
        algorithms.build_from(NeuralStatistician, coloured, Statistician(coloured.in_shape, 3, **SMALL), inner)
    config = tiny.config("algorithm=neural_statistician")
    with pytest.raises(MamlError, match="choose domain=omniglot"):
        build_algorithm(config, build(config.hardware))


RUN = (
    "domain=omniglot",
    "evaluation=accuracy",
    "model=statistician",
    *(f"model.{name}={value}" for name, value in SMALL.items()),
    "algorithm=neural_statistician",
    "domain.num_ways=6",
    "domain.num_shots=3",
    "domain.num_query=1",
    "num_iterations=10",
    "evaluation.num_ways=2",
    "evaluation.num_shots=[1,2]",
    "evaluation.num_query=2",
    "precision=float64",
)


STAMPS = ("domain._target_=tests.algorithm.test_neural_statistician.Stamps", "~domain.split", "~domain.rotations")


@pytest.fixture
def tiny_stamps(tiny: TinyRuns) -> TinyRuns:
    """Tiny runs on stamps."""
    return replace(tiny, base=(*tiny.base, *RUN, *STAMPS, "meta_batch_size=3", "hardware.task_chunk=2"))


def test_interrupted_run_resumes_with_the_same_bits(tiny_stamps: TinyRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tiny_stamps.run()
    parts = tiny_stamps.in_folder("parts")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        before_iteration(patch, 9, lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        parts.run()
    assert_same_run(whole, parts.run())


@pytest.mark.slow
def test_seeds_together_give_the_numbers_of_one_run(tiny_stamps: TinyRuns) -> None:
    together = tiny_stamps.in_folder("together")
    run_experiment(together.config("seeds=2"), "custom")
    assert_alike(tiny_stamps.run(), together.folder())


@pytest.mark.slow
def test_processes_give_the_numbers_of_one_run(tiny_stamps: TinyRuns) -> None:
    alone, shared = tiny_stamps.run(), tiny_stamps.in_folder("shared")
    assert Processes(shared.config(), 2).join() == [0, 0]
    assert_alike(alone, shared.folder())


@pytest.mark.slow
def test_trained_network_predicts_for_own_images_what_meta_test_measures(tiny: TinyRuns, tiny_images: TinyRuns) -> None:
    compare_with_predictor(tiny.run(*RUN, "meta_batch_size=1", "num_iterations=2"))
