"""Every experiment in conf/experiment/: it composes, builds what it says, and survives +debug=smoke."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from maml.algorithm.base import Algorithm
from maml.algorithm.context_vector import ContextVector
from maml.algorithm.embedding import Embedding
from maml.algorithm.finetune import FineTune
from maml.algorithm.maml import MAML
from maml.algorithm.memory_module import MemoryModule
from maml.algorithm.multitask_average import MultitaskAverage
from maml.algorithm.nearest_neighbor import NearestNeighbor
from maml.algorithm.pixel_nearest_neighbor import PixelNearestNeighbor
from maml.algorithm.pretrain import Pretrain
from maml.algorithm.random_init import RandomInit
from maml.algorithm.reptile import Reptile
from maml.config.compose import compose, compose_experiment
from maml.config.identity import training_config
from maml.config.schema import Settings, build
from maml.digest import digest
from maml.domain.classification import FewShotClassification
from maml.domain.point_navigation import PointNavigation
from maml.domain.reinforcement import Reinforcement
from maml.environment.base import TellGoal
from maml.environment.point import PointEnvironments
from maml.evaluation import Evaluation
from maml.experiment import build_algorithm, run_experiment
from maml.hardware.base import Hardware
from maml.inner.meta_lstm import MetaLSTM
from maml.outer.adam import Adam
from maml.outer.sgd import SGD
from maml.outer.trpo import TRPO
from maml.record.run_files import read_json
from maml.record.run_folder import RunFolder
from maml.seeding import Stream
from tests.runs import ROOT, TinyRuns, assert_same_run

EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))


# Smoke tests of these differ from another one in shots, ways, photos, robot or goals only. They show little more.
_REPEATS = (
    "ant_direction_oracle",
    "ant_direction_pretrain",
    "ant_direction_random_init",
    "ant_velocity",
    "cheetah_direction_oracle",
    "cheetah_direction_random_init",
    "cheetah_velocity",
    "omniglot_20way_1shot_fomaml",
    "omniglot_5way_1shot_vinyals",
    "cifar_fs_5way_5shot",
    "cifar_fs_5way_reptile",
    "mini_imagenet_5way_1shot_",
    "mini_imagenet_5way_5shot",
    "mini_imagenet_5way_reptile",
    "omniglot_20way_5shot",
    "omniglot_20way_reptile",
)
_OF_EMBEDDINGS = (
    "cifar_fs_5way_1shot_matching",
    "omniglot_20way_5shot_prototypical",
    "omniglot_5way_1shot_siamese",
    "omniglot_alphabets_siamese",
    "omniglot_5way_5shot_statistician",
)


def _smoke(name: str) -> Any:
    is_slow = name.startswith(_REPEATS)
    if name.endswith(("_prototypical", "_matching", "_siamese", "_statistician")):
        is_slow = name not in _OF_EMBEDDINGS
    if name.endswith("_memory_module"):
        is_slow = name != "omniglot_5way_1shot_memory_module"
    return pytest.param(name, marks=pytest.mark.slow if is_slow else ())


@pytest.mark.parametrize("name", [_smoke(name) for name in EXPERIMENTS])
def test_experiment_survives_smoke(name: str, tmp_path: Path, cache_dir: Path) -> None:
    places = [f"runs_dir={tmp_path}", f"cache_dir={cache_dir}", "hardware=cpu", "hardware.num_threads=1"]
    # Rollouts are what an RL experiment's time goes into.
    few = ["domain.num_shots=2", "evaluation.num_shots=[2]"] if name.startswith(("point", "cheetah", "ant")) else []
    if "multitask" in name:  # Regressors that have to be good take thousands of steps.
        few = ["algorithm.max_error=100", "algorithm.num_steps=200"]
    if name.endswith("reptile"):  # It takes 50 steps in meta-test.
        few = ["evaluation.num_steps=5"]
    if name.endswith(("_prototypical", "_matching", "_siamese", "_statistician")):
        few = ["domain.num_ways=6"]
    if name == "omniglot_alphabets_siamese":  # a smaller network, on drawings that are read already
        small = ["domain.image_size=28", "model.module.kernels=[3,3,1,1]", "model.module.widths=[2,2,2,2]"]
        few = ["domain.num_ways=6", "model.module.num_features=8", *small]
    if name.endswith("_memory_module"):
        few = ["model.rep_dim=16"]
    config, experiment = compose([f"+experiment={name}", "+debug=smoke", *few, *places])
    if name.endswith("_statistician"):
        config = replace(config, model={**config.model, "hidden_size": 16, "context_size": 8})
    if "num_filters" in config.model:  # An image experiment spends its time in convolutions.
        config = replace(config, model={**config.model, "num_filters": 4})
    headline = run_experiment(config, experiment)
    folder = RunFolder(config, experiment).path
    assert folder.parent == tmp_path / name
    report = read_json(folder / "report.json")
    assert report is not None
    assert report["headline"] == headline


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_opens_with_the_number_it_reproduces(name: str) -> None:
    first, second, *_ = (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text().splitlines()
    assert first == "# @package _global_"
    assert second.startswith(("# Table", "# Figure", "# Not in the paper"))


@pytest.mark.parametrize("experiment", [[], ["+experiment=omniglot_5way_1shot"], ["+experiment=sinusoid_10shot"]])
def test_fomaml_is_first_order_in_config_and_in_the_built_object(experiment: list[str], cache_dir: Path) -> None:
    for algorithm, order in (("maml", 2), ("fomaml", 1)):
        overrides = [*experiment, f"algorithm={algorithm}", f"cache_dir={cache_dir}"]
        config, _ = compose(overrides)
        assert config.inner["order"] == order
        assert build(config.inner).order == order
        assert build_algorithm(config, Hardware("cpu")).inner.order == order


def built(name: str, cache_dir: Path) -> tuple[Settings, Algorithm, Evaluation]:
    config = compose_experiment(name, (f"cache_dir={cache_dir}",))
    return config, build_algorithm(config, Hardware("cpu")), build(config.evaluation)


def size(algorithm: Algorithm) -> int:
    return sum(value.numel() for value in algorithm.theta.values())


# Name, ways, shots, inner step size, steps in training and in meta-test, meta-batch, parameters
# (docs/protocol.md#omniglot-training and docs/protocol.md#miniimagenet-training).
CONV_5WAY, CONV_20WAY = 640 + 3 * 36_928 + 4 * 64 + 325, 640 + 3 * 36_928 + 4 * 64 + 1300
NON_CONV = 785 * 256 + 257 * 128 + 129 * 64 + 65 * 64 + 65 * 5 + 256 + 128 + 64 + 64
CLASSIFICATION = [
    ("omniglot_5way_1shot", 5, 1, 0.4, 1, 3, 32, CONV_5WAY),
    ("omniglot_5way_5shot", 5, 5, 0.4, 1, 3, 32, CONV_5WAY),
    ("omniglot_5way_1shot_non_conv", 5, 1, 0.4, 1, 3, 32, NON_CONV),
    ("omniglot_5way_5shot_non_conv", 5, 5, 0.4, 1, 3, 32, NON_CONV),
    ("omniglot_20way_1shot", 20, 1, 0.1, 5, 5, 16, CONV_20WAY),
    ("omniglot_20way_5shot", 20, 5, 0.1, 5, 5, 16, CONV_20WAY),
    ("mini_imagenet_5way_1shot", 5, 1, 0.01, 5, 10, 4, 32_773),
    ("mini_imagenet_5way_5shot", 5, 5, 0.01, 5, 10, 4, 32_773),
    ("cifar_fs_5way_1shot", 5, 1, 0.01, 5, 10, 4, 32_773 - 5 * (25 - 4) * 32),
    ("cifar_fs_5way_5shot", 5, 5, 0.01, 5, 10, 4, 32_773 - 5 * (25 - 4) * 32),
]


@pytest.mark.parametrize(
    ("name", "ways", "shots", "step_size", "steps", "test_steps", "batch", "num_parameters", "first_order"),
    [
        (*case, first_order)
        for case in CLASSIFICATION
        for first_order in (False, True)
        if f"{case[0]}{'_fomaml' * first_order}" in EXPERIMENTS
    ],
)
def test_classification_is_the_papers(
    name: str,
    ways: int,
    shots: int,
    step_size: float,
    steps: int,
    test_steps: int,
    batch: int,
    num_parameters: int,
    first_order: bool,
    cache_dir: Path,
) -> None:
    config, algorithm, evaluation = built(name + "_fomaml" * first_order, cache_dir)
    inner, domain, is_omniglot = algorithm.inner, algorithm.domain, name.startswith("omniglot")
    assert (config.meta_batch_size, config.num_iterations) == (batch, 60_000)
    assert (inner.step_size, inner.num_steps, inner.order) == (step_size, steps, 1 if first_order else 2)
    assert isinstance(algorithm.outer, Adam)
    assert (algorithm.outer.step_size, algorithm.outer.clip) == (0.001, None if is_omniglot else 10.0)
    assert size(algorithm) == num_parameters
    assert not any("shift" in parameter for parameter in inner.adapted_names(list(algorithm.theta)))
    assert isinstance(domain, FewShotClassification)
    assert {split: len(classes) for split, classes in domain.splits.items()} == (
        {"train": 1100, "val": 100, "test": 423} if is_omniglot else {"train": 64, "val": 16, "test": 20}
    )
    assert domain.rotate == is_omniglot
    tasks, bank = domain.sample_tasks(2, Stream(0)), evaluation.bank(domain, shots, num_tasks=3)
    assert tasks["support_images"].shape == (2, ways, shots)
    assert tasks["query_images"].shape == (2, ways, shots if is_omniglot else 15)
    assert bank["query_images"].shape == (3, ways, shots), "K query images per class in meta-test"
    assert (evaluation.num_tasks, evaluation.num_steps, evaluation.split) == (600, test_steps, "test")
    assert evaluation.step_sizes(shots) is None, "alpha"


def test_maml_on_the_vinyals_split_differs_in_the_tasks_alone(cache_dir: Path) -> None:
    for name in ("5way_1shot", "5way_5shot", "20way_1shot", "20way_5shot"):
        here, there = (
            training_config(compose_experiment(f"omniglot_{name}{end}", (f"cache_dir={cache_dir}",)))
            for end in ("_vinyals", "")
        )
        assert here == there | {"domain.split": "vinyals", "domain.rotations": "classes"}


@pytest.mark.parametrize(("ways", "shots"), [(5, 1), (5, 5), (20, 1), (20, 5)])
def test_pixels_are_compared_on_the_tasks_of_maml_on_the_vinyals_split(ways: int, shots: int, cache_dir: Path) -> None:
    name = f"omniglot_{ways}way_{shots}shot"
    config, algorithm, evaluation = built(f"{name}_pixels", cache_dir)
    maml, *_, theirs = built(f"{name}_vinyals", cache_dir)
    assert isinstance(algorithm, PixelNearestNeighbor)
    assert (config.num_iterations, evaluation.num_steps, config.domain) == (0, 0, maml.domain)
    (one, other) = (each.bank(algorithm.domain, shots, num_tasks=3) for each in (evaluation, theirs))
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_mini_imagenet_network_has_the_released_checkpoints_tensors(cache_dir: Path) -> None:
    _, algorithm, _ = built("mini_imagenet_5way_1shot", cache_dir)
    assert {name: tuple(value.shape) for name, value in algorithm.theta.items()} == {
        **{f"conv{i}.weight": (32, 3 if i == 1 else 32, 3, 3) for i in range(1, 5)},
        **{f"conv{i}.bias": (32,) for i in range(1, 5)},
        **{f"norm{i}.shift": (32,) for i in range(1, 5)},
        "head.weight": (5, 800),
        "head.bias": (5,),
    }


@pytest.mark.parametrize("shots", [1, 5])
def test_context_vector_adapts_three_channels_alone(shots: int, cache_dir: Path) -> None:
    config, algorithm, evaluation = built(f"omniglot_5way_{shots}shot_context_vector", cache_dir)
    assert algorithm.inner.adapted_names(list(algorithm.theta)) == ["context"]
    assert algorithm.theta["context"].shape == (28, 28, 3)
    assert algorithm.theta["conv1.weight"].shape == (64, 4, 3, 3)
    assert (config.meta_batch_size, config.num_iterations, evaluation.num_steps) == (32, 60_000, 3)
    assert (algorithm.domain.num_shots, algorithm.inner.num_steps, algorithm.inner.order) == (shots, 1, 2)


@pytest.mark.parametrize("domain", ["mini_imagenet", "cifar_fs"])
def test_baselines_on_images_are_ravis_and_share_one_training(domain: str, cache_dir: Path) -> None:
    ids = set()
    for shots in (1, 5):
        config, algorithm, evaluation = built(f"{domain}_5way_{shots}shot_finetune", cache_dir)
        ids.add(digest(training_config(config)))
        assert isinstance(algorithm, FineTune)
        assert (config.meta_batch_size, config.num_iterations) == (64, 30_000)
        features = 1600 if domain == "mini_imagenet" else 256
        assert algorithm.theta["head.weight"].shape == (64, features)
        assert algorithm.inner.adapted_names(list(algorithm.theta)) == list(algorithm.theta)
        assert (evaluation.num_steps, evaluation.num_query, evaluation.num_shots or [1]) == (15, 15, [shots])
        assert evaluation.search is not None
        assert (len(evaluation.search.step_sizes), len(evaluation.search.decays)) == (6, 7)
        assert evaluation.search.num_tasks == 100
        config, algorithm, evaluation = built(f"{domain}_5way_{shots}shot_nearest_neighbor", cache_dir)
        ids.add(digest(training_config(config)))
        assert isinstance(algorithm, NearestNeighbor)
        assert (evaluation.num_steps, evaluation.num_query, evaluation.num_shots or [1]) == (0, 15, [shots])
        assert evaluation.search is None
    assert len(ids) == 1


# Ways, shots (None: as in meta-test) and query images in training; tasks; iterations
# (docs/protocol.md#embedding-training).
# On Omniglot, matching networks train as prototypical ones.
EMBEDDING = {
    "omniglot_5way_1shot_prototypical": (60, None, 5, 1000, 20_000),
    "omniglot_5way_5shot_prototypical": (60, None, 5, 1000, 20_000),
    "omniglot_20way_1shot_prototypical": (60, None, 5, 1000, 20_000),
    "omniglot_20way_5shot_prototypical": (60, None, 5, 1000, 20_000),
    "omniglot_5way_1shot_siamese": (64, 1, 1, 1000, 20_000),
    "omniglot_5way_5shot_siamese": (64, 1, 1, 1000, 20_000),
    "omniglot_20way_1shot_siamese": (64, 1, 1, 1000, 20_000),
    "omniglot_20way_5shot_siamese": (64, 1, 1, 1000, 20_000),
    "cifar_fs_5way_1shot_prototypical": (30, None, 15, 600, 20_000),
    "cifar_fs_5way_5shot_prototypical": (20, None, 15, 600, 20_000),
    "cifar_fs_5way_1shot_matching": (5, 5, 15, 600, 75_000),
    "cifar_fs_5way_5shot_matching": (5, 5, 15, 600, 75_000),
}
EMBEDDING |= {name.replace("prototypical", "matching"): row for name, row in EMBEDDING.items() if "omniglot" in name}
EMBEDDING |= {f"mini_imagenet_5way_{shots}shot_matching": (5, 5, 15, 600, 75_000) for shots in (1, 5)}


@pytest.mark.parametrize("name", EMBEDDING)
def test_embedding_methods_are_those_of_the_protocol(name: str) -> None:
    config = compose_experiment(name)
    *_, way, shot, method = name.split("_")
    ways, shots = int(way.removesuffix("way")), int(shot.removesuffix("shot"))
    train_ways, train_shots, num_query, num_tasks, num_iterations = EMBEDDING[name]
    domain, evaluation, outer = config.domain, config.evaluation, config.outer
    assert config.algorithm["_target_"].split(".")[-2:] == [method, method.capitalize()]
    assert (domain["num_ways"], domain["num_shots"], domain["num_query"]) == (
        train_ways,
        train_shots or shots,
        num_query,
    )
    assert (evaluation["num_ways"] or domain["num_ways"]) == ways
    assert (evaluation["num_shots"] or [domain["num_shots"]]) == [shots]
    assert (evaluation["num_query"], evaluation["num_tasks"]) == (15, num_tasks)
    assert (evaluation["num_steps"], evaluation["search"] is not None) == (
        (5, True) if method == "siamese" else (0, False)
    )
    assert (config.meta_batch_size, config.num_iterations, config.inner["num_steps"]) == (1, num_iterations, 0)
    follows_ravi = method == "matching" and not name.startswith("omniglot")
    if method == "matching":
        assert config.algorithm["temperature"] == (1 if follows_ravi else 0.03)
    assert outer["step_size"] == (1e-4 if follows_ravi else 1e-3)
    assert (outer["schedule"] or {}).get("every") == (None if follows_ravi else 2000)
    assert config.model["dropout"] == (0.1 if follows_ravi else 0)


@pytest.mark.parametrize(
    ("name", "num_parameters", "num_classes"),
    [
        ("omniglot_5way_1shot_prototypical", 111_936, {"train": 4800, "test": 1692}),
        ("omniglot_20way_5shot_siamese", 112_001, {"train": 4112, "val": 688, "test": 1692}),
    ],
)
def test_embedding_methods_have_the_network_and_classes_of_the_protocol(
    name: str, num_parameters: int, num_classes: dict[str, int], cache_dir: Path
) -> None:
    _, algorithm, evaluation = built(name, cache_dir)
    assert isinstance(algorithm, Embedding) and isinstance(algorithm.domain, FewShotClassification)
    assert size(algorithm) == num_parameters
    assert {split: len(classes) for split, classes in algorithm.domain.splits.items()} == num_classes
    ways, shots = (5, 1) if "5way" in name else (20, 5)
    assert evaluation.bank(algorithm.domain, shots, num_tasks=2)["support_images"].shape == (2, ways, shots)


@pytest.mark.parametrize("shots", [1, 5])
@pytest.mark.parametrize(("domain", "num_parameters"), [("cifar_fs", 29_541), ("mini_imagenet", 32_901)])
def test_meta_lstm_is_ravis(domain: str, num_parameters: int, shots: int, cache_dir: Path) -> None:
    """Steps, numbers and scales of docs/protocol.md#meta-learner-lstm."""
    config, algorithm, evaluation = built(f"{domain}_5way_{shots}shot_meta_lstm", cache_dir)
    inner, num_steps = algorithm.inner, 12 if shots == 1 else 5
    assert isinstance(inner, MetaLSTM)
    assert (inner.num_steps, evaluation.num_steps, inner.order, inner.hidden_size) == (num_steps, num_steps, 1, 20)
    assert (config.meta_batch_size, config.num_iterations) == (1, 75_000 if shots == 1 else 50_000)
    own = [name for name in algorithm.theta if name.startswith("inner.")]
    assert sum(algorithm.theta[name].numel() for name in own) == 2046
    assert size(algorithm) - 2046 == num_parameters
    assert len(inner.adapted_names(list(algorithm.theta))) == len(algorithm.theta) - len(own), "all adapt"
    assert (evaluation.num_tasks, evaluation.num_query, algorithm.domain.num_query) == (600, 15, 15)
    # Our losses are sums over N K or N Q images, divided by K; the source has means, and one division more.
    assert inner.loss_scale == pytest.approx(1 / 5)
    assert inner.gradient_scale == pytest.approx(1 / 5 / (5 * shots))
    assert config.outer["clip_norm"] == pytest.approx(0.25 * 75 / shots)


