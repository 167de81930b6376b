"""Contracts that every option in conf/ has to meet; options are found, not named, so a new yaml is tested too."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from maml.config.compose import compose
from maml.config.identity import training_config
from maml.config.paths import CONF
from maml.config.schema import Part, Settings, build
from maml.domain.base import Domain
from maml.errors import MamlError, Unavailable
from maml.experiment import build_algorithm
from maml.inner.base import Inner
from maml.logger.base import Logger
from maml.model.base import Model
from maml.outer.base import Objective, Outer
from maml.seeding import Stream
from maml.types import MatrixVectorProduct, Params
from tests import algorithms
from tests.options import PARTS, options, try_with

Contract = Callable[..., None]


def for_every_option_of(*parts: str) -> Callable[[Contract], Contract]:
    """Parametrizes a test over all options of the given parts."""
    names = ("part", "option") if len(parts) > 1 else "option"
    found = [(part, option) for part in parts for option in options(part)]
    return pytest.mark.parametrize(names, found if len(parts) > 1 else [option for _, option in found])


@pytest.fixture
def conf() -> Path:
    """The folder of configs whose options are tested."""
    return CONF


@functools.cache
def compose_option(conf: Path, part: str, option: str, *overrides: str) -> Settings:
    """Composes an option with the overrides from the ``# Try with:`` line of its yaml."""
    return compose([f"{part}={option}", *try_with(part, option, conf), *overrides], conf)[0]


