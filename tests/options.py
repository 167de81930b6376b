"""The options of a folder of configs, and what each of them cannot do without, as its own yaml says."""

from __future__ import annotations

import shlex
from pathlib import Path

from maml.config.paths import CONF

PARTS = ("domain", "model", "inner", "outer", "algorithm", "evaluation", "hardware", "logger")
_TRY = "# Try with: "


def options(part: str, conf: Path = CONF) -> list[str]:
    """Returns the names of a part's options."""
    return sorted(path.stem for path in (conf / part).glob("*.yaml"))


def try_with(part: str, option: str, conf: Path = CONF) -> list[str]:
    """Returns the overrides without which an option does not run, from the line ``# Try with: ...`` of its yaml.

    They stand there as one would type them in a shell; an option without the line needs none.
    """
    lines = (conf / part / f"{option}.yaml").read_text().splitlines()
    return [override for line in lines if line.startswith(_TRY) for override in shlex.split(line.removeprefix(_TRY))]