def test_embedding_experiments_with_equal_training_share_it() -> None:
    """Ways of meta-test are no part of training, and some train with the same shots for all tests."""
    trainings: dict[str, set[str]] = {}
    for name in EMBEDDING:
        config = compose_experiment(name)
        trainings.setdefault(digest(training_config(config)), set()).add(name)
    patterns = {
        "omniglot_*_1shot_prototypical": 2,
        "omniglot_*_5shot_prototypical": 2,
        "omniglot_*_1shot_matching": 2,
        "omniglot_*_5shot_matching": 2,
        "omniglot_*_siamese": 4,
        "cifar_fs_*_1shot_prototypical": 1,
        "cifar_fs_*_5shot_prototypical": 1,
        "cifar_fs_*_matching": 2,
        "mini_imagenet_*_matching": 2,
    }
    for pattern, count in patterns.items():
        alike = {name for name in EMBEDDING if Path(name).match(pattern)}
        assert len(alike) == count and alike in trainings.values(), pattern
    assert len(trainings) == len(patterns)


def test_memory_module_is_that_of_the_protocol(cache_dir: Path) -> None:
    """One training for each number of ways; meta-test has the tasks of matching networks."""
    trainings = set()
    for ways, shots in ((5, 1), (5, 5), (20, 1), (20, 5)):
        name = f"omniglot_{ways}way_{shots}shot_memory_module"
        config, algorithm, evaluation = built(name, cache_dir)
        trainings.add(digest(training_config(config)))
        assert isinstance(algorithm, MemoryModule) and size(algorithm) == 1_930_432
        assert (algorithm.num_slots, algorithm.num_neighbors, algorithm.margin, algorithm.dropout) == (
            8192,
            256,
            0.1,
            0.7,
        )
        assert algorithm.clear and algorithm.age_noise == 8
        outer = algorithm.outer
        assert isinstance(outer, Adam) and (outer.step_size, outer.eps, outer.clip_norm) == (1e-4, 1e-4, 5)
        assert (config.meta_batch_size, config.num_iterations) == (16, 100_000)
        assert len(algorithm.sample_tasks(2, Stream(0))["labels"]) == 6 * ways
        assert (evaluation.num_tasks, evaluation.num_steps, evaluation.num_shots) == (1000, 0, [shots])
        theirs = build(compose_experiment(f"omniglot_{ways}way_{shots}shot_matching").evaluation)
        banks = [each.bank(algorithm.domain.with_ways(ways), shots, num_tasks=2) for each in (evaluation, theirs)]
        assert all(torch.equal(value, banks[1][key]) for key, value in banks[0].items())
    assert len(trainings) == 2


