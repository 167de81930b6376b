"""Composition as train.py does it: overrides in any order, and the errors of a config that cannot be composed."""

from __future__ import annotations

import os

import pytest
from hydra.errors import HydraException

from maml.config.compose import compose
from maml.config.identity import digest, training_config
from maml.config.schema import build
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


def _of_maml(experiment: str) -> bool:
    config, _ = compose([f"+experiment={experiment}"])
    return config.algorithm == {"_target_": "maml.algorithm.maml.MAML"}


@pytest.mark.parametrize("experiment", [None, *(name for name in EXPERIMENTS if _of_maml(name))])
def test_fomaml_is_first_order_in_whatever_order_it_is_asked_for(experiment: str | None) -> None:
    chosen = [] if experiment is None else [f"+experiment={experiment}"]
    ids = set()
    for overrides in (["algorithm=fomaml", *chosen], [*chosen, "algorithm=fomaml"]):
        config, _ = compose(overrides)
        assert config.inner["order"] == 1
        assert build(config.inner).order == 1
        ids.add(digest(training_config(config)))
    assert len(ids) == 1


def test_data_root_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAML_DATA", "/somewhere")
    assert compose(["domain=omniglot", "model=conv4"])[0].domain["data_dir"] == "/somewhere"
    monkeypatch.delenv("MAML_DATA")
    assert compose(["domain=omniglot", "model=conv4"])[0].domain["data_dir"] == "data"
    assert "MAML_DATA" not in os.environ
