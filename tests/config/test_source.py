"""Hashes of a user's code: what changes them, and how a run is kept from being mixed with later code."""

from __future__ import annotations

import importlib
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import gymnasium
import pytest

import maml
from maml.config.schema import Settings
from maml.config.source import changed_code, code_hashes
from maml.errors import MamlError
from maml.experiment import run_experiment
from maml.record.provenance import changed_since
from maml.record.run_files import read_json
from maml.record.run_folder import RunFolder
from tests.config.test_schema import changed
from tests.runs import TinyRuns, file_contents

NET = '''"""A network."""
import own_layers
from torch import nn


class Net(nn.Module):
    """One hidden layer."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 4), own_layers.act(), nn.Linear(4, 1))

    def forward(self, x):
        return self.net(x)  # (S, 1)
'''
LAYERS = "from torch import nn\nact = nn.ReLU\n"

Edit = Callable[[str, str, str], None]


@pytest.fixture
def own_net(tiny: TinyRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Settings, Edit]]:
    """Returns settings with a user's network of two modules, and a function that edits one of them."""
    folder = tmp_path / "code"
    folder.mkdir()
    for name, text in (("own_net", NET), ("own_layers", LAYERS)):
        (folder / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(folder)

    def edit(module: str, old: str, new: str) -> None:
        path = folder / f"{module}.py"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))
        for name in ("own_net", "own_layers"):  # a new start of the program imports them again
            sys.modules.pop(name, None)
        importlib.invalidate_caches()

    words = ("model=module", "model.module._target_=own_net.Net", "num_iterations=2", "hardware.compile=false")
    yield tiny.config(*words), edit
    for name in ("own_net", "own_layers"):
        sys.modules.pop(name, None)


def test_hash_is_that_of_the_parsed_code_and_of_the_users_modules_it_imports(own_net: tuple[Settings, Edit]) -> None:
    settings, edit = own_net
    first = code_hashes(settings)
    assert list(first) == ["own_net.Net"]
    edit("own_net", '    """One hidden layer."""\n', '    """Four hidden units."""  # as in the paper\n\n')
    assert code_hashes(settings) == first, "comments and docstrings do not count"
    edit("own_layers", "nn.ReLU", "nn.Tanh")
    assert changed_code(first, code_hashes(settings)) == ["own_net.Net"]
    edit("own_layers", "nn.Tanh", "nn.ReLU")
    assert code_hashes(settings) == first
    assert changed_code({}, first) == changed_code(first, {}) == [], "older records have no hashes"


def test_what_only_a_function_imports_does_not_count(own_net: tuple[Settings, Edit], tmp_path: Path) -> None:
    settings, edit = own_net
    (tmp_path / "code" / "own_late.py").write_text("x = 1\n")
    edit("own_net", "        return self.net(x)", "        import own_late\n        return self.net(x)")
    first = code_hashes(settings)
    importlib.import_module("own_late")
    assert code_hashes(settings) == first, "whether it is loaded already would decide"
    sys.modules.pop("own_late")


def test_record_of_another_python_is_not_compared(own_net: tuple[Settings, Edit]) -> None:
    settings, edit = own_net
    path = run_folder_of(settings)
    record = path.read_text()
    edit("own_net", "nn.Linear(4, 1)", "nn.Linear(4, 1, bias=True)")
    assert changed_since(path.parent, settings) == ["the code of own_net.Net has changed"]
    path.write_text(record.replace(f'"python": "{platform.python_version()}"', '"python": "3.99.1"'))
    assert changed_since(path.parent, settings) == []


def run_folder_of(settings: Settings) -> Path:
    """Trains, and returns the path of the record."""
    run_experiment(settings, "custom")
    return RunFolder(settings, "custom").path / "run.json"