# Inner batch and steps, step size, iterations, inner batch in meta-test (docs/protocol.md#reptile).
REPTILE = {
    "omniglot_5way_reptile": (10, 10, 5, 0.001, 100_000, 5),
    "omniglot_20way_reptile": (10, 20, 10, 0.0005, 200_000, 10),
    "mini_imagenet_5way_reptile": (15, 10, 8, 0.001, 100_000, 15),
    "cifar_fs_5way_reptile": (15, 10, 8, 0.001, 100_000, 15),
}


@pytest.mark.parametrize("name", REPTILE)
def test_reptile_is_its_authors(name: str, cache_dir: Path) -> None:
    shots, num_examples, num_steps, step_size, num_iterations, num_test_examples = REPTILE[name]
    config, algorithm, evaluation = built(name, cache_dir)
    assert isinstance(algorithm, Reptile) and isinstance(algorithm.outer, SGD)
    assert (algorithm.num_examples, algorithm.num_test_examples) == (num_examples, num_test_examples)
    assert (algorithm.inner.num_steps, algorithm.inner.step_size, algorithm.domain.num_shots) == (
        num_steps,
        step_size,
        shots,
    )
    assert (config.num_iterations, config.meta_batch_size) == (num_iterations, 5)
    assert (algorithm.outer.step_size, algorithm.outer.final_step_size) == (1.0, 0.0)
    assert algorithm.outer.num_iterations == num_iterations
    assert (evaluation.num_steps, evaluation.num_query, evaluation.num_shots) == (50, 1, [1, 5])
    assert evaluation.num_tasks == 10_000
    adapted = algorithm.inner.adapted_names(list(algorithm.theta))
    assert any(parameter.endswith("shift") for parameter in adapted)
    assert any(parameter.endswith("scale") for parameter in adapted)
    features = {"omniglot": 256, "mini_imagenet": 1152, "cifar_fs": 128}[
        name.partition("_5way")[0].partition("_20way")[0]
    ]
    assert algorithm.theta["head.weight"].shape[1] == features