@for_every_option_of(*PARTS)
def test_option_composes_and_passes_the_check(part: str, option: str, cache_dir: Path, conf: Path) -> None:
    config = compose_option(conf, part, option, f"cache_dir={cache_dir}")
    assert training_config(config)
    if part in ("model", "algorithm"):  # building these needs the other parts; tests/test_experiments.py does it
        return
    if config.hardware["min_processes"] > 1:
        with pytest.raises(MamlError, match=r"there is 1 process, fewer than hardware\.min_processes=2"):
            build(getattr(config, part))
        return
    try:
        assert build(getattr(config, part)) is not None
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("path", sorted(CONF.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_yaml_opens_with_a_sentence(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if line != "# @package _global_"]
    assert lines[0].startswith("# ")
    assert len(lines[0]) > 20


@for_every_option_of("domain")
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_domain_draws_tasks_as_a_pure_function_of_the_stream(
    option: str, split: str, cache_dir: Path, conf: Path
) -> None:
    config = compose_option(conf, "domain", option, f"cache_dir={cache_dir}")
    domain: Domain = build(config.domain)
    first, again, other, longer = (
        domain.sample_tasks(count, Stream(seed), split)  # type: ignore[arg-type]
        for count, seed in ((3, 1), (3, 1), (3, 2), (5, 1))
    )
    for name, value in first.items():
        assert value.shape[0] == 3
        assert torch.equal(value, again[name])
        assert torch.equal(value, longer[name][:3])
    assert any(not torch.equal(value, other[name]) for name, value in first.items())


@for_every_option_of("domain")
def test_domain_says_what_a_report_needs(option: str, cache_dir: Path, conf: Path) -> None:
    config = compose_option(conf, "domain", option, f"cache_dir={cache_dir}")
    domain: Domain = build(config.domain)
    assert isinstance(domain, Domain)
    assert isinstance(domain.headline, str)
    assert isinstance(domain.larger_is_better, bool)


def build_for_images_or_vectors(part: Part) -> tuple[Model, tuple[int, ...]]:
    """Builds a model with six outputs, for images if possible, else for vectors; returns it and the input shape."""
    try:
        return build(part, in_shape=(28, 28, 1), out_dim=6), (28, 28, 1)
    except MamlError:
        return build(part, in_shape=(6,), out_dim=6), (6,)


@for_every_option_of("model")
def test_model_draws_parameters_from_the_stream_alone(option: str, cache_dir: Path, conf: Path) -> None:
    config = compose_option(conf, "model", option, f"cache_dir={cache_dir}")
    model, in_shape = build_for_images_or_vectors(config.model)
    first, again, other = (model.init(Stream(seed)) for seed in (1, 1, 2))
    x = Stream(3).uniform((1, 4, *in_shape))
    assert model({name: value.unsqueeze(0) for name, value in first.items()}, x).shape == (1, 4, 6)
    if not first:
        pytest.skip("the model that its yaml suggests has no parameters")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@for_every_option_of("model")
def test_outputs_follow_from_features_and_tasks_can_share_weights(option: str, cache_dir: Path, conf: Path) -> None:
    config = compose_option(conf, "model", option, f"cache_dir={cache_dir}")
    model, in_shape = build_for_images_or_vectors(config.model)
    if not model.num_features:
        with pytest.raises(MamlError, match="has no features"):
            model.check_features()
        return
    theta, x = model.init(Stream(1)), Stream(3).uniform((4, 3, *in_shape))
    copies = {name: value.expand(4, *value.shape).clone() for name, value in theta.items()}
    body = {name: value for name, value in copies.items() if not name.startswith("head.")}
    features, outputs = model.features(body, x), model(copies, x)
    assert features.shape == (4, 3, model.num_features)
    torch.testing.assert_close(model.outputs(copies, features), outputs)
    other = {name: value + 0.1 for name, value in theta.items()}
    for groups in ([theta], [theta, other]):  # one entry for all tasks, and one for each half of them
        shared = {name: torch.stack([each[name] for each in groups]) for name in theta}
        spread = {name: value.repeat_interleave(4 // len(groups), 0) for name, value in shared.items()}
        torch.testing.assert_close(model(shared, x), model(spread, x))


@for_every_option_of("algorithm")
def test_algorithm_learns_from_a_batch_and_adapts(option: str, cache_dir: Path, conf: Path) -> None:
    config = compose_option(conf, "algorithm", option, f"cache_dir={cache_dir}", "hardware=cpu")
    algorithm = build_algorithm(config, build(config.hardware))
    before = {name: value.clone() for name, value in algorithm.theta.items()}
    metrics = algorithms.step(algorithm, algorithm.sample_tasks(3, Stream(0)))
    assert "loss" in metrics
    assert all(value.dim() == 0 and value.isfinite() for value in metrics.values())
    assert all(value.isfinite().all() for value in algorithm.buffers.values())
    assert algorithm.theta.keys() == before.keys()
    assert all(value.isfinite().all() and not value.requires_grad for value in algorithm.theta.values())
    tasks = algorithm.domain.sample_tasks(2, Stream(1), "test")
    steps = list(algorithm.adapt(algorithm.params_per_task(2), tasks, 2))
    assert len(steps) == 3
    for params in steps:
        assert [name for name, value in params.items() if value.shape[0] != 2] == []
        query = algorithm.domain.data(tasks, "query")
        measured = algorithm.domain.measure(algorithm.model, params, query, query, step=1)
        assert measured[algorithm.domain.headline].shape == (2,)


@for_every_option_of("inner")
def test_inner_optimizer_adapts_in_any_number_of_steps(option: str, conf: Path) -> None:
    config = compose_option(conf, "inner", option)
    inner: Inner = build(config.inner)
    theta = {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([[0.5]])}
    learnt = inner.init_learned(theta, Stream(0))
    params = {name: value.expand(3, *value.shape) for name, value in (theta | learnt).items()}

    def loss(params: dict[str, torch.Tensor], step: int) -> torch.Tensor:
        return params["a"].square().sum(1) + params["b"].square().sum((1, 2))

    losses = [loss(adapted, 0) for adapted, _ in inner.adapt(loss, params, 4, create_graph=False)]
    assert len(losses) == 5
    assert all((after < before).all() for before, after in itertools.pairwise(losses))


@for_every_option_of("outer")
def test_outer_optimizer_descends_a_quadratic_from_any_restart(option: str, conf: Path) -> None:
    config = compose_option(conf, "outer", option)
    outer: Outer = build(config.outer)

    class Quadratic(Objective):
        def gradient(self, theta: Params) -> tuple[Params, dict[str, torch.Tensor]]:
            return {name: 2 * value for name, value in theta.items()}, self.evaluate(theta)

        def evaluate(self, theta: Params) -> dict[str, torch.Tensor]:
            loss = torch.stack([value.square().sum() for value in theta.values()]).sum()
            return {"loss": loss, "kl": torch.zeros(())}

        def curvature(self, theta: Params, every: int = 1) -> MatrixVectorProduct:
            return lambda vector: vector

        def kl_gradient(self, theta: Params, every: int = 1) -> Params:
            return {name: value - start[name] for name, value in theta.items()}

    objective: Objective = Quadratic()
    theta = {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([[0.5]])}
    state = outer.init_state(theta)
    size = float(sum(value.square().sum() for value in theta.values()))
    for _ in range(5):
        start = {name: value.clone() for name, value in theta.items()}
        outer.step(objective, theta, state)
        theta = {name: value.clone() for name, value in theta.items()}  # the optimizer must keep everything in `state`
        state = {name: value.clone() for name, value in state.items()}
    assert float(sum(value.square().sum() for value in theta.values())) < size


@for_every_option_of("logger")
def test_loggers_are_loggers(option: str, conf: Path) -> None:
    assert isinstance(build(compose_option(conf, "logger", option).logger), Logger)