def test_function_as_target_is_hashed_and_trains(
    tiny: TinyRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_nets.py").write_text("from torch import nn\n\n\ndef small():\n    return nn.Linear(1, 1)\n")
    monkeypatch.syspath_prepend(tmp_path)
    folder = tiny.run("model=module", "model.module._target_=own_nets.small", "num_iterations=2")
    assert list((read_json(folder / "run.json") or {})["segments"][0]["code"]) == ["own_nets.small"]
    sys.modules.pop("own_nets")


def test_project_and_recorded_packages_are_not_hashed(tiny: TinyRuns) -> None:
    assert code_hashes(tiny.config()) == {}
    assert code_hashes(tiny.config("model=module", "model.module._target_=torch.nn.Identity")) == {}


def test_environment_is_hashed_where_its_class_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: TinyRuns
) -> None:
    (tmp_path / "own_env.py").write_text("from gymnasium.envs.classic_control.pendulum import PendulumEnv as Own\n")
    registration = "import gymnasium\ngymnasium.register('own/Env-v0', 'own_env:Own')\n"
    (tmp_path / "own_registry.py").write_text(registration)
    monkeypatch.syspath_prepend(tmp_path)
    settings = tiny.config(
        "domain=gymnasium_env", "domain.env_id=own_registry:own/Env-v0", "+domain.goals={g: [1.0, 2.0]}"
    )
    first = code_hashes(settings)
    name = "own_registry:own/Env-v0"
    assert list(first) == [name, f"{name} (registration)"]
    (tmp_path / "own_env.py").write_text("class Own: pass\n")
    os.utime(tmp_path / "own_env.py", ns=(0, 10**9))
    assert changed_code(first, code_hashes(settings)) == [name]
    (tmp_path / "own_registry.py").write_text(registration.replace("Own'", "Own', kwargs={'g': 5.0}"))
    os.utime(tmp_path / "own_registry.py", ns=(0, 10**9))
    assert changed_code(first, code_hashes(settings)) == [name, f"{name} (registration)"]
    del gymnasium.registry["own/Env-v0"]


def test_changed_code_is_refused_before_a_run_goes_on_or_is_evaluated(
    own_net: tuple[Settings, Edit], tiny: TinyRuns, caplog: pytest.LogCaptureFixture
) -> None:
    settings, edit = own_net
    run_experiment(settings, "custom")
    (folder,) = tiny.runs_dir.glob("custom/*")
    record = read_json(folder / "run.json")
    assert record and list(record["segments"][0]["code"]) == ["own_net.Net"]
    edit("own_layers", "nn.ReLU", "nn.Tanh")
    before = file_contents(tiny.runs_dir)
    evaluated = changed(changed(settings, "mode", "eval"), "evaluation.bank_seed", 3)
    for config in (
        settings,
        Settings(**evaluated),
        Settings(**evaluated | {"checkpoint": str(folder / "checkpoint.pt")}),
    ):
        with pytest.raises(MamlError, match=r"the code of own_net\.Net has changed since .*changed_sources=accept"):
            run_experiment(config, "custom")
    assert file_contents(tiny.runs_dir) == before
    with pytest.warns(UserWarning, match=r"the code of own_net\.Net has changed"):
        maml.load(folder, allow=["own_net"])
    run_experiment(Settings(**evaluated | {"changed_sources": "accept"}), "custom")
    assert "changed_sources=accept uses it" in caplog.text

    edit("own_layers", "nn.Tanh", "nn.ReLU")
    run_experiment(settings, "custom")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        maml.load(folder, allow=["own_net"])


def test_longer_run_goes_on_only_from_a_run_of_the_same_code(own_net: tuple[Settings, Edit], tiny: TinyRuns) -> None:
    settings, edit = own_net
    segments = {}
    for num_iterations, activation in ((2, "nn.ReLU"), (3, "nn.ReLU"), (4, "nn.Tanh")):
        if activation == "nn.Tanh":
            edit("own_layers", "nn.ReLU", "nn.Tanh")
        longer = Settings(**changed(settings, "num_iterations", num_iterations))
        run_experiment(longer, "custom")
        record = read_json(RunFolder(longer, "custom").path / "run.json")
        assert record
        segments[num_iterations] = [segment["first_iteration"] for segment in record["segments"]]
    assert segments == {2: [0], 3: [0, 2], 4: [0]}


EVALUATION = '''"""An evaluation."""
from maml.evaluation import Evaluation


class Own(Evaluation):
    """Measures as ours does."""

    factor = 1
'''


def test_changed_evaluation_is_refused(tiny: TinyRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    words = ("evaluation._target_=own_evaluation.Own", "num_iterations=2", "hardware.compile=false")
    for text in (EVALUATION, EVALUATION.replace("factor = 1", "factor = 100")):
        (tmp_path / "own_evaluation.py").write_text(text)
        os.utime(tmp_path / "own_evaluation.py", ns=(0, len(text) * 10**9))
        sys.modules.pop("own_evaluation", None)
        importlib.invalidate_caches()
        if text is EVALUATION:
            tiny.run(*words)
    for mode in ("train", "eval"):
        with pytest.raises(MamlError, match="own_evaluation"):
            tiny.run(*words, f"mode={mode}")
    sys.modules.pop("own_evaluation", None)