def test_sinusoid_10shot_is_the_papers(cache_dir: Path) -> None:
    config, algorithm, evaluation = built("sinusoid_10shot", cache_dir)
    assert (config.meta_batch_size, config.num_iterations) == (25, 70_000)
    assert (algorithm.inner.step_size, algorithm.inner.num_steps, algorithm.domain.num_shots) == (0.001, 1, 10)
    assert evaluation.num_shots == [5, 10, 20]
    assert size(algorithm) == 1761


def test_sinusoid_baselines_are_the_papers(cache_dir: Path) -> None:
    config, algorithm, evaluation = built("sinusoid_pretrain", cache_dir)
    assert (config.meta_batch_size, config.num_iterations) == (25, 70_000)
    assert [evaluation.step_sizes(shots) for shots in (5, 10, 20)] == [[0.01] * 10, [0.02] * 10, [0.02] * 10]
    assert isinstance(algorithm, Pretrain)
    config, algorithm, evaluation = built("sinusoid_oracle", cache_dir)
    assert (config.num_iterations, evaluation.num_steps, algorithm.domain.in_shape) == (70_000, 0, (3,))
    assert isinstance(algorithm, Pretrain)
    config, algorithm, _ = built("sinusoid_random_init", cache_dir)
    assert (config.num_iterations, type(algorithm)) == (0, RandomInit)


