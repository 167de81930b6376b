"""Finds conflicts in a job's command: where its options and its experiment set the same keys differently."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from maml.config.compose import to_plain_config, without_hydra
from maml.config.schema import PARTS, TRAINING_PARTS, Settings, check
from maml.errors import MamlError, UnknownKeys
from maml.status import announce

_COMPARED = (*TRAINING_PARTS, "evaluation")  # the parts that decide what a number means


def check_job(cfg: DictConfig, overrides: Sequence[str]) -> Settings:
    """Checks the config of a running job of Hydra, and says which values the experiment set for another option.

    An experiment is composed last, so that its values stand where an option that the command chose sets others. There
    are three conflicts: a key that the chosen option does not have (an error), a key of another part that both set (an
    error), and a value that was meant for the replaced option (said, and kept).

    Args:
        cfg: the config.
        overrides: words of the job's command.

    Raises:
        MamlError: if the config is not valid, where the message says which of the unknown keys come from the
            experiment; or if an option and the experiment set other parts differently and the command does not say
            which of the two it means.
    """
    try:
        settings = check(to_plain_config(cfg))
    except UnknownKeys as error:
        if not (keys := _keys_of_experiment(error.keys, overrides)):
            raise
        # Hydra can only delete a key that has a value.
        words = [f"{key}=0 " * (OmegaConf.select(cfg, key) is None) + f"'~{key}'" for key in keys]
        raise MamlError(
            f"{error}\n+experiment= sets {', '.join(keys)}, which the part that you chose instead does not have; add "
            f"{' '.join(words)} to leave that out"
        ) from error
    _check_demands(cfg, overrides)
    for line in _values_for_another_option(cfg, overrides):
        announce(line)
    return settings


def _check_demands(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Refuses options of the command that set keys outside their own part, such as 0 steps, if the experiment's win.

    Raises:
        MamlError: if there is such a key and the command does not name it.
    """
    experiment, options, named = _words(overrides)
    if not experiment or not options:
        return
    alone, without, of_cfg = (_leaves(config) for config in (_composed(experiment), _composed([]), cfg))
    chosen = {word.partition("=")[0] for word in options}
    for word in options:
        demands = {
            key: value
            for key, value in _leaves(_composed([word])).items()
            if key.partition(".")[0] not in chosen
            if not any(key == name or key.startswith(f"{name}.") for name in named)
            if value != without.get(key) and of_cfg.get(key) == alone.get(key) != value
        }
        if demands:
            theirs = " ".join(f"{key}={_word(value)}" for key, value in demands.items())
            ours = " ".join(f"{key}={_word(of_cfg.get(key))}" for key in demands)
            raise MamlError(
                f"{word} asks for {theirs}, but {experiment[0]} sets {ours}; add one or the other to the command, to "
                "say which is meant"
            )


def _leaves(cfg: DictConfig) -> dict[str, Any]:
    """Returns the values of a config by their full keys, with interpolations as texts. Lists are values."""

    def walk(node: Any, path: str) -> Iterator[tuple[str, Any]]:
        if isinstance(node, Mapping):
            for key, value in node.items():
                yield from walk(value, f"{path}.{key}" if path else str(key))
        else:
            yield path, node

    return dict(walk(OmegaConf.to_container(without_hydra(cfg), resolve=False), ""))


def _word(value: Any) -> str:
    """Returns a value as a word of the command line."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "")


def _keys_of_experiment(keys: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """Returns those of the keys that the experiment sets, and neither the command nor the chosen options."""
    experiment, options, named = _words(overrides)
    if not experiment:
        return []
    alone, chosen = _composed(experiment), _composed(options)

    def has(cfg: DictConfig, key: str) -> bool:
        part, _, name = key.rpartition(".")
        return name in list(OmegaConf.select(cfg, part) or ())  # `in cfg` is False for keys without a value

    return [key for key in keys if "." in key and key not in named and has(alone, key) and not has(chosen, key)]


def _values_for_another_option(cfg: DictConfig, overrides: Sequence[str]) -> list[str]:
    """Returns a line for each option that the command chose, if it has values that the experiment set for another one.

    Such a value is that of a key whose defaults differ in the two options, as the step sizes of SGD and Adam do.
    """
    experiment, options, named = _words(overrides)
    chosen = {part: option for part, _, option in (word.partition("=") for word in options) if part in _COMPARED}
    if not experiment or not chosen:
        return []
    alone, lines = _composed(experiment), []
    for part, option in chosen.items():
        former = f"{part}={alone.hydra.runtime.choices[part]}"
        values, of_experiment, defaults, former_defaults = (
            _part(config, part) for config in (cfg, alone, _composed([f"{part}={option}"]), _composed([former]))
        )
        kept = [
            f"{part}.{key}={value} (default: {defaults[key]})"
            for key, value in values.items()
            if key != "_target_" and f"{part}.{key}" not in named and of_experiment.get(key) == value
            if key in defaults and key in former_defaults and defaults[key] not in (value, former_defaults[key])
        ]
        if kept:
            lines.append(
                f"{part}={option} has the experiment's values for {former}: {', '.join(kept)}; "
                "if that is not meant, set them"
            )
    return lines


def _words(overrides: Sequence[str]) -> tuple[list[str], list[str], set[str]]:
    """Returns a command's experiment, the options that it chooses, and the keys that it names.

    There is no experiment in a job of a launcher whose processes know nothing of Hydra's search path.
    """
    from hydra.core.global_hydra import GlobalHydra

    running = GlobalHydra.instance().is_initialized()
    experiment = [word for word in overrides if running and word.startswith("+experiment=")]
    options = [word for word in overrides if word.partition("=")[0] in PARTS]
    return experiment, options, {word.partition("=")[0].lstrip("+~") for word in overrides}


def _composed(words: Sequence[str]) -> DictConfig:
    """Composes a config in a running job, with Hydra's own part."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    running = GlobalHydra.instance().hydra
    assert running is not None
    return running.compose_config("config", list(words), RunMode.RUN, with_log_configuration=False)


def _part(cfg: DictConfig, name: str) -> dict[str, Any]:
    part = OmegaConf.to_container(cfg[name], resolve=False)
    assert isinstance(part, dict)
    return {str(key): value for key, value in part.items()}
