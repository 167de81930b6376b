"""Composes yaml files and overrides into checked settings, as ``train.py`` does."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from maml.config.paths import CONF
from maml.config.schema import Settings, check
from maml.errors import MamlError

_one_at_a_time = threading.Lock()  # a process has one Hydra


def to_plain_config(cfg: DictConfig) -> dict[str, Any]:
    """Converts a config to plain dicts and lists, with all interpolations resolved.

    Raises:
        MamlError: if an interpolation cannot be resolved or a mandatory value is missing.
    """
    try:
        container = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise MamlError(explain_config_error(error)) from error
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def plain_overrides(hydra: Any) -> list[str]:
    """Returns the words of a job's command as they were given, with interpolations as texts.

    Args:
        hydra: the part ``hydra`` of the job's config.
    """
    words = OmegaConf.to_container(hydra.overrides.task, resolve=False)
    assert isinstance(words, list)
    return [str(word) for word in words]


def explain_config_error(error: OmegaConfBaseException) -> str:
    """Returns one line that names the key of an error of OmegaConf and says what is wrong with it."""
    reason = str(error).partition("\n")[0]
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} has no value, and the run needs one: set {error.full_key}=..."
    return f"{error.full_key}: {reason}" if error.full_key else f"the config cannot be resolved: {reason}"


def compose(overrides: Sequence[str], config_dir: Path = CONF) -> tuple[Settings, str]:
    """Composes and checks a config as ``train.py`` does.

    Args:
        overrides: words of the command line, such as ``+experiment=sinusoid_10shot``.
        config_dir: folder of the yaml files.

    Returns:
        The settings, and the experiment's name.

    Raises:
        MamlError: if the config is not valid, or ``+debug=`` stands before ``+experiment=``.
        HydraException: if an override names no key or no file.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    check_order(overrides)
    with _one_at_a_time:
        # Inside train.py, Hydra is already running: it composes a second config to compare the numbers with the paper.
        running = GlobalHydra.instance().hydra
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(str(config_dir.resolve()), version_base="1.3"):
                cfg = hydra_compose("config", list(overrides), return_hydra_config=True)
        finally:
            GlobalHydra.instance().hydra = running
    return settings_of(cfg), experiment_name(cfg.hydra.runtime.choices)


def settings_of(cfg: DictConfig) -> Settings:
    """Checks a config that Hydra composed, with or without its own part ``hydra``.

    Raises:
        MamlError: if the config is not valid.
    """
    return check(to_plain_config(without_hydra(cfg)))


def without_hydra(cfg: DictConfig) -> DictConfig:
    """Returns a config without Hydra's own part."""
    return OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])


def check_order(overrides: Sequence[str]) -> None:
    """Refuses ``+debug=`` before ``+experiment=``: the experiment would override it and run in full.

    Raises:
        MamlError: if the order is wrong.
    """
    names = [override.partition("=")[0] for override in overrides]
    if "+debug" in names and "+experiment" in names and names.index("+debug") < names.index("+experiment"):
        raise MamlError("+debug= must come after +experiment=, which would otherwise override it; swap the two")


CUSTOM = "custom"
"""The experiment's name of a run without ``+experiment=``."""


def experiment_name(choices: Mapping[str, str]) -> str:
    """Returns the name of the experiment chosen on the command line, or ``custom``."""
    return choices.get("experiment") or CUSTOM


@cache
def compose_experiment(experiment: str, overrides: tuple[str, ...] = ()) -> Settings:
    """Returns the settings of an experiment; the result is cached."""
    return compose([f"+experiment={experiment}", *overrides])[0]