@pytest.mark.parametrize("reading", ["average", "chain"])
@pytest.mark.parametrize(("variant", "weight"), [("", 0.0), ("_l2", 0.001), ("_to_mean", 0.01)])
def test_multitask_average_is_of_500_regressors(variant: str, weight: float, reading: str, cache_dir: Path) -> None:
    config, algorithm, evaluation = built(f"sinusoid_multitask_{reading}{variant}", cache_dir)
    assert isinstance(algorithm, MultitaskAverage)
    assert config.meta_batch_size * config.num_iterations == 500
    is_sequential = reading == "chain" or variant == "_to_mean"
    assert (config.meta_batch_size == 1) == is_sequential, "these are sequential by definition"
    assert (algorithm.max_error, algorithm.max_share_above) == (0.02, 0.05)
    assert (algorithm.weight, algorithm.pull) == (weight, "mean" if variant == "_to_mean" else "zero")
    assert algorithm.initial == ("previous" if reading == "chain" else "fresh")
    assert size(algorithm) == 1761
    assert evaluation.search is not None and evaluation.search.num_candidates == 22


def test_papers_sinusoid_experiments_are_tested_on_the_authors_bank(cache_dir: Path) -> None:
    papers = {name for name in EXPERIMENTS if name.startswith("sinusoid")} - {"sinusoid_reptile", "sinusoid_sequence"}
    for name in papers:
        assert built(name, cache_dir)[2].uses_authors_bank
    for name in ("sinusoid_reptile", "sinusoid_sequence"):
        assert not built(name, cache_dir)[2].uses_authors_bank


