"""Names of classes: a moved class keeps the ids of its runs, and its old configs can still be built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra.utils import get_class

from maml.algorithm.maml import MAML
from maml.config import names
from maml.config.identity import training_config
from maml.config.schema import build, check
from maml.digest import digest
from maml.errors import MamlError
from maml.model import mlp
from tests.config.test_schema import changed
from tests.runs import TinyRuns

OLD, NEW = "maml.model.mlp.MLP", "networks.perceptron.MLP"


@pytest.fixture
def moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type:
    """Moves MLP to another module, which is returned."""
    package = tmp_path / "sources" / "networks"
    package.mkdir(parents=True)
    (package / "perceptron.py").write_text(Path(mlp.__file__).read_text())
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.delattr(mlp, "MLP")
    return get_class(NEW)


def run_id(config: Any) -> str:
    return digest(training_config(check(config)))


def test_class_that_moves_keeps_the_ids_of_its_runs(
    tiny: TinyRuns, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tiny.config().as_dict()
    before = run_id(old)
    new = changed(old, "model._target_", NEW)
    request.getfixturevalue("moved")
    assert run_id(new) != before, "a class that no run knows has a name of its own"
    monkeypatch.setitem(names.MOVED, NEW, OLD)
    assert run_id(new) == before
    assert run_id(old) == before
    assert run_id(changed(new, "model.hidden_sizes", [3])) == run_id(changed(old, "model.hidden_sizes", [3])) != before


def test_config_with_the_old_address_still_builds(tiny: TinyRuns, moved: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(names.MOVED, NEW, OLD)
    for settings in (tiny.config(), tiny.config(f"model._target_={NEW}")):
        model: Any = build(settings.model, in_shape=(1,), out_dim=1)
        assert type(model) is moved
        assert model.sizes == [1, 40, 40, 1]  # type: ignore[attr-defined]


def test_name_that_never_moved_is_the_address() -> None:
    assert names.stable_name(OLD) == names.current_address(OLD) == OLD


def test_every_class_that_moved_is_where_the_table_says() -> None:
    for address, stable in names.MOVED.items():
        assert names.locate(stable) is names.locate(address) is get_class(address)
        assert names.stable_name(address) == stable
        assert names.current_address(stable) == address
    assert len(set(names.MOVED.values())) == len(names.MOVED), "two classes cannot share a name"


def test_class_is_located_by_its_module_and_name_only() -> None:
    assert names.locate("maml.algorithm.maml.MAML") is MAML
    for address in ("maml.load", "maml.config.names.locate", "maml.config.names.importlib", "os.system"):
        with pytest.raises(TypeError, match="not a class"):
            names.locate(address)
    for address in ("maml.algorithm.maml.MAML.name", "maml.config.names.importlib.abc.Loader", "MAML", ""):
        with pytest.raises((ImportError, ValueError)):
            names.locate(address)


def test_file_from_somebody_else_may_name_classes_of_this_package_and_of_allowed_modules() -> None:
    assert names.locate("maml.algorithm.maml.MAML", allow=[]) is MAML
    assert names.locate("maml.hardware.Hardware", allow=[]).__name__ == "Hardware"
    assert names.locate("torch.nn.Linear", allow=["torch"]) is names.locate("torch.nn.Linear", allow=["torch.nn"])
    for address, allow in [
        ("torch.nn.Linear", []),
        ("torch.nn.Linear", ["torch.n"]),
        ("torch.nn.Linear", ["torch.nn.Linear"]),
    ]:
        with pytest.raises(MamlError, match=r'torch\.nn\.Linear needs the module torch\.nn, .*allow=\["torch"\]'):
            names.locate(address, allow)
    with pytest.raises(MamlError, match=r'Mapping needs the module collections\.abc, .*allow=\["collections"\]'):
        names.locate("maml.config.names.Mapping", allow=[])  # it is imported there, but defined elsewhere


def test_keys_that_import_a_module_are_found_at_any_depth() -> None:
    config = {
        "a": {"_target_": "b.C", "d": [{"_target_": "e.F"}, {5: {"_target_": "maml.hardware.Hardware"}}]},
        "g": "h.I",
    }
    found = {key: module for key, _, module in names.named_modules(config)}
    assert found == {"a._target_": "b", "a.d.0._target_": "e", "a.d.1.5._target_": "maml.hardware.base"}
    assert list(names.named_modules({"env_id": "Pendulum-v1"})) == []
    assert list(names.named_modules({"env_id": "a.b:C-v0"})) == [("env_id", "a.b:C-v0", "a.b")]
