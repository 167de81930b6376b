"""A run's id: the settings that change it, the settings that do not, and the unchanged ids of committed runs."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import get_class
from omegaconf import OmegaConf

from maml.algorithm.finetune import FineTune
from maml.config.compose import compose_experiment
from maml.config.identity import differences, evaluation_config, training_config, with_own_defaults
from maml.config.schema import check
from maml.digest import digest
from tests.config.test_schema import changed
from tests.runs import ROOT, TinyRuns

RUNS = sorted(path.parent for path in (ROOT / "results" / "runs").glob("*/*/run.json"))
# Committed runs whose command had overrides besides the experiment.
ADDED = {
    ("sinusoid_10shot", run_id): ("inner.step_size=0.01",)  # trained before the experiment's step size was settled
    for run_id in ("2f60af4e622c", "c2cb79b89b9b", "89e00df25d96")
} | {
    # Another reading: exact curvature instead of the authors' finite differences.
    **{
        ("point_navigation_maml", run_id): ("outer=trpo",)
        for run_id in (
            *("95215b3f8098", "fbe05b78f620", "089767d282b1", "cb50b6486523", "c35db3b8d8ba"),
            *("089767d282b1_epyc", "cb50b6486523_epyc", "c35db3b8d8ba_epyc"),
        )
    },
    ("point_navigation_context_vector", "ad36db25ce3c"): ("outer=trpo",),
    # The other way round.
    ("cheetah_direction_maml", "79206e56372d"): ("outer.curvature=finite_difference",),
    ("cheetah_direction_maml", "bcf6212fd215"): ("outer.curvature=finite_difference",),
    ("cheetah_direction_maml", "e26c057a1696"): ("outer.curvature=finite_difference",),
    ("cheetah_direction_maml", "c45bcfe057a6"): ("outer.backtrack=0.95", "outer.num_tries=60"),
    ("omniglot_5way_1shot_matching", "6c5acb40eb9b"): ("algorithm.temperature=1",),
    ("omniglot_5way_1shot_matching", "c2f041cc3c9d"): ("algorithm.temperature=0.1",),
    ("omniglot_5way_1shot_pixels", "d03577b35a91"): ("domain.split=shuffled", "domain.rotations=task"),
    ("omniglot_5way_5shot_pixels", "4c3c7b2e3fa1"): ("domain.split=shuffled", "domain.rotations=task"),
}

every_committed_run = pytest.mark.parametrize("folder", RUNS, ids=lambda path: f"{path.parent.name}/{path.name}")


def run_id_of(folder: Path) -> str:
    """Returns the id in a folder's name; the same run from another machine has a name such as ``<run id>_xeon``."""
    return folder.name.partition("_")[0]


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


@every_committed_run
def test_committed_run_is_named_by_the_settings_it_recorded(folder: Path) -> None:
    assert run_id_of(folder) == record(folder)["run_id"] == digest(record(folder)["training"])


@every_committed_run
def test_experiment_of_a_committed_run_still_gives_its_id(folder: Path) -> None:
    experiment = folder.parent.name
    settings = compose_experiment(experiment, ADDED.get((experiment, folder.name), ()))
    mine = training_config(replace(settings, seed=record(folder)["seed"]))
    assert digest(mine) == run_id_of(folder), differences(mine, record(folder)["training"])


@every_committed_run
def test_config_beside_a_committed_run_still_gives_its_id(folder: Path) -> None:
    config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    mine = training_config(check(config))  # type: ignore[arg-type]
    assert digest(mine) == run_id_of(folder), differences(mine, record(folder)["training"])


def test_runs_that_need_more_than_their_experiment_are_committed() -> None:
    assert ADDED.keys() <= {(folder.parent.name, folder.name) for folder in RUNS}


UNRELATED = (
    "hardware.num_threads=2",
    "hardware.task_chunk=1",
    "hardware.deterministic=true",
    "hardware.recompute=true",
    "hardware=auto",
    "seeds=3",
    "logger=wandb",
    "evaluation.num_tasks=7",
    "evaluation.num_shots=[3]",
    "evaluation.step_size=0.5",
    "mode=eval",
    "checkpoint=a.pt",
    "run_dir=b",
    "data_dir=elsewhere",
    "log_every=9",
    "checkpoint_every=9",
)

