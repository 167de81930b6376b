"""scripts/bundle.py on a tiny clone with tiny wheels: contents, refusals, and the bundle's commit and Makefile."""

from __future__ import annotations

import fcntl
import json
import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from maml.errors import MamlError
from maml.record import provenance
from tests.paper.fake_runs import make_run, make_run_with_checkpoint
from tests.runs import ROOT

SCRIPT = runpy.run_path(str(ROOT / "scripts" / "bundle.py"))
PROJECT = '[project]\ndependencies = ["one>=1", "torch>=1", "free"]\n[build-system]\nrequires = ["backend>=1"]\n'
# Logs what it is called with; as "-m venv FOLDER" it makes an environment of itself.
FAKE_PYTHON = """#!/usr/bin/env bash
echo "no index: $PIP_NO_INDEX, links: $PIP_FIND_LINKS, no plugins: $PYTEST_DISABLE_PLUGIN_AUTOLOAD, $*" >> log
if [ "$1 $2" = "-m venv" ]; then mkdir -p .venv/bin; cp "$0" .venv/bin/python; fi
"""

Bundle = Callable[..., Path]


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone of a tiny project, with a data set; pip finds its packages in a folder and looks nowhere else."""
    clone, wheels = tmp_path / "clone", tmp_path / "index"
    (clone / "results").mkdir(parents=True)
    (clone / "pyproject.toml").write_text(PROJECT)
    (clone / "constraints.txt").write_text("backend==1.0\none==1.0\nnvidia-it==1.0\ntorch==1.0\n")
    (clone / "code.py").write_text("answer = 42\n")
    (clone / "results" / "table.md").write_text("committed\n")
    shutil.copy(ROOT / "Makefile", clone)
    git(tmp_path, "init", "-q", "clone")
    git(clone, "add", ".")
    git(clone, "commit", "-qm", "first")
    for name in ("backend", "free", "nvidia_it", "one", "torch"):
        make_wheel(wheels, name)
    make_wheel(wheels, "editables", version="0.5")
    (tmp_path / "data" / "tiny").mkdir(parents=True)
    (tmp_path / "data" / "tiny" / "images.zip").write_bytes(bytes(5000))
    (tmp_path / "data" / "tiny").chmod(0o555)
    for name, value in (
        ("PIP_NO_INDEX", "1"),
        ("PIP_FIND_LINKS", str(wheels)),
        ("PIP_CONFIG_FILE", os.devnull),
        ("MAML_DATA", str(tmp_path / "data")),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(SCRIPT["main"].__globals__, "ROOT", clone)
    return clone


@pytest.fixture
def bundle(clone: Path, tmp_path: Path) -> Bundle:
    """Makes a bundle, and returns its folder as it is on the other machine, inside another project's repository."""

    def make(*arguments: str) -> Path:
        out, there = tmp_path / "out.tar", tmp_path / "there"
        SCRIPT["main"]([str(out), *arguments])
        git(tmp_path, "init", "-q", "there")
        git(there, "commit", "-qm", "another project", "--allow-empty")
        subprocess.run(["tar", "xf", str(out)], cwd=there, check=True)
        return there / "maml-bundle"

    return make


@pytest.fixture
def locked(clone: Path) -> Iterator[Path]:
    """A run in which a process is training."""
    folder = make_run(clone / "runs", seed=3, done=500, evaluated=False, status="running")
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def git(folder: Path, *words: str) -> None:
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=folder, check=True)


