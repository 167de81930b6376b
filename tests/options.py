"""Lists the options of a config folder, and the overrides that each option needs before it runs."""

from __future__ import annotations

import shlex
from pathlib import Path

from maml.config.paths import CONF

PARTS = ("domain", "model", "inner", "outer", "algorithm", "evaluation", "hardware", "logger")
_TRY_WITH = "# Try with: "


def options(part: str, conf: Path = CONF) -> list[str]:
    """Returns the names of all options of a part, such as ``domain``."""
    return sorted(path.stem for path in (conf / part).glob("*.yaml"))


def try_with(part: str, option: str, conf: Path = CONF) -> list[str]:
    """Returns the overrides that an option needs, read from the line ``# Try with: ...`` of its yaml.

    The line is written as in a shell. An option without this line needs no overrides.
    """
    lines = (conf / part / f"{option}.yaml").read_text().splitlines()
    return [
        override
        for line in lines
        if line.startswith(_TRY_WITH)
        for override in shlex.split(line.removeprefix(_TRY_WITH))
    ]
