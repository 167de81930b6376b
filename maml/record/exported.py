"""Exported parameters: one safetensors file per run, and an index of the cells and numbers computed from each file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors.torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError

from maml.algorithm.base import Algorithm
from maml.errors import MamlError
from maml.record import checkpoint
from maml.record.run_folder import read_json
from maml.types import Params

State = dict[str, Params]
"""The groups of an algorithm's state that evaluation needs: ``theta``, ``buffers`` and ``best``."""


class Reading(BaseModel):
    """One number of a report, in the report's unit; both fields are None if adaptation diverged."""

    mean: float | None
    ci95: float | None


class ExportedFile(BaseModel):
    """The origin of an exported file: its run, its iteration, and the versions and hardware of its numbers."""

    sha256: str
    run_id: str
    seed: int
    iteration: int
    num_iterations: int
    execution: dict[str, Any]
    versions: dict[str, str]
    hardware: dict[str, Any]


class Entry(BaseModel):
    """A table cell or a figure's curve: its file, its evaluation settings, and its numbers by gradient step."""

    file: str
    experiment: str
    overrides: list[str]
    evaluation: dict[str, Any]
    metric: str
    num_shots: int
    step_sizes: list[float] | None
    bank: str
    readings: dict[int, Reading]


class Index(BaseModel):
    """``index.json``: files by name; entries by ``<table>/<row>/<column>`` or ``<figure>/<row>/<panel>``."""

    files: dict[str, ExportedFile] = {}
    cells: dict[str, Entry] = {}


def read_index(folder: Path) -> Index:
    """Reads a folder's ``index.json``; the index is empty if the file does not exist.

    Raises:
        MamlError: if the file is damaged.
    """
    path = folder / "index.json"
    try:
        return Index.model_validate(read_json(path) or {})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise MamlError(f"{path} is damaged ({where}: {first['msg']}); restore it") from error


def write_index(folder: Path, index: Index) -> None:
    """Writes ``index.json``; equal indices give equal bytes."""
    text = json.dumps(index.model_dump(), indent=1, sort_keys=True) + "\n"
    checkpoint.write_atomically(folder / "index.json", lambda file: file.write(text.encode()))


def pack(state: State, title: str) -> bytes:
    """Returns the content of a safetensors file; equal arguments give equal bytes.

    Args:
        state: state of an algorithm; only the groups that evaluation needs are kept.
        title: description of the run, stored in the file's header.
    """
    tensors = {
        f"{group}.{name}": value.contiguous()
        for group in ("theta", "buffers", "best")
        for name, value in state.get(group, {}).items()
    }
    return safetensors.torch.save(tensors, {"run": title})  # one entry only: the order of several is not fixed


def unpack(path: Path, sha256: str) -> State:
    """Reads a file whose content `pack` made.

    Args:
        path: path of the file.
        sha256: the expected SHA-256 of its content.

    Raises:
        MamlError: if the file is missing, or has another content.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise MamlError(f"{path} cannot be read ({error.strerror}); restore it") from error
    actual = hashlib.sha256(content).hexdigest()
    if actual != sha256:
        raise MamlError(
            f"{path} has a wrong hash: its SHA-256 is {actual}, but index.json beside it says {sha256}. The file was "
            "damaged or replaced; restore both"
        )
    state: State = {}
    try:
        tensors = safetensors.torch.load(content)
    except SafetensorError as error:
        raise MamlError(f"{path} is no safetensors file ({error}); restore it") from error
    for name, value in tensors.items():
        group, _, parameter = name.partition(".")
        state.setdefault(group, {})[parameter] = value
    return checkpoint.rename_groups(state)


def restore(algorithm: Algorithm, state: State) -> None:
    """Loads a state into an algorithm and leaves its outer optimizer unchanged.

    Raises:
        MamlError: if the state belongs to another algorithm or model.
    """
    algorithm.load_state_dict(state | {"outer": algorithm.outer_state})