RELATED = (
    "seed=1",
    "num_iterations=41",
    "meta_batch_size=9",
    "inner.step_size=0.5",
    "inner.num_steps=3",
    "inner.order=1",
    "inner.second_order_from=9",
    "inner.adapt=[*.weight]",
    "outer.step_size=0.5",
    "outer.clip=1",
    "outer.eps=1e-4",
    "domain.num_shots=2",
    "domain.num_query=3",
    "model.activation=tanh",
    "algorithm=fomaml",
)


@pytest.mark.parametrize("domain", ["sinusoid", "omniglot"])
def test_run_id_depends_on_all_that_training_does_and_on_nothing_else(tiny: TinyRuns, domain: str) -> None:
    tiny = tiny.on_domain(domain)
    own = tiny.folder().name
    assert [override for override in UNRELATED if digest(training_config(tiny.config(override))) != own] == []
    ids = {override: tiny.folder(override).name for override in RELATED}
    assert [override for override, run_id in ids.items() if run_id == own] == []
    assert ids["inner.order=1"] == ids["algorithm=fomaml"], "they are the same run"
    assert len(set(ids.values())) == len(ids) - 1


def test_key_at_its_default_has_no_part_in_the_run_id(tiny: TinyRuns) -> None:
    config = tiny.config()
    own = digest(training_config(config))
    seen = set()
    for part in ("domain", "model", "inner", "outer", "algorithm"):
        for key, parameter in inspect.signature(get_class(getattr(config, part)["_target_"])).parameters.items():
            default = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
            if key in getattr(config, part) and getattr(config, part)[key] == default:
                seen.add(f"{part}.{key}")
                assert digest(training_config(check(changed(config, f"{part}.{key}", ...)))) == own, key
    assert {"outer.clip", "outer.betas", "model.normalization", "domain.num_query"} <= seen


def test_run_id_ignores_how_a_number_is_written(tiny: TinyRuns) -> None:
    assert tiny.folder("inner.step_size=1") == tiny.folder("inner.step_size=1.0")
    assert tiny.folder("outer.clip=10") == tiny.folder("outer.clip=1e1")


def test_run_id_ignores_the_order_of_keys(tiny: TinyRuns) -> None:
    config = tiny.config()
    turned = dict(reversed(config.as_dict().items()))
    turned["inner"] = dict(reversed(turned["inner"].items()))
    assert digest(training_config(check(turned))) == digest(training_config(config))


def test_differences_name_both_values() -> None:
    assert differences({"a": 1, "b": 2}, {"b": 3, "c": 4}) == (
        "  a: 1 here, its default there\n  b: 2 here, 3 there\n  c: its default here, 4 there"
    )


class OwnFineTune(FineTune):
    """A baseline of a user, which may train in another way."""


def test_subclass_has_runs_of_its_own(tiny: TinyRuns) -> None:
    ours, neighbor = (tiny.config(f"algorithm={name}") for name in ("finetune", "nearest_neighbor"))
    own = replace(ours, algorithm={"_target_": f"{__name__}.OwnFineTune"})
    assert training_config(ours) == training_config(neighbor) != training_config(own)
    chosen = [replace(each, validate_every=5) for each in (ours, neighbor)]
    assert training_config(chosen[0]) != training_config(chosen[1]), "each keeps a best theta of its own"
    assert "algorithm._target_" in evaluation_config(ours) and "algorithm._target_" not in evaluation_config(own)


def test_arguments_of_own_classes_at_their_default_come_from_the_config() -> None:
    recorded = {"algorithm._target_": "mine.Own", "algorithm.scale": 2.0, "model.module._target_": "mine.Net"}
    recorded |= {"inner._target_": "mine.Inner", "outer._target_": "maml.outer.adam.Adam", "domain._target_": "mine.D"}
    config = {
        "algorithm": {"_target_": "mine.Own", "scale": 3.0, "strength": 0.01, "part": {"_target_": "mine.Part"}},
        "model": {"module": {"_target_": "mine.Net", "width": 8}, "vectorize": True},
        "inner": {"_target_": "mine.Another", "step_size": 0.1},
        "outer": {"_target_": "maml.outer.adam.Adam", "clip": 1.0},
        "domain": {"_target_": "mine.D", "data_dir": "here"},
    }
    found = with_own_defaults(recorded, config)
    assert found == recorded | {"algorithm.strength": 0.01, "model.module.width": 8}
    assert with_own_defaults(recorded, {"model": None, "algorithm": "mine.Own"}) == recorded