# K in training and in meta-test, alpha, KL limit, iterations of MAML, pretrained and oracle, the authors' step sizes in
# meta-test of MAML, pretrained and random; observations, actions, horizon
# (docs/protocol.md#rl-training, docs/protocol.md#rl-baselines and docs/protocol.md#rl-meta-test).
LATER = {"ant_direction": 0.01}  # step sizes behind the first, as parts of it; else one half
RL = {
    "point_navigation": (20, 40, 0.5, 0.01, (100, 100, 100), (0.5, 0.5, 0.5), 2, 2, 100),
    "cheetah_velocity": (10, 20, 0.1, 0.01, (500, 500, 1000), (0.1, 0.02, 0.1), 20, 6, 200),
    "cheetah_direction": (20, 20, 0.1, 0.02, (500, 500, 1000), (0.1, 0.2, 1.0), 20, 6, 200),
    "ant_velocity": (20, 20, 0.1, 0.01, (500, 1000, 550), (0.1, 0.2, 1.0), 125, 8, 200),
    "ant_direction": (40, 40, 0.1, 0.01, (600, 1000, 2000), (0.1, 0.2, 1.0), 125, 8, 200),
}
METHODS = ("maml", "pretrain", "oracle", "random_init", "context_vector")


@pytest.mark.parametrize(
    ("domain_name", "method"),
    [(domain, method) for domain in RL for method in METHODS if f"{domain}_{method}" in EXPERIMENTS],
)
def test_rl_experiments_are_the_papers(domain_name: str, method: str, cache_dir: Path) -> None:
    shots, test_shots, alpha, max_kl, iterations, first_sizes, observed, actions, horizon = RL[domain_name]
    config, algorithm, evaluation = built(f"{domain_name}_{method}", cache_dir)
    domain, inner, outer, is_point = algorithm.domain, algorithm.inner, algorithm.outer, domain_name.startswith("point")
    assert isinstance(domain, Reinforcement)
    meta_learns = method in ("maml", "context_vector")
    pooled = method == "oracle" or (method == "pretrain" and not is_point)

    # Training.
    kind = {"maml": MAML, "pretrain": Pretrain, "oracle": Pretrain, "random_init": RandomInit}
    assert type(algorithm) is kind.get(method, ContextVector)
    row = {"maml": 0, "context_vector": 0, "pretrain": 1, "oracle": 2}
    assert config.num_iterations == (iterations[row[method]] if method in row else 0)
    if meta_learns or (method == "pretrain" and is_point):
        assert (config.meta_batch_size, domain.num_shots) == (20 if is_point else 40, shots)
    elif method != "random_init":
        # One rollout for each goal: 1,000 timesteps of the point, 20,000 of the others.
        assert config.meta_batch_size * domain.num_shots * domain.horizon == (1000 if is_point else 20_000)
        assert domain.num_shots == 1
    if meta_learns:
        assert (inner.step_size, inner.num_steps, inner.order) == (alpha, 1, 2)
    if method == "pretrain" and is_point:
        assert isinstance(outer, Adam) and (outer.step_size, outer.clip) == (0.001, None)
    else:
        assert isinstance(outer, TRPO)
        assert outer.max_kl == (max_kl if meta_learns else 0.01) or method == "random_init"
        assert (outer.num_cg_steps, outer.damping, outer.backtrack, outer.curvature_every) == (10, 1e-5, 0.8, 1)
    adapted = inner.adapted_names(list(algorithm.theta))
    assert adapted == (["context"] if method == "context_vector" else list(algorithm.theta)), "log_std adapts, too"

    # Domain and policy.
    assert (domain.horizon, domain.discount, domain.num_goals) == (horizon, 0.99, None)
    assert (domain.oracle, domain.pooled) == (method == "oracle", pooled)
    ends_early = is_point or domain_name.startswith("ant")
    assert domain.goal_per == ("episode" if pooled and ends_early else "task"), "a new goal at every reset"
    goals = domain.draw_goals(500, Stream(0))
    low, high = {"point_navigation": (-0.5, 0.5), "cheetah_velocity": (0.0, 2.0), "ant_velocity": (0.0, 3.0)}.get(
        domain_name, (-1.0, 1.0)
    )
    assert (goals.min().item(), goals.max().item()) == pytest.approx((low, high), abs=0.02 * (high - low))
    if is_point:
        assert isinstance(domain.environments, PointEnvironments | TellGoal)
    told = goals.shape[1] if method == "oracle" else 0
    wide = observed + told + (observed if method == "context_vector" else 0)
    context = observed if method == "context_vector" else 0
    policy = 101 * 100 + 101 * actions + actions + (wide + 1) * 100
    assert size(algorithm) == policy + context
    assert config.model["activation"] == ("tanh" if method == "random_init" and is_point else "relu")
    if context:
        assert algorithm.theta["context"].tolist() == [0.0] * observed

    # Meta-test: 4,000 timesteps per goal and step, 8,000 of the ant's directions.
    assert (evaluation.num_tasks, evaluation.num_shots, evaluation.split) == (40, [test_shots], "test")
    assert test_shots * horizon == (8000 if domain_name == "ant_direction" else 4000)
    assert evaluation.theta == ("last" if is_point else "best")
    num_steps = 0 if method == "oracle" else 4 if is_point else 3
    assert evaluation.num_steps == num_steps
    first, later = first_sizes[{"pretrain": 1, "random_init": 2}.get(method, 0)], LATER.get(domain_name, 0.5)
    if meta_learns:
        assert evaluation.step_sizes(test_shots) == pytest.approx([first, *[first * later] * (num_steps - 1)])
    if method in ("pretrain", "random_init"):
        assert evaluation.search is not None
        assert (evaluation.search.num_tasks, evaluation.search.later_factor) == (40, later)
        assert first in evaluation.search.step_sizes, "the authors' is among those that are tried"
        tried = evaluation.bank(domain, test_shots, split="val")
        tested = evaluation.bank(domain, test_shots)
        assert not torch.isin(tried["keys"], tested["keys"]).any()
        if "direction" not in domain_name:
            assert not (tried["goals"].unsqueeze(1) == tested["goals"]).all(-1).any(), "validation goals are others"
    else:
        assert evaluation.search is None
    bank = evaluation.bank(domain, test_shots)
    assert bank["goals"].shape[0] == 40
    assert bank["num_rollouts"].tolist() == [test_shots] * 40
    assert not bank["pooled"].any()


