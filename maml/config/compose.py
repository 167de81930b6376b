"""From yaml files and overrides to checked settings, as ``train.py`` has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from maml.config.paths import CONF
from maml.config.schema import Settings, check
from maml.errors import MamlError


def to_plain_config(cfg: DictConfig) -> dict[str, Any]:
    """Returns a config as resolved, plain containers.

    Raises:
        MamlError: if an interpolation cannot be resolved or a mandatory value is missing.
    """
    try:
        container = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise MamlError(f"the config cannot be resolved: {error}") from error
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def compose(overrides: Sequence[str], config_dir: Path = CONF) -> tuple[Settings, str]:
    """Composes and checks a config as ``train.py`` does; returns it with the experiment's name."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    check_order(overrides)
    running = GlobalHydra.instance().hydra  # of train.py, which composes another config when it judges its numbers
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir.resolve()), version_base="1.3"):
            cfg = hydra_compose("config", list(overrides), return_hydra_config=True)
    finally:
        GlobalHydra.instance().hydra = running
    experiment = experiment_name(cfg.hydra.runtime.choices)
    config = to_plain_config(OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"]))
    return check(config), experiment


def check_order(overrides: Sequence[str]) -> None:
    """Refuses a ``+debug=`` in front of ``+experiment=``: the experiment would undo it and run in full.

    Raises:
        MamlError: if the order is wrong.
    """
    names = [override.partition("=")[0] for override in overrides]
    if "+debug" in names and "+experiment" in names and names.index("+debug") < names.index("+experiment"):
        raise MamlError("+debug= must stand behind +experiment=, which would otherwise undo it; swap the two")


def experiment_name(choices: Mapping[str, str]) -> str:
    """Returns the name of the experiment chosen on the command line, or ``custom``."""
    return choices.get("experiment") or "custom"


@cache
def compose_experiment(experiment: str, overrides: tuple[str, ...] = ()) -> Settings:
    """Returns the settings of an experiment, composed once."""
    return compose([f"+experiment={experiment}", *overrides])[0]
