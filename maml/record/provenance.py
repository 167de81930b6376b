"""The provenance of a run: its command, commit and package versions; and what has changed since it was trained."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from maml.config.paths import IN_CLONE, ROOT
from maml.config.schema import Settings
from maml.config.source import changed_code, code_hashes
from maml.hardware import distributed
from maml.record.contents import Content, RunRecord
from maml.record.run_files import read

_PACKAGES = ("torch", "numpy", "hydra-core", "omegaconf", "gymnasium", "mujoco")


class _Bundle(Content):
    """The content of a bundle's ``bundle.json``; the hashes of its files are those of git."""

    commit: str
    files: dict[str, str]


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages on which numbers may depend, by name."""
    packages = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            packages[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    packages["torch"] = torch.__version__
    return packages


def command_line() -> str:
    """Returns the command that started this process, in a form that can be copied to a shell."""
    script, arguments = Path(sys.argv[0]), sys.argv[1:]
    num_processes = distributed.local_world_size()
    torchrun = ["torchrun", f"--nproc-per-node={num_processes}"] if distributed.world_size() > 1 else []
    if script.name == "maml" or script.parts[-2:] == ("maml", "__main__.py"):  # the console script, see maml.cli
        start = ["maml"] if script.name == "maml" and not torchrun else [*(torchrun or ["python"]), "-m", "maml"]
        verb = "eval" if "mode=eval" in arguments else "train"
        return shlex.join([*start, verb, *(argument for argument in arguments if argument != "mode=eval")])
    script = script.resolve()
    shown = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
    return shlex.join([*(torchrun or ["python"]), str(shown), *arguments])


def commit() -> dict[str, Any]:
    """Returns the commit of the clone or bundle, and whether tracked files differ from it; both are None elsewhere.

    An installed wheel, or a copy of the files, may be inside another project's repository. That commit is not used.
    """
    if not IN_CLONE:
        return {"commit": None, "dirty": None}
    try:
        top, head, status = (
            subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True, timeout=20).stdout
            for words in (
                ["rev-parse", "--show-toplevel"],
                ["rev-parse", "HEAD"],
                # Without results/, because a run may write there.
                ["status", "--porcelain", "--untracked-files=no", "--", ".", ":!results"],
            )
        )
    except (OSError, subprocess.SubprocessError):
        return _bundled_commit()
    if Path(top.rstrip("\n")).resolve() != ROOT:
        return _bundled_commit()
    return {"commit": head.strip(), "dirty": bool(status.strip())}


def _bundled_commit() -> dict[str, Any]:
    """Does for the files of a bundle (scripts/bundle.py), by their hashes, what `commit` does for a clone."""
    bundle = read(ROOT / "bundle.json", _Bundle)
    if bundle is None:
        return {"commit": None, "dirty": None}
    dirty = any(_blob_hash(ROOT / name) != recorded for name, recorded in bundle.files.items())
    return {"commit": bundle.commit, "dirty": dirty}


def _blob_hash(path: Path) -> str:
    """Returns the hash that git gives to the content of a file; empty if it cannot be read."""
    try:
        content = path.read_bytes()
    except OSError:
        return ""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def changed_since(folder: Path, settings: Settings, data_digest: str | None = None) -> list[str]:
    """Says in words what has changed since a run was trained: the code of the user's classes, or the data set.

    Args:
        folder: the run's folder; without a record of its code by this version of Python, no code has changed.
        settings: the run's settings.
        data_digest: a hash of the data set; None does not compare it.

    Raises:
        MamlError: if ``run.json`` is damaged.
    """
    earlier: dict[str, str] = {}
    earlier_data = data_digest
    record = read(folder / "run.json", RunRecord)
    for segment in record.segments if record else ():
        earlier_data = segment.data or earlier_data
        if _minor(segment.versions.get("python", "")) == _minor(platform.python_version()):
            earlier |= segment.code
    names = changed_code(earlier, code_hashes(settings)) if earlier else []
    changes = [f"the code of {', '.join(names)} has changed"] if names else []
    if data_digest and earlier_data != data_digest:
        changes.append(f"the data of {settings.domain['_target_']} have changed")
    return changes


def _minor(version: str) -> list[str]:
    """``3.11.7`` -> ``[3, 11]``."""
    return version.split(".")[:2]
