"""Paths of the project's own files: at the top of a clone, or inside the package of an installed wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]

IN_CLONE = not (_PACKAGE / "conf").is_dir()  # a wheel has conf/ inside the package, see pyproject.toml
ROOT = _PACKAGE.parent if IN_CLONE else _PACKAGE
CONF = ROOT / "conf"
RESULTS = ROOT / "results"
CHECKPOINTS = RESULTS / "checkpoints"
DEFAULT_RUNS = (Path("runs"), RESULTS / "runs")
"""Where run folders are read by default: the user's, then the committed ones."""

TRAIN = "python train.py" if IN_CLONE else "maml train"
"""The command that starts a run, for messages."""
EXTRAS = "pip install -e '.[{}]'" if IN_CLONE else "pip install 'maml[{}]'"
"""The command that installs an optional dependency, for messages."""
NO_RUNS = "there is no folder {}; name the folder that holds EXPERIMENT/RUN"
"""The message if a folder of run folders does not exist."""
