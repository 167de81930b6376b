"""The package as others install it: a wheel in an empty folder, and an editable install seen from anywhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import maml
from maml.config import paths
from maml.record.run_files import read_json
from tests.runs import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# What is needed to build; a build reads nothing else.
SOURCES = ("maml", "conf", "results/cells.yaml", "results/paper", "results/checkpoints")
FILES = ("pyproject.toml", "README.md", "LICENSE", "train.py")


def copy(folder: Path) -> Path:
    """Copies the files of a clone that belong to the package."""
    folder.mkdir(parents=True)
    for name in (*FILES, *SOURCES):
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    return folder


def run(folder: Path, *words: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs Python in a folder, with only ``path`` in front of what is installed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a wheel's files, as an installer lays them."""
    folder = tmp_path_factory.mktemp("wheel")
    built = run(ROOT, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder))
    assert built.returncode == 0, built.stderr
    (file,) = folder.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder / "site")
    yield folder / "site"


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """A folder that has nothing in it, in another project's repository."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


def test_clone_finds_its_own_files() -> None:
    assert paths.IN_CLONE
    assert (paths.ROOT, paths.CONF, paths.RESULTS) == (ROOT, ROOT / "conf", ROOT / "results")


def test_version_stands_once() -> None:
    assert PROJECT["dynamic"] == ["version"]
    assert "version" not in PROJECT
    source = (ROOT / "maml" / "__init__.py").read_text()
    assert f'__version__ = "{maml.__version__}"' in source


def test_supported_pythons_are_named() -> None:
    assert PROJECT["requires-python"] == ">=3.11"
    for version in ("3.11", "3.12", "3.13"):
        assert f"Programming Language :: Python :: {version}" in PROJECT["classifiers"]


def test_wheel_holds_configs_and_weights(wheel: Path) -> None:
    for name in ("conf", "results/checkpoints", "results/paper"):
        wanted = {path.relative_to(ROOT / name) for path in (ROOT / name).rglob("*") if path.is_file()}
        assert {path.relative_to(wheel / "maml" / name) for path in (wheel / "maml" / name).rglob("*.*")} == wanted
    assert sorted(path.name.split("-")[0] for path in wheel.iterdir()) == ["maml", "maml"], "nothing beside the package"
    assert not list(wheel.rglob("runs"))
    (entry_points,) = wheel.glob("*.dist-info/entry_points.txt")
    assert "maml = maml.cli:main" in entry_points.read_text()


def test_wheel_loads_and_adapts_in_an_empty_folder(wheel: Path, empty: Path) -> None:
    code = """
import maml, torch
network = maml.load("omniglot_5way_1shot")
predictor = network.adapt(torch.rand(5, 28, 28).round(), list("abcde"))
print(maml.__file__, len(predictor(torch.rand(3, 28, 28).round())))
"""
    done = run(empty, "-c", code, path=wheel)
    assert done.stdout.split() == [str(wheel / "maml" / "__init__.py"), "3"], done.stderr
    assert not list(empty.iterdir())


def test_wheel_trains_in_an_empty_folder(wheel: Path, empty: Path) -> None:
    words = ("+experiment=sinusoid_10shot", "+debug=smoke", "hardware=cpu")
    done = run(empty, "-m", "maml", "train", *words, path=wheel)
    assert done.returncode == 0, done.stderr
    (folder,) = empty.glob("runs/sinusoid_10shot/*")
    record = read_json(folder / "run.json")
    assert record
    assert record["command"] == f"python -m maml train {' '.join(words)}"
    (segment,) = record["segments"]
    assert (segment["maml"], segment["commit"], segment["dirty"]) == (maml.__version__, None, None)
    assert [path.name for path in empty.iterdir()] == ["runs"]


def test_wheel_lists_its_experiments(wheel: Path, empty: Path) -> None:
    done = run(empty, "-m", "maml", "list", "sinusoid_10shot", path=wheel)
    assert done.stdout.split()[0] == "sinusoid_10shot", done.stderr


def test_wheel_says_how_to_train_without_a_clone(wheel: Path, empty: Path) -> None:
    done = run(empty, "-c", "import maml; maml.load('ant_velocity_maml')", path=wheel)
    assert "maml train +experiment=ant_velocity_maml" in done.stderr


def test_editable_install_is_right_in_the_folder_above_a_clone_named_maml(tmp_path: Path) -> None:
    clone = copy(tmp_path / "maml")
    hook = f"from hatchling.build import build_editable; build_editable({str(tmp_path)!r})"
    built = run(clone, "-c", hook)
    assert built.returncode == 0, built.stderr
    (file,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(file) as archive:
        archive.extractall(site)
    assert not (site / "maml").exists(), "an editable install holds no copy of anything"
    assert [path.read_text().strip() for path in site.glob("*.pth")] == [str(clone)]
    # The environment of the tests has an editable install of its own, which is taken out of the way.
    code = f"""
import site, sys
sys.path = [path for path in sys.path if path != {str(ROOT)!r}]
site.addsitedir({str(site)!r})
import maml
from maml.config.paths import CONF
print(maml.__file__, CONF)
"""
    wanted = [str(clone / "maml" / "__init__.py"), str(clone / "conf")]
    for folder in (tmp_path, clone, site):
        done = run(folder, "-c", code)
        assert done.stdout.split() == wanted, done.stderr
    done = run(tmp_path, "-c", f"{code}maml.load")
    assert done.returncode == 0, done.stderr


def test_nothing_asks_for_an_installed_distribution() -> None:
    asking = [path for path in (ROOT / "maml").rglob("*.py") if 'version("maml")' in path.read_text()]
    assert asking == []


@pytest.mark.slow
def test_wheel_installs_with_a_console_script(tmp_path: Path) -> None:
    words = ("-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(tmp_path / "site"), ".")
    done = run(copy(tmp_path / "clone"), *words)
    assert done.returncode == 0, done.stderr
    done = run(tmp_path, str(tmp_path / "site" / "bin" / "maml"), "list", "sinusoid", path=tmp_path / "site")
    assert "sinusoid_10shot" in done.stdout, done.stderr
