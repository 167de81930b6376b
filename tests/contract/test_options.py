"""What holds for every option of every group, found in conf/ and never named: a new yaml is tested unasked."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from maml.config.compose import compose
from maml.config.identity import training_config
from maml.config.schema import build
from maml.domain.base import Domain
from maml.errors import MamlError
from maml.experiment import build_algorithm
from maml.inner.base import Inner
from maml.logger.base import Logger
from maml.model.base import Model
from maml.outer.base import Objective, Outer
from maml.seeding import Stream
from maml.types import Params, Product
from tests import algorithms
from tests.runs import ROOT

CONF = ROOT / "conf"
PARTS = ("domain", "model", "inner", "outer", "algorithm", "evaluation", "hardware", "logger")
OPTIONS = [(part, path.stem) for part in PARTS for path in sorted((CONF / part).glob("*.yaml"))]
IMAGES = ["domain=omniglot", "model=conv4", "evaluation=accuracy", "evaluation.num_steps=2"]
NEEDS = {
    # A class of the library's own stands in for the one that a user names.
    ("model", "module"): ["model.module._target_=torch.nn.Identity"],
    ("domain", "gymnasium_env"): ["domain.env_id=Pendulum-v1", "domain.goals={g: [5.0, 15.0]}"],
    ("evaluation", "accuracy"): ["evaluation.num_steps=3"],
    ("algorithm", "finetune"): IMAGES,
    ("algorithm", "nearest_neighbor"): IMAGES,
    ("algorithm", "multitask_average"): ["algorithm.max_error=100"],  # else a regressor takes thousands of steps
}


def overrides(part: str, option: str, cache_dir: Path) -> list[str]:
    return [f"{part}={option}", f"cache_dir={cache_dir}", *NEEDS.get((part, option), [])]


@pytest.mark.parametrize(("part", "option"), OPTIONS)
def test_option_composes_and_passes_the_check(part: str, option: str, cache_dir: Path) -> None:
    if (part, option) == ("hardware", "gpu") and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    config, _ = compose(overrides(part, option, cache_dir))
    assert training_config(config)
    if option == "multi_gpu":
        with pytest.raises(MamlError, match="1 process for hardware"):
            build(getattr(config, part))
    elif part not in ("model", "algorithm"):  # those two are built from the others, as the experiments' tests do
        assert build(getattr(config, part)) is not None


@pytest.mark.parametrize("path", sorted(CONF.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_yaml_opens_with_a_sentence(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if line != "# @package _global_"]
    assert lines[0].startswith("# ")
    assert len(lines[0]) > 20


@pytest.mark.parametrize("option", [option for part, option in OPTIONS if part == "domain"])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_domain_draws_tasks_as_a_pure_function_of_the_stream(option: str, split: str, cache_dir: Path) -> None:
    config, _ = compose(overrides("domain", option, cache_dir))
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


@pytest.mark.parametrize("option", [option for part, option in OPTIONS if part == "domain"])
def test_domain_says_what_a_report_needs(option: str, cache_dir: Path) -> None:
    config, _ = compose(overrides("domain", option, cache_dir))
    domain: Domain = build(config.domain)
    assert isinstance(domain, Domain)
    assert isinstance(domain.headline, str)
    assert isinstance(domain.larger_is_better, bool)


@pytest.mark.parametrize("option", [option for part, option in OPTIONS if part == "model" and option != "module"])
def test_model_draws_parameters_from_the_stream_alone(option: str, cache_dir: Path) -> None:
    config, _ = compose(overrides("model", option, cache_dir))
    model: Model = build(config.model, in_shape=(28, 28, 1), out_dim=6)
    first, again, other = (model.init(Stream(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    x = Stream(3).uniform((1, 4, 28, 28, 1))
    assert model({name: value.unsqueeze(0) for name, value in first.items()}, x).shape == (1, 4, 6)


@pytest.mark.parametrize("option", [option for part, option in OPTIONS if part == "algorithm"])
def test_algorithm_learns_from_a_batch_and_adapts(option: str, cache_dir: Path) -> None:
    config, _ = compose([*overrides("algorithm", option, cache_dir), "hardware=cpu"])
    algorithm = build_algorithm(config, build(config.hardware))
    before = {name: value.clone() for name, value in algorithm.theta.items()}
    metrics = algorithms.step(algorithm, algorithm.sample_tasks(3, Stream(0)))
    assert "loss" in metrics
    assert all(value.dim() == 0 and value.isfinite() for value in metrics.values())
    assert all(value.isfinite().all() for value in algorithm.buffers.values())
    assert algorithm.theta.keys() == before.keys()
    assert all(value.isfinite().all() and not value.requires_grad for value in algorithm.theta.values())
    tasks = algorithm.domain.sample_tasks(2, Stream(1), "test")
    steps = list(algorithm.adapt(algorithm.theta, tasks, 2))
    assert len(steps) == 3
    for params in steps:
        assert [name for name, value in params.items() if value.shape[0] != 2] == []
        query = algorithm.domain.data(tasks, "query")
        measured = algorithm.domain.measure(algorithm.model, params, query, query, step=1)
        assert measured[algorithm.domain.headline].shape == (2,)


@pytest.mark.parametrize("option", [option for part, option in OPTIONS if part == "inner"])
def test_inner_optimizer_adapts_in_any_number_of_steps(option: str) -> None:
    config, _ = compose([f"inner={option}"])
    inner: Inner = build(config.inner)
    theta = {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([[0.5]])}
    params = {name: value.expand(3, *value.shape) for name, value in (theta | inner.init(theta)).items()}

    def loss(params: dict[str, torch.Tensor], step: int) -> torch.Tensor:
        return params["a"].square().sum(1) + params["b"].square().sum((1, 2))

    losses = [loss(adapted, 0) for adapted, _ in inner.adapt(loss, params, 4, create_graph=False)]
    assert len(losses) == 5
    assert all((after < before).all() for before, after in itertools.pairwise(losses))


@pytest.mark.parametrize("option", [option for part, option in OPTIONS if part == "outer"])
def test_outer_optimizer_descends_a_quadratic_from_any_restart(option: str) -> None:
    config, _ = compose([f"outer={option}"])
    outer: Outer = build(config.outer)

    class Quadratic(Objective):
        def gradient(self, theta: Params) -> tuple[Params, dict[str, torch.Tensor]]:
            return {name: 2 * value for name, value in theta.items()}, self.evaluate(theta)

        def evaluate(self, theta: Params) -> dict[str, torch.Tensor]:
            loss = torch.stack([value.square().sum() for value in theta.values()]).sum()
            return {"loss": loss, "kl": torch.zeros(())}

        def curvature(self, theta: Params, every: int = 1) -> Product:
            return lambda vector: vector

    objective: Objective = Quadratic()
    theta = {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([[0.5]])}
    state = outer.init(theta)
    size = float(sum(value.square().sum() for value in theta.values()))
    for _ in range(5):
        outer.step(objective, theta, state)
        theta = {name: value.clone() for name, value in theta.items()}  # all it carries over is in the state
        state = {name: value.clone() for name, value in state.items()}
    assert float(sum(value.square().sum() for value in theta.values())) < size


def test_loggers_are_loggers(cache_dir: Path) -> None:
    for part, option in OPTIONS:
        if part == "logger":
            config, _ = compose(overrides(part, option, cache_dir))
            assert isinstance(build(config.logger), Logger)
