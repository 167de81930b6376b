"""The settings in which runs differ from their experiment, and from each other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from maml.config.compose import compose_experiment
from maml.config.identity import evaluation_config, training_config, with_own_defaults
from maml.config.paths import CONF
from maml.errors import MamlError
from maml.record.frame import UNKNOWN, setting


def experiment_settings(experiment: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the training and evaluation settings of an experiment; both are empty if it is unknown here."""
    if not (CONF / "experiment" / f"{experiment}.yaml").is_file():
        return {}, {}
    try:
        settings = compose_experiment(experiment)
        return with_own_defaults(training_config(settings), settings.as_dict()), evaluation_config(settings)
    except (MamlError, HydraException, OmegaConfBaseException, yaml.YAMLError):  # its file is no longer valid
        return {}, {}


def differing_keys(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Returns the keys of the settings that differ; what is not recorded has its default."""
    return [key for key in sorted(a.keys() | b.keys()) if setting(a, key) != setting(b, key)]


def setting_texts(own: Mapping[str, Any], experiment: Mapping[str, Any]) -> list[str]:
    """Returns ``key=value`` for each setting of a run that differs from its experiment's, the seed left out."""
    texts = []
    for key in differing_keys(own, experiment):
        value, target = setting(own, key), f"{key.rpartition('.')[0]}._target_"
        if value is UNKNOWN and own.get(target) == experiment.get(target):
            texts.append(f"{key}=default")  # no config.yaml tells the value of a user's class
        elif value is not UNKNOWN and key != "seed":
            texts.append(f"{key}={value if isinstance(value, str) else json.dumps(value, separators=(',', ':'))}")
    return texts
