"""Trained networks in Python: load a network, adapt it to your own labelled data, and predict.

network = maml.load("omniglot_5way_1shot")
predictor = network.adapt(images, labels)
predictor(more_images)
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from maml.config.hints import near_miss
from maml.config.identity import training_config
from maml.config.paths import CHECKPOINTS, CONF, TRAIN
from maml.config.schema import Settings, build, build_without_data, check
from maml.digest import digest
from maml.errors import MamlError, first_line
from maml.evaluation import Evaluation
from maml.experiment import build_algorithm
from maml.hardware.base import Hardware
from maml.network import Inputs as Inputs
from maml.network import Network as Network
from maml.network import Predictor as Predictor
from maml.network import undisturbed
from maml.record import checkpoint
from maml.record.contents import Report
from maml.record.exported import State, compose_entry, read_index, read_parameters, restore
from maml.record.provenance import changed_since
from maml.record.run_files import read, read_checkpoint, read_config


def available() -> list[str]:
    """Returns the experiments whose trained networks `load` takes by name, in alphabetical order."""
    return sorted({entry.experiment for entry in read_index(CHECKPOINTS).cells.values()})


def load(source: str | Path, allow: Sequence[str] = (), device: str | torch.device = "cpu") -> Network:
    """Loads a trained network. A network whose training is not complete causes a warning.

    The files may come from somebody else: no code in them is run. They can only name classes of this package, and of
    modules that the caller allows.

    Args:
        source: an experiment that has a committed checkpoint, such as ``omniglot_5way_1shot``; or a run folder, a
            ``checkpoint.pt`` in one, or an exported ``.safetensors`` file with its ``index.json`` beside it. The data
            set of the training is not needed.
        allow: modules outside this package from which the network may use classes, such as ``["my_nets"]``; this
            includes the modules below them. Loading imports them, so allow only what you trust.
        device: where it computes, such as ``cuda`` or ``cuda:1``. Inputs may be on any device.

    Raises:
        MamlError: if the source does not exist, is damaged, or names a class of a module that is not allowed; or there
            is no such device.
    """
    network = _load(source, allow, _hardware(device))
    if not network.complete:
        warnings.warn(
            f"{network.experiment} was trained for {network.iteration:,} of {network.num_iterations:,} iterations; its "
            "accuracy cannot be compared with the paper's",
            stacklevel=2,
        )
    return network


def _hardware(device: str | torch.device) -> Hardware:
    """Returns the hardware of one device.

    Raises:
        MamlError: if there is no such device.
    """
    try:
        torch.empty(0, device=device)
        chosen = torch.device(device)
        hardware = Hardware("cuda" if chosen.type == "cuda" else "cpu")
    except (RuntimeError, AssertionError, TypeError) as error:  # AssertionError: torch was built without CUDA
        raise MamlError(f"device={device} cannot be used ({first_line(error)}); cpu always can") from error
    if chosen.type not in ("cpu", "cuda"):
        raise MamlError(f"device={device} is not supported; allowed: cpu, cuda, cuda:0, ...")
    hardware.device = chosen
    return hardware


def _load(source: str | Path, allow: Sequence[str], hardware: Hardware) -> Network:
    experiments, path = available(), Path(source)
    if str(source) in experiments:
        return _load_exported(CHECKPOINTS, allow, hardware, experiment=str(source))
    if path.suffix == ".safetensors":
        return _load_exported(path.parent, allow, hardware, file=path.name)
    if path.exists():
        return _load_run(path, allow, hardware)
    if (CONF / "experiment" / f"{source}.yaml").exists():
        raise MamlError(
            f"{source} has no committed checkpoint: train it ({TRAIN} +experiment={source}) and load its run "
            f"folder. There are {', '.join(experiments)}"
        )
    raise MamlError(f"{source} is neither a file or folder nor an experiment{near_miss(str(source), experiments)}")


def _load_exported(
    folder: Path, allow: Sequence[str], hardware: Hardware, experiment: str | None = None, file: str | None = None
) -> Network:
    """Loads an exported file, given its experiment or its name."""
    index = read_index(folder)
    entries = [entry for entry in index.cells.values() if experiment == entry.experiment or file == entry.file]
    entries.sort(key=lambda entry: len(entry.overrides))  # the experiment without overrides comes first
    if not entries:
        raise MamlError(f"{folder / 'index.json'} has no entry for {file}; keep the two together")
    first = entries[0]
    entries = [
        e for e in entries if (e.file, e.experiment, e.overrides) == (first.file, first.experiment, first.overrides)
    ]
    origin = index.files[first.file]
    settings = compose_entry(first, origin.seed, allow)
    state = read_parameters(folder, first.file, origin)
    sizes = {entry.num_shots: entry.step_sizes for entry in entries}
    return _build_network(first.experiment, origin.run_id, origin.iteration, settings, state, sizes, hardware)


def _load_run(path: Path, allow: Sequence[str], hardware: Hardware) -> Network:
    """Loads the network of a run folder, given the folder or a checkpoint in it."""
    folder = path if path.is_dir() else path.parent
    file = checkpoint.newest(folder / "checkpoint.pt") if path.is_dir() else path
    if file is None or not (folder / "config.yaml").exists():
        raise MamlError(
            f"{folder} is no run folder: it lacks checkpoint.pt or config.yaml; give runs/<experiment>/<run id>"
        )
    settings = check(read_config(folder / "config.yaml"), allow)
    if changed := changed_since(folder, settings):
        warnings.warn(
            f"{' and '.join(changed)} since {folder} was trained; its parameters belong to the old code",
            stacklevel=4,
        )
    saved = read_checkpoint(file)
    report = read(folder / "report.json", Report)
    sizes = report.step_sizes if report else {}
    run_id, iteration, state = saved["run_id"], saved["iteration"], saved["state"]
    return _build_network(saved["experiment"], run_id, iteration, settings, state, sizes, hardware)


def _build_network(
    experiment: str,
    run_id: str,
    iteration: int,
    settings: Settings,
    state: State,
    step_sizes: Mapping[int, list[float] | None],
    hardware: Hardware,
) -> Network:
    if digest(training_config(settings)) != run_id:
        raise MamlError(
            f"the parameters belong to run {run_id}, but the settings of {experiment} have changed since that run; use "
            "the version of the project that trained it"
        )
    # Tensors that name no device are made on the CPU, as in training, whatever the caller's default device.
    with undisturbed(settings.precision, hardware.device), torch.device("cpu"):
        algorithm = build_algorithm(settings, hardware, build_without_data(settings.domain))
        restore(algorithm, state)
    evaluation: Evaluation = build(settings.evaluation)
    num_iterations, precision = settings.num_iterations, settings.precision
    return Network(experiment, iteration, num_iterations, algorithm, evaluation, step_sizes, precision)