def test_rl_experiments_are_all_there() -> None:
    found = {name for name in EXPERIMENTS if name.startswith(tuple(RL))}
    expected = {f"{domain}_{method}" for domain in RL for method in METHODS[:4]}
    assert found == expected | {
        "point_navigation_context_vector",
        "cheetah_direction_context_vector",
        "point_navigation_maml_paper_text",
    }


def test_point_navigation_of_the_papers_text_differs_in_what_the_text_says(cache_dir: Path) -> None:
    config, algorithm, evaluation = built("point_navigation_maml_paper_text", cache_dir)
    other, *_ = built("point_navigation_maml", cache_dir)
    assert isinstance(algorithm.domain, PointNavigation)
    assert isinstance(algorithm.domain.environments, PointEnvironments)
    assert (algorithm.domain.environments.reward, algorithm.domain.environments.arrival) == ("squared_distance", "disc")
    assert (algorithm.inner.step_size, evaluation.step_sizes(40)) == (0.1, [0.1, 0.05, 0.05, 0.05])
    mine, theirs = training_config(config), training_config(other)
    assert {key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)} == {
        "domain.reward",
        "domain.arrival",
        "inner.step_size",
        "num_iterations",
    }
    assert config.num_iterations == 500


def test_multirun_makes_a_folder_for_each_job_and_outlives_those_that_fail(tiny: TinyRuns) -> None:
    process = tiny.start("-m", "seed=0,1,2", "inner.step_size=0.02,-1", "+debug=smoke")
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "Traceback" not in stderr
    assert stderr.count("the config is not valid") >= 3
    for seed in (0, 1, 2):
        assert f"seed={seed} inner.step_size=-1" in stderr, "each job that failed is named"
    records = [read_json(path) for path in tiny.runs_dir.glob("custom/*/run.json")]
    assert sorted((record["seed"], record["status"]) for record in records if record) == [
        (seed, "finished") for seed in (0, 1, 2)
    ]
    last = ("+debug=smoke", "seed=2", "inner.step_size=0.02")
    assert_same_run(tiny.folder(*last), tiny.in_folder("alone").run(*last))  # nothing of the earlier jobs is in it
