"""Exported parameters: one safetensors file per run, and an index of the cells and numbers computed from each file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException
from pydantic import BaseModel, Field
from safetensors import SafetensorError

from maml.algorithm.base import Algorithm
from maml.config.compose import compose_experiment
from maml.config.identity import TRAINING_KEYS
from maml.config.paths import CONF
from maml.config.schema import TRAINING_PARTS, Settings, check
from maml.errors import MamlError
from maml.record import checkpoint
from maml.record.atomic import write_text_atomically
from maml.record.run_files import read, read_checkpoint
from maml.types import Params

_GROUPS = ("theta", "buffers", "best")

State = dict[str, Params]
"""The groups of an algorithm's state that evaluation needs: ``theta``, ``buffers`` and ``best``."""

_PARTS = (*TRAINING_PARTS, "evaluation")  # the parts that an entry's overrides may change


class CommittedNumber(BaseModel):
    """One number of a report, in the report's unit; both fields are None if adaptation diverged."""

    mean: float | None
    ci95: float | None


class ExportedFile(BaseModel):
    """The origin of exported parameters: their run, its iteration, and the versions and hardware of its numbers.

    Parameters that are too large for a file of their own are not exported. ``run`` is then the run folder in
    ``results/runs`` whose checkpoint has them, and ``sha256`` is that of the file that they would have.
    """

    sha256: str
    run: Annotated[str, Field(pattern=r"^\w[\w.-]*/\w+$")] | None = None  # in results/runs; only if there is no file
    run_id: str
    seed: int
    iteration: int
    num_iterations: int
    execution: dict[str, Any]
    versions: dict[str, str]
    hardware: dict[str, Any]


class Entry(BaseModel):
    """A table cell or a figure's curve: its file, its evaluation settings, and its numbers by gradient step."""

    file: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]  # no path: the file is beside the index
    experiment: str
    overrides: list[str]
    evaluation: dict[str, Any]
    metric: str
    num_shots: int
    step_sizes: list[float] | None
    bank: str
    numbers: dict[int, CommittedNumber]


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
    index = read(path, Index) or Index()
    if unlisted := {entry.file for entry in index.cells.values()} - index.files.keys():
        raise MamlError(f"{path} is damaged (files has no entry {min(unlisted)}); restore it")
    return index


def write_index(folder: Path, index: Index) -> None:
    """Writes ``index.json``; equal indices give equal bytes."""
    text = json.dumps(index.model_dump(), indent=1, sort_keys=True) + "\n"
    write_text_atomically(folder / "index.json", text)


def compose_entry(entry: Entry, seed: int, allow: Sequence[str] = ()) -> Settings:
    """Composes the settings of an entry. Nothing in the entry is trusted: an index may come from somebody else.

    Args:
        entry: the entry of the index.
        seed: seed of its file's run.
        allow: modules outside this package from which the experiment may use classes.

    Raises:
        MamlError: if the experiment does not exist, an override is none that an index may have, or a class is not
            allowed.
    """
    if entry.experiment not in _options("experiment"):
        raise MamlError(f"index.json names the experiment {entry.experiment!r}, which is no file in conf/experiment/")
    check_overrides(entry.overrides)
    try:
        settings = compose_experiment(entry.experiment, (*entry.overrides, f"seed={seed}"))
    except HydraException as error:
        raise MamlError(
            f"the overrides {entry.overrides} in index.json do not fit {entry.experiment}: {error}"
        ) from error
    return check(settings.as_dict(), allow)


def check_overrides(overrides: Sequence[str]) -> None:
    """Refuses every override that does more than set a known key of training or evaluation, or choose an option.

    Raises:
        MamlError: for the first other override.
    """
    parser = OverridesParser.create()
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            raise MamlError(f"index.json has the override {text!r}, which cannot be read: {error}") from error
        key, value = override.key_or_group, override.value()
        part = key.partition(".")[0]
        is_option = key in _PARTS and isinstance(value, str) and value in _options(key)
        is_key = key in TRAINING_KEYS or (part in _PARTS and key != part)
        is_plain = (
            override.type is OverrideType.CHANGE and override.package is None and not override.is_sweep_override()
        )
        written = f"{key}={json.dumps(value, default=str)}"
        if not (is_plain and (is_option or is_key)) or "_target_" in written or "${" in written:
            raise MamlError(
                f"index.json has the override {text!r}. Only numbers and options of training and evaluation can be "
                "overridden there, as in inner.step_size=0.01 or model=mlp; a class, an interpolation, a sweep and "
                "all other keys are refused"
            )


def _options(group: str) -> set[str]:
    return {path.stem for path in (CONF / group).glob("*.yaml")}


def pack(state: State, title: str) -> bytes:
    """Returns the content of a safetensors file; equal arguments give equal bytes.

    Args:
        state: state of an algorithm; only the groups that evaluation needs are kept.
        title: description of the run, stored in the file's header.
    """
    tensors = {
        f"{group}.{name}": value.contiguous() for group in _GROUPS for name, value in state.get(group, {}).items()
    }
    return safetensors.torch.save(tensors, {"run": title})  # one entry only: the order of several is not fixed


def read_parameters(folder: Path, file: str, origin: ExportedFile) -> State:
    """Reads the exported parameters of a run, or those in its run folder if they are too large to be exported.

    Args:
        folder: folder of the index; the run folders are in ``runs`` beside it.
        file: name of the exported file.
        origin: its entry in the index.

    Raises:
        MamlError: if the file or the run's checkpoint is missing, or has other parameters.
    """
    if origin.run is None:
        return unpack(folder / file, origin.sha256)
    run = folder.parent / "runs" / origin.run
    path = run / "checkpoint.pt"
    if not path.exists():
        raise MamlError(
            f"{path} is missing; {file} would be too large, so the parameters are only there: restore the run folder"
        )
    saved = read_checkpoint(path)
    content = pack(saved["state"], title(run, saved["iteration"]))
    if hashlib.sha256(content).hexdigest() != origin.sha256:
        raise MamlError(
            f"{path} has other parameters (of iteration {saved['iteration']:,}) than index.json says (of iteration "
            f"{origin.iteration:,}); restore it, or evaluate the run and export it again"
        )
    state: State = saved["state"]
    return {group: values for group, values in state.items() if group in _GROUPS}


def title(run: Path, iteration: int) -> str:
    """Returns the description of exported parameters, given their run folder."""
    return f"{run.parent.name} {run.name}, iteration {iteration}"


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
        if not (group and parameter):
            raise MamlError(f"{path} is no file of this project: it has a tensor {name!r}; restore it")
        state.setdefault(group, {})[parameter] = value
    return checkpoint.rename_groups(state)


def restore(algorithm: Algorithm, state: State) -> None:
    """Loads a state into an algorithm and leaves its outer optimizer unchanged.

    Raises:
        MamlError: if the state belongs to another algorithm or model.
    """
    algorithm.load_state_dict(state | {"outer": algorithm.outer_state})
