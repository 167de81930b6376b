"""Packs all that a machine without network needs into one tar file: code, wheels, data and unfinished runs.

    python scripts/bundle.py maml-bundle.tar --python 3.12 --without torch,torchvision --data omniglot

There: `tar xf maml-bundle.tar && cd maml-bundle && make test`. The Makefile installs from wheels/ and asks no network.
A run there records the commit of the bundle, and whether a file was changed since.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from maml.cli.scripts import exit_with
from maml.config.paths import ROOT
from maml.errors import MamlError
from maml.record.atomic import write_atomically
from maml.record.index import read_runs
from maml.record.lock import is_held
from maml.record.transfer import is_portable

TOP = "maml-bundle"
Files = dict[str, Path]
"""Files by their path in the bundle."""

_SOURCE_ONLY = {"antlr4-python3-runtime"}  # published without a wheel; pure Python, so one wheel fits all machines
_FOR_EDITABLE = "editables~=0.3"  # hatchling asks for it in an editable install; no file of ours names it
_OF_TORCH = re.compile(r"triton|(nvidia|cuda)-.+")  # of no use without the torch that they were made for
_UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9}


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the bundle and prints the sizes of its parts.

    Raises:
        MamlError: if it cannot be made, or would be too large. No file is left behind then.
    """
    options = _parser().parse_args(arguments)
    if not options.out.parent.is_dir():
        raise MamlError(f"there is no folder {options.out.parent} for the bundle; make it, or name another file")
    commit = _clean_commit()
    requirements, constraints = _requirements(options.without)
    code = _git("archive", "--format=tar", f"--prefix={TOP}/", "HEAD")
    parts = {"data": _data_files(options.data), "runs": _run_files(options.max_run_size)}
    sizes = {"code": len(code)} | {part: _tar_size(files) for part, files in parts.items()}
    _refuse_too_large(sizes, options.max_size)  # the wheels come later, since their download takes long

    with tempfile.TemporaryDirectory() as folder:
        wheels = Path(folder)
        print(f"wheels for Python {options.python}, with pip: this may take minutes", flush=True)
        _download(wheels, requirements, options)
        (wheels / "constraints.txt").write_text(constraints)
        parts["wheels"] = _files_in(wheels, "wheels")
        sizes["wheels"] = _tar_size(parts["wheels"])
        description = {
            "commit": commit,
            "dirty": False,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "python": options.python,
            "platform": options.platform or [sysconfig.get_platform()],
            "without": options.without,
            "bytes": sizes,
            "files": _blob_hashes(),
        }
        text = (json.dumps(description, indent=1) + "\n").encode()
        _refuse_too_large(sizes | {"bundle.json": len(text)}, options.max_size)
        write_atomically(options.out, lambda file: _write(file, text, code, parts))
    print(f"{options.out} has commit {commit[:7]}: {_sizes_text(sizes)}")


def _parser() -> argparse.ArgumentParser:
    def names(text: str) -> list[str]:
        return [name for name in text.split(",") if name]

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", metavar="OUT.tar", nargs="?", type=Path, default=Path(f"{TOP}.tar"), help="the new file")
    this_python = f"{sys.version_info.major}.{sys.version_info.minor}"
    parser.add_argument(
        "--python", type=_python, default=this_python, help=f"Python there (default: {this_python}, as here)"
    )
    parser.add_argument(
        "--platform",
        type=names,
        default=[],
        help="pip's platform tags there, as in manylinux_2_28_x86_64,manylinux2014_x86_64 (default: as here)",
    )
    parser.add_argument(
        "--without", type=names, default=[], help="packages that Python has there, as in torch,torchvision"
    )
    parser.add_argument(
        "--data", type=names, default=[], help="data sets, as in omniglot,cifar-fs: folders in MAML_DATA or data/"
    )
    parser.add_argument(
        "--max-run-size", type=_size, default="5MB", help="an unfinished run that is larger stays here (default: 5MB)"
    )
    parser.add_argument("--max-size", type=_size, help="refuse to write more, as in 500MB (default: no limit)")
    return parser


