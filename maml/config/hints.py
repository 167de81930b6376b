"""Hints that follow an error message: the probable spelling, and the package to install."""

from __future__ import annotations

import difflib
import importlib.metadata
import shlex
import shutil
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from maml.config.paths import CONF, EXTRAS

# Hydra's options that are followed by a word of their own.
_TAKE_A_WORD = {
    "--config-dir",
    "-cd",
    "--config-name",
    "-cn",
    "--config-path",
    "-cp",
    "--package",
    "-p",
    "--info",
    "-i",
}


def near_miss(name: str, allowed: Sequence[str], prefix: str = "") -> str:
    """Returns a hint for an unknown name: the allowed names that are similar, if any, and all allowed names."""
    similar = _similar(name, allowed, prefix)
    return f"{f': {similar}' if similar else ';'} allowed: {', '.join(allowed)}"


def _similar(name: str, allowed: Sequence[str], prefix: str = "") -> str:
    """Returns a question that names what was meant: the names that continue ``name``, else the most similar one."""
    longer = [choice for choice in allowed if choice.startswith(f"{name}_")]
    close = longer or difflib.get_close_matches(name, allowed, n=1)
    return f"did you mean {' or '.join(prefix + choice for choice in close)}?" if close else ""


def _missing_plugin(option: Path) -> list[str]:
    """Returns the install command if the launcher's or sweeper's Hydra plugin is missing."""
    (plugin,) = OmegaConf.load(option).defaults[0].values()
    extra, group = plugin.partition("_")[0], option.parent.name
    try:
        importlib.metadata.version(f"hydra-{extra}-{group}")
    except importlib.metadata.PackageNotFoundError:
        return [f"{group}={option.stem} needs hydra-{extra}-{group}, which is not installed: {EXTRAS.format(extra)}"]
    return []


def explain_override_error(arguments: Sequence[str]) -> bool:
    """Prints the probable spelling for each override that names no key or no file.

    Args:
        arguments: words of the command line, after ``train.py``.

    Returns:
        Whether it printed anything. If not, the overrides may still be wrong in another way.
    """
    lines = _override_errors(arguments)
    for line in lines:
        print(line, file=sys.stderr)
    return bool(lines)


def _override_errors(arguments: Sequence[str]) -> list[str]:
    experiments = {path.stem for path in CONF.glob("experiment/*.yaml")}
    lines = [f"{word}: did you mean +experiment={word}?" for word in arguments if word in experiments]
    folders = [CONF, *split_config_dirs(arguments)[0]]
    if unreadable := _unreadable(arguments):
        return [*lines, *unreadable]
    overrides = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
    known = _known_keys([override for override in overrides if _is_group(override)], folders)
    for override in overrides:
        name = override.partition("=")[0]
        if not name.lstrip("+"):
            lines.append(f"{override}: there is no key before the =")
        elif _is_group(override):
            lines += _option_errors(override, folders)
        elif known is not None:
            lines += _key_errors(name, known)
    return lines


def _unreadable(arguments: Sequence[str]) -> list[str]:
    """Says how to write words that Hydra cannot read."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    lines = []
    for before, word in pairwise(["", *arguments]):
        if word.startswith("-") or before in _TAKE_A_WORD or (CONF / "experiment" / f"{word}.yaml").is_file():
            continue
        try:
            OverridesParser.create().parse_override(word)
        except HydraException:
            key, is_setting, value = word.partition("=")
            if not is_setting:
                advice = "a setting is KEY=VALUE, without spaces around ="
            else:
                example = shlex.quote(f'{key}="{value.strip()}"')
                advice = f"a value with spaces or one of ( ) [ ] {{ }} , : ~ needs quotes within quotes: {example}"
                advice += " (~ is not your home folder then: write $HOME)" * ("~" in value)
            lines.append(f"{word}: {advice}")
    return lines


def _is_group(override: str) -> bool:
    name = override.partition("=")[0].lstrip("+")
    return bool(name) and (CONF / name).is_dir()


def _known_keys(groups: Sequence[str], folders: Sequence[Path]) -> DictConfig | None:
    """Returns a config with all keys that exist if these options are chosen; None if they do not fit together."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException

    chosen = []  # of options to sweep over, the first
    for override in groups:
        name = override.partition("=")[0]
        chosen += [f"{name}={choice}" for choice in _choices(override, folders)[:1]]
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return hydra_compose("config", chosen)
    except (HydraException, ValueError):  # the latter for a group=null
        return None


