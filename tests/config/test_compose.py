"""Composition as train.py does it: overrides in any order, and the errors of a config that cannot be composed."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from hydra.errors import HydraException

from maml.config.compose import compose, compose_experiment
from maml.config.identity import training_config
from maml.config.schema import build
from maml.digest import digest
from maml.errors import MamlError
from tests.runs import ROOT, TinyRuns

EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("override", ["inner.step_sise=0.1", "model=mpl", "evaluation=curve", "experiment=zzz"])
def test_override_of_nothing_is_refused(tiny: TinyRuns, override: str) -> None:
    with pytest.raises(HydraException):
        tiny.config(override)


def test_mandatory_value_left_out_is_named(tiny: TinyRuns) -> None:
    with pytest.raises(MamlError, match=r"model\.module\._target_"):
        tiny.config("model=module")


def test_unresolvable_value_is_named(tiny: TinyRuns) -> None:
    with pytest.raises(MamlError, match="NOT_IN_THE_ENVIRONMENT"):
        tiny.config("data_dir=${oc.env:NOT_IN_THE_ENVIRONMENT}")


def test_debug_before_experiment_is_refused() -> None:
    with pytest.raises(MamlError, match=r"\+debug= must come after \+experiment=.*; swap the two"):
        compose(["+debug=smoke", f"+experiment={EXPERIMENTS[0]}"])


def test_experiment_is_a_folder_name() -> None:
    assert compose([f"+experiment={EXPERIMENTS[0]}"])[1] == EXPERIMENTS[0]
    assert compose([])[1] == "custom"


def test_threads_compose_each_its_own_config() -> None:
    with ThreadPoolExecutor(4) as threads:
        composed = list(threads.map(lambda seed: compose([f"seed={seed}"])[0].seed, range(8)))
    assert composed == list(range(8))


def test_fomaml_is_first_order_in_whatever_order_it_is_asked_for() -> None:
    maml = {"_target_": "maml.algorithm.maml.MAML"}
    of_maml = [name for name in EXPERIMENTS if compose_experiment(name).algorithm == maml]
    assert "sinusoid_10shot" in of_maml and "omniglot_5way_1shot" in of_maml
    for chosen in [[], *([f"+experiment={name}"] for name in of_maml)]:
        ids = set()
        for overrides in (["algorithm=fomaml", *chosen], [*chosen, "algorithm=fomaml"]):
            config, _ = compose(overrides)
            assert config.inner["order"] == 1, overrides
            assert build(config.inner).order == 1, overrides
            ids.add(digest(training_config(config)))
        assert len(ids) == 1, chosen


def test_data_root_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAML_DATA", "/somewhere")
    assert compose(["domain=omniglot", "model=conv4"])[0].domain["data_dir"] == "/somewhere"
    monkeypatch.delenv("MAML_DATA")
    assert compose(["domain=omniglot", "model=conv4"])[0].domain["data_dir"] == "data"
    assert "MAML_DATA" not in os.environ