def _python(text: str) -> str:
    if re.fullmatch(r"\d+\.\d+", text) is None:
        raise argparse.ArgumentTypeError(f"{text} is no version such as 3.12")
    return text


def _size(text: str) -> int:
    """Parses ``64MB``."""
    found = re.fullmatch(r"([\d.]+)\s*(kB|MB|GB)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text} is no size such as 500kB, 64MB or 2GB")
    return int(float(found[1]) * _UNITS[found[2]])


# The code.


def _git(*words: str) -> bytes:
    try:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, check=True).stdout
    except OSError as error:
        raise MamlError(f"git cannot be started ({error.strerror}), and a bundle stands for a commit") from error
    except subprocess.CalledProcessError as error:
        reason = _last_line(error.stderr.decode())
        raise MamlError(f"git {words[0]} failed in {ROOT} ({reason}); a bundle is made in a clone") from error


def _clean_commit() -> str:
    """Returns the commit of the clone; refuses uncommitted changes."""
    if Path(_git("rev-parse", "--show-toplevel").decode().rstrip("\n")).resolve() != ROOT:
        raise MamlError(f"{ROOT} is not a git clone, and a bundle stands for a commit; make it in a clone")
    if changed := _git("status", "--porcelain", "--untracked-files=no").decode().splitlines():
        raise MamlError(
            f"{len(changed)} tracked files have uncommitted changes ({changed[0][3:]} is the first), and a bundle "
            "stands for a commit; commit or stash them"
        )
    return _git("rev-parse", "HEAD").decode().strip()


def _blob_hashes() -> dict[str, str]:
    """Returns git's hash of each tracked file outside results/, where runs may write."""
    lines = _git("ls-tree", "-r", "-z", "HEAD").decode().rstrip("\0").split("\0")
    entries = (line.split("\t", 1) for line in lines)
    return {name: kind.split()[2] for kind, name in entries if not name.startswith("results/")}


# The wheels.