def _option_errors(override: str, folders: Sequence[Path]) -> list[str]:
    """Says which options of ``group=option`` are no files, and what the machine lacks for one that is."""
    name, _, value = override.partition("=")
    group, lines = CONF / name.lstrip("+"), []
    options = _options(group.name, folders)
    for choice in _choices(override, folders):
        if choice in options:
            if group.name == "experiment":
                lines += _missing_package(choice, folders)
            continue
        hint = near_miss(choice, options)
        if group.name == "experiment":  # there are too many to list
            similar = _similar(choice, options)
            hint = f"{f': {similar}' if similar else ';'} `maml list` says what each experiment is"
        lines.append(f"{name}={choice}: no such file in conf/{group.name}/{hint}")
    if group.name in ("launcher", "sweeper") and (group / f"{value}.yaml").exists():
        lines += _missing_plugin(group / f"{value}.yaml")
        if value == "slurm" and shutil.which("srun") is None:
            lines.append("launcher=slurm: this machine has no SLURM (srun not found); launcher=slurm_local needs none")
    return lines


def _missing_package(experiment: str, folders: Sequence[Path]) -> list[str]:
    """Says that an experiment's file sets no other groups, because it lacks a line of Hydra's."""
    files = [folder / "experiment" / f"{experiment}.yaml" for folder in folders]
    return [
        f"{file}: an experiment sets keys of all groups, so its first line has to be `# @package _global_`"
        for file in files
        if file.exists() and "# @package _global_" not in file.read_text().splitlines()
    ]


def _key_errors(name: str, known: DictConfig) -> list[str]:
    """Says that a key does not exist where others do; keys that may be added are not judged."""
    *parents, last = name.split(".")
    if name.startswith(("+", "~", "hydra")) or last.startswith("_"):
        return []
    node = OmegaConf.select(known, ".".join(parents)) if parents else known
    if not isinstance(node, DictConfig) or last in list(node):  # `in node` is False for keys without a value
        return []
    # A key of another group: `inner.num_tasks` for `evaluation.num_tasks`.
    parts = [str(part) for part in known if isinstance(known[part], DictConfig)]
    if elsewhere := [f"{part}.{last}" for part in parts if last in list(known[part])]:
        return [f"{name} is not a key: did you mean {' or '.join(elsewhere)}?"]
    keys = [str(key) for key in node if not str(key).startswith("_")]
    if not keys:
        return [f"{name} is not a key: {'.'.join(parents)} has none"]
    return [f"{name} is not a key{near_miss(last, keys, ''.join(p + '.' for p in parents))}"]


def _options(group: str, folders: Sequence[Path]) -> list[str]:
    """Returns the options of a group in folders of config files."""
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})


def _choices(override: str, folders: Sequence[Path]) -> list[str]:
    """Returns the options that an override of a group names: one, or in a sweep several."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import ChoiceSweep, Glob
    from hydra.errors import HydraException

    name, _, text = override.partition("=")
    try:
        value = OverridesParser.create().parse_override(override).value()
    except HydraException:
        return [text]
    if isinstance(value, Glob):
        return value.filter(_options(name.lstrip("+"), folders))
    return [getattr(choice, "text", str(choice)) for choice in value.list] if isinstance(value, ChoiceSweep) else [text]


def split_config_dirs(arguments: Sequence[str]) -> tuple[tuple[Path, ...], list[str]]:
    """Splits the user's own folders of config files, ``--config-dir``, from the other words of a command.

    Returns:
        The folders and the other words.
    """
    folders, others, left = [], [], list(arguments)
    while left:
        word = left.pop(0)
        if word in ("--config-dir", "-cd") and left:
            folders.append(Path(left.pop(0)))
        elif word.startswith("--config-dir="):
            folders.append(Path(word.partition("=")[2]))
        else:
            others.append(word)
    return tuple(folders), others