def make_wheel(folder: Path, name: str, field: str = "", version: str = "1.0") -> None:
    """Makes a wheel that holds nothing; its metadata may have one field more."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{field}\n"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def wheels_in(folder: Path) -> set[str]:
    return {path.name.partition("-")[0] for path in folder.glob("wheels/*.whl")}


def test_bundle_holds_code_wheels_and_data(bundle: Bundle, clone: Path, tmp_path: Path) -> None:
    (clone / "untracked").touch()
    folder = bundle("--data", "tiny", "--python", "3.12")
    code = {"pyproject.toml", "constraints.txt", "code.py", "results/table.md", "Makefile"}
    others = {"bundle.json", "data/tiny/images.zip", "wheels/constraints.txt"}
    assert {name for name in contents(folder) if not name.endswith(".whl")} == code | others
    assert wheels_in(folder) == {"backend", "editables", "free", "nvidia_it", "one", "torch"}
    assert (folder / "wheels" / "constraints.txt").read_bytes() == (clone / "constraints.txt").read_bytes()
    (folder / "data" / "tiny" / "new").touch()  # what is write-protected here is not so there
    (folder.parent.parent / "data" / "tiny").chmod(0o755)

    said = json.loads((folder / "bundle.json").read_text())
    assert (said["dirty"], said["python"], said["without"]) == (False, "3.12", [])
    assert set(said["files"]) == code - {"results/table.md"}
    assert set(said["bytes"]) == {"code", "data", "runs", "wheels"}
    total = sum(said["bytes"].values()) + (folder / "bundle.json").stat().st_size
    assert 0 <= total + tarfile.RECORDSIZE - (tmp_path / "out.tar").stat().st_size <= 2 * tarfile.RECORDSIZE


def test_data_behind_links_come_along_as_files(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "class").mkdir(parents=True)
    (tmp_path / "elsewhere" / "class" / "0.png").write_bytes(b"pixels")
    (tmp_path / "data" / "own").mkdir()
    (tmp_path / "data" / "own" / "train").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "own" / "test").symlink_to(tmp_path / "elsewhere")
    folder = bundle("--data", "own") / "data" / "own"
    assert contents(folder) == {"train/class/0.png", "test/class/0.png"}
    assert not [path for path in folder.rglob("*") if path.is_symlink()]


def test_link_in_a_circle_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "data" / "own" / "train").mkdir(parents=True)
    (tmp_path / "data" / "own" / "train" / "again").symlink_to("..")
    with pytest.raises(MamlError, match=r"own/train/again is a link to a folder that it is in itself"):
        bundle("--data", "own")


def test_dependencies_without_a_pin_come_along(bundle: Bundle, tmp_path: Path) -> None:
    make_wheel(tmp_path / "index", "cudnn")
    make_wheel(tmp_path / "index", "torch", "Requires-Dist: cudnn")
    assert "cudnn" in wheels_in(bundle())


def test_package_that_needs_a_later_patch_of_python_comes_along(bundle: Bundle, tmp_path: Path) -> None:
    make_wheel(tmp_path / "index", "one", "Requires-Python: >=3.12.2")
    assert "one" in wheels_in(bundle("--python", "3.12"))


def test_packages_left_out_have_neither_wheel_nor_pin(bundle: Bundle, tmp_path: Path) -> None:
    make_wheel(tmp_path / "index", "one", "Requires-Dist: torch")
    folder = bundle("--without", "Torch")
    assert wheels_in(folder) == {"backend", "editables", "free", "one"}
    assert (folder / "wheels" / "constraints.txt").read_text() == "backend==1.0\none==1.0\n"


def test_unfinished_runs_go_along_without_locks(
    bundle: Bundle, clone: Path, locked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(clone / "runs")
    folder = make_run_with_checkpoint(clone / "runs", seed=1, done=500, evaluated=False, status="interrupted")
    newer = make_run(clone / "runs", seed=2, done=500, evaluated=False, status="interrupted")
    large = make_run(clone / "runs", seed=4, done=500, evaluated=False, status="interrupted")
    os.utime(folder / "run.json", (0, 0))
    for name in ("lock", "lock.marker", "checkpoint.previous.pt", ".run.json.123"):
        (folder / name).touch()
    (large / "metrics.jsonl").write_bytes(bytes(400_000))
    there = bundle("--max-run-size", "300kB")
    runs = [there / "runs" / path.relative_to(clone / "runs") for path in (newer, folder)]
    wanted = {runs[0] / "run.json", runs[1] / "run.json", runs[1] / "checkpoint.pt"}
    assert {path for path in (there / "runs").rglob("*") if path.is_file()} == wanted
    with tarfile.open(there.parents[1] / "out.tar") as tar:
        records = [Path(name).parent.name for name in tar.getnames() if name.endswith("/run.json")]
    assert records == [newer.name, folder.name], "the newest comes first"
    errors = capsys.readouterr().err
    assert f"left out: {locked} is in use by a process" in errors
    assert f"left out: {large} has 0.4 MB, more than --max-run-size" in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "images"], "there is no data set images in .*data, which has tiny; name one of its folders"),
        (["--without", "torchh"], "no package torchh is needed"),
        (["--max-size", "1kB"], r"would have 0.0 MB \(code 0.0, data 0.0, runs 0.0\), more than --max-size; leave"),
        (["--max-size", "25kB"], r"code 0.0, data 0.0, runs 0.0, wheels 0.0, bundle.json 0.0\), more than --max-size"),
    ],
)
def test_what_cannot_be_packed_is_refused(arguments: list[str], message: str, bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "out.tar").write_text("an earlier bundle")
    with pytest.raises(MamlError, match=message):
        bundle(*arguments)
    assert (tmp_path / "out.tar").read_text() == "an earlier bundle"


def test_uncommitted_changes_are_refused(bundle: Bundle, clone: Path, tmp_path: Path) -> None:
    (clone / "results" / "table.md").write_text("changed\n")
    with pytest.raises(MamlError, match=r"1 tracked files have uncommitted changes \(results/table.md is the first\)"):
        bundle()
    assert not (tmp_path / "out.tar").exists()


def test_folder_in_another_repository_is_no_clone(bundle: Bundle, clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCRIPT["main"].__globals__, "ROOT", clone / "results")
    with pytest.raises(MamlError, match="is not a git clone"):
        bundle()


def test_missing_wheel_is_refused_with_the_last_line_of_pip(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "index" / "one-1.0-py3-none-any.whl").unlink()
    with pytest.raises(MamlError, match=r"pip cannot get all wheels \(ERROR: No matching distribution found for one"):
        bundle()
    assert not (tmp_path / "out.tar").exists()


def test_interrupted_writing_leaves_the_earlier_bundle(
    bundle: Bundle, clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    (tmp_path / "out.tar").write_text("an earlier bundle")
    monkeypatch.setattr(tarfile.TarFile, "add", interrupt)
    with pytest.raises(KeyboardInterrupt):
        bundle()
    assert (tmp_path / "out.tar").read_text() == "an earlier bundle"
    assert not list(tmp_path.glob(".out.tar*"))


def test_run_in_a_bundle_records_its_commit_and_changed_files(
    bundle: Bundle, clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=clone, capture_output=True, text=True, check=True)
    folder = bundle()
    monkeypatch.setattr(provenance, "ROOT", folder)
    clean = {"commit": head.stdout.strip(), "dirty": False}
    assert provenance.commit() == clean
    (folder / "results" / "table.md").write_text("a run wrote this\n")
    (folder / "new.py").touch()
    assert provenance.commit() == clean
    (folder / "code.py").write_text("answer = 43\n")
    assert provenance.commit() == clean | {"dirty": True}
    (folder / "code.py").unlink()
    assert provenance.commit() == clean | {"dirty": True}
    (folder / "bundle.json").write_text("{}")
    with pytest.raises(MamlError, match="commit is missing"):
        provenance.commit()
    (folder / "bundle.json").unlink()
    assert provenance.commit() == {"commit": None, "dirty": None}


@pytest.mark.parametrize(("without", "site"), [([], ""), (["--without", "torch"], "--system-site-packages ")])
def test_setup_in_a_bundle_uses_its_wheels_only(bundle: Bundle, without: list[str], site: str) -> None:
    folder = bundle(*without)
    venv, install, test = make_test(folder)
    assert venv.endswith(f"-m venv {site}.venv")
    assert install.startswith("no index: 1, links: wheels, ")
    assert install.endswith("--constraint wheels/constraints.txt --editable .[dev]")
    # Those of the other machine's Python; xdist is loaded by its name.
    assert f"no plugins: {'1' if site else ''}, -m pytest -q -p xdist " in test


def test_setup_in_a_clone_is_as_before(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    venv, install, test = make_test(clone)
    assert venv == "no index: , links: , no plugins: , -m venv .venv"
    assert install.startswith("no index: , links: , no plugins: , -m pip install ")
    assert install.endswith("--constraint constraints.txt --editable .[dev]")
    assert test.startswith("no index: , links: , no plugins: , -m pytest ")


def test_setup_with_another_python_names_the_right_one(bundle: Bundle) -> None:
    folder = bundle("--python", "3.99")
    done = subprocess.run(["make", "setup"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode
    assert "wheels/ is for Python 3.99; make PYTHON=python3.99 ..." in done.stderr
    assert not (folder / ".venv").exists()


def test_setup_with_a_python_that_lacks_what_was_left_out_names_it(bundle: Bundle) -> None:
    this_python = f"{sys.version_info.major}.{sys.version_info.minor}"
    folder = bundle("--python", this_python, "--without", "torch")
    bare = folder / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    command = ["make", "setup", f"PYTHON={bare}/bin/python"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode
    assert "this Python lacks torch, which the bundle leaves out; make PYTHON=..." in done.stderr
    assert not (folder / ".venv").exists()


def make_test(folder: Path) -> list[str]:
    """Calls `make test` with a Python that does nothing; returns its last calls: venv, pip and pytest."""
    (folder / "python").write_text(FAKE_PYTHON)
    (folder / "python").chmod(0o755)
    subprocess.run(["make", "test", f"PYTHON={folder / 'python'}"], cwd=folder, check=True)
    return (folder / "log").read_text().splitlines()[-3:]