def _requirements(without: Sequence[str]) -> tuple[list[str], str]:
    """Returns what pip has to get, and constraints.txt without the packages left out."""
    lines = (ROOT / "constraints.txt").read_text().splitlines(keepends=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    # Added to the pins for what has none (setuptools), and for the build of the editable install.
    needed = [*lines, *project["project"]["dependencies"], *project["build-system"]["requires"], _FOR_EDITABLE]
    left_out = {canonicalize_name(name) for name in without}
    if unknown := left_out - {_name(line) for line in needed}:
        raise MamlError(f"no package {', '.join(sorted(unknown))} is needed; --without takes names of constraints.txt")

    def is_kept(line: str) -> bool:
        name = _name(line)
        return name not in left_out and not ("torch" in left_out and _OF_TORCH.fullmatch(name))

    return [line.strip() for line in needed if is_kept(line)], "".join(line for line in lines if is_kept(line))


def _name(requirement: str) -> str:
    return canonicalize_name(Requirement(requirement.strip()).name)


def _download(folder: Path, requirements: Sequence[str], options: argparse.Namespace) -> None:
    """Fills a folder with the wheels of the requirements, and of what they need if nothing is left out."""
    if sources := [line for line in requirements if _name(line) in _SOURCE_ONLY]:
        _pip("wheel", "--no-deps", "--wheel-dir", str(folder), *sources)
    tags = [word for tag in options.platform for word in ("--platform", tag)]
    # A package that is left out would come back as a dependency. Without it, constraints.txt is complete.
    tags += ["--no-deps"] if options.without else []
    # Some packages need a later patch than 3.11.0, which 3.11 would mean to pip.
    tags += ["--python-version", f"{options.python}.99", "--only-binary=:all:"]
    _pip("download", *tags, "--dest", str(folder), "--find-links", str(folder), *requirements)


def _pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MamlError(
            f"pip cannot get all wheels ({_last_line(done.stderr)}); check the network, --python and --platform, or "
            "leave the package out with --without if the other machine has it"
        )


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


# Data and runs.


def _files_in(folder: Path, name: str, follow_links: bool = False) -> Files:
    """Returns the files below a folder; those below links to folders only if ``follow_links``."""
    paths = _through_links(folder) if follow_links else sorted(folder.rglob("*"))
    return {f"{name}/{path.relative_to(folder).as_posix()}": path for path in paths if path.is_file()}


def _through_links(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yields the paths below a folder, as if each link were what it points to."""
    place = folder.resolve()
    if place in above:
        raise MamlError(f"{folder} is a link to a folder that it is in itself, so packing would not end; remove it")
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _through_links(path, (*above, place))
        else:
            yield path


def _data_files(names: Sequence[str]) -> Files:
    data_dir = ROOT / os.environ.get("MAML_DATA", "data")  # as in conf/config.yaml
    files: Files = {}
    for name in names:
        if not (data_dir / name).is_dir():
            known = ", ".join(sorted(path.name for path in data_dir.glob("*/"))) or "none"
            raise MamlError(
                f"there is no data set {name} in {data_dir}, which has {known}; name one of its folders, or set "
                "MAML_DATA to the folder that has it"
            )
        files |= _files_in(data_dir / name, f"data/{name}", follow_links=True)
    return files


def _run_files(max_size: int) -> Files:
    """Returns the files of unfinished runs, the newest run first; says which ones stay here."""
    runs, problems = read_runs(ROOT / "runs")
    files: Files = {}
    for run in sorted(runs, key=lambda run: (run.path / "run.json").stat().st_mtime, reverse=True):
        if run.superseded or (run.report is not None and run.report.complete):
            continue
        if is_held(run.path / "lock"):  # by a training, or by an evaluation, of which run.json knows nothing
            problems.append(f"{run.path} is in use by a process")
            continue
        found = _files_in(run.path, f"runs/{run.experiment}/{run.path.name}")
        found = {name: path for name, path in found.items() if is_portable(path)}
        if (size := _tar_size(found)) > max_size:
            problems.append(f"{run.path} has {size / 1e6:.1f} MB, more than --max-run-size")
            continue
        files |= found
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    return files


# The tar file.


def _tar_size(files: Files) -> int:
    """Returns the bytes of files in a tar, with their headers."""
    headers = sum(len(tarfile.TarInfo(f"{TOP}/{name}").tobuf(tarfile.GNU_FORMAT)) for name in files)
    return headers + sum(-(-path.stat().st_size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE for path in files.values())


def _sizes_text(sizes: Mapping[str, int]) -> str:
    parts = ", ".join(f"{part} {size / 1e6:.1f}" for part, size in sizes.items())
    return f"{sum(sizes.values()) / 1e6:.1f} MB ({parts})"


def _refuse_too_large(sizes: Mapping[str, int], max_size: int | None) -> None:
    total = -(-sum(sizes.values()) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
    if max_size is not None and total > max_size:
        raise MamlError(
            f"the bundle would have {_sizes_text(sizes)}, more than --max-size; leave out data sets, lower "
            "--max-run-size, or name what the other machine has with --without"
        )


def _write(file: IO[bytes], description: bytes, code: bytes, parts: Mapping[str, Files]) -> None:
    def neutral(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = 0
        member.uname = member.gname = "root"  # as in git's archives
        member.mode |= 0o200  # data may be write-protected here, but must be deletable there
        return member

    with (
        tarfile.open(fileobj=io.BytesIO(code)) as archive,
        tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT, dereference=True) as tar,
    ):
        info = tarfile.TarInfo(f"{TOP}/bundle.json")
        info.size, info.mtime = len(description), int(time.time())
        tar.addfile(neutral(info), io.BytesIO(description))
        for member in archive:
            tar.addfile(member, archive.extractfile(member) if member.isfile() else None)
        for files in parts.values():
            for name, path in files.items():
                tar.add(path, f"{TOP}/{name}", filter=neutral)


if __name__ == "__main__":
    exit_with(main)
