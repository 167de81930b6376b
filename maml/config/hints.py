"""Hints that follow an error message: the probable spelling, and the package to install."""

from __future__ import annotations

import difflib
import importlib.metadata
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from maml.config.paths import CONF, EXTRAS


def near_miss(name: str, allowed: Sequence[str], prefix: str = "") -> str:
    """Returns a hint for an unknown name: the allowed names that are similar, if any, and all allowed names."""
    similar = _similar(name, allowed, prefix)
    return f"{f': {similar}' if similar else ';'} allowed: {', '.join(allowed)}"


def _similar(name: str, allowed: Sequence[str], prefix: str = "") -> str:
    """Returns a question that names what was meant: the names that continue ``name``, else the most similar one."""
    longer = [choice for choice in allowed if choice.startswith(f"{name}_")]
    close = longer or difflib.get_close_matches(name, allowed, n=1)
    return f"did you mean {' or '.join(prefix + choice for choice in close)}?" if close else ""


def _explain_missing_plugin(option: Path) -> None:
    """Prints the install command if the launcher's or sweeper's Hydra plugin is missing."""
    (plugin,) = OmegaConf.load(option).defaults[0].values()
    extra, group = plugin.partition("_")[0], option.parent.name
    try:
        importlib.metadata.version(f"hydra-{extra}-{group}")
    except importlib.metadata.PackageNotFoundError:
        print(
            f"{group}={option.stem} needs hydra-{extra}-{group}, which is not installed: {EXTRAS.format(extra)}",
            file=sys.stderr,
        )


def explain_override_error(arguments: Sequence[str]) -> None:
    """Prints the probable spelling when an override names no key or no file; Hydra's own message does not."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException

    experiments = {path.stem for path in CONF.glob("experiment/*.yaml")}
    for argument in arguments:
        if argument in experiments:
            print(f"{argument}: did you mean +experiment={argument}?", file=sys.stderr)
    overrides = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
    chosen = [override for override in overrides if (CONF / override.partition("=")[0].lstrip("+")).is_dir()]
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            known = hydra_compose("config", chosen)
    except HydraException:
        known = None
    for override in overrides:
        name, _, value = override.partition("=")
        group = CONF / name.lstrip("+")
        if group.is_dir():
            options = sorted(path.stem for path in group.glob("*.yaml"))
            if value not in options and not set(value) & set(",("):  # lists and functions such as glob() are for sweeps
                hint = near_miss(value, options)
                if group.name == "experiment":  # there are too many to list, and Hydra has listed them
                    similar = _similar(value, options)
                    hint = f"{f': {similar}' if similar else ';'} `maml list` says what each experiment is"
                print(f"{override}: no such file in conf/{group.name}/{hint}", file=sys.stderr)
            elif group.name in ("launcher", "sweeper") and value in options:
                _explain_missing_plugin(group / f"{value}.yaml")
                if value == "slurm" and shutil.which("srun") is None:
                    print(
                        "launcher=slurm: this machine has no SLURM (srun not found); launcher=slurm_local needs none",
                        file=sys.stderr,
                    )
        elif known is not None and not name.startswith(("+", "~", "hydra")):
            *parents, last = name.split(".")
            if last.startswith("_"):
                continue
            node = OmegaConf.select(known, ".".join(parents)) if parents else known
            if isinstance(node, DictConfig) and last not in list(node):  # `in node` is False for keys without a value
                keys = [str(key) for key in node if not str(key).startswith("_")]
                print(f"{name} is not a key{near_miss(last, keys, ''.join(p + '.' for p in parents))}", file=sys.stderr)
