"""The one place that knows where the project's own files are: in a clone at its top, in a wheel inside the package."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]

IN_CLONE = not (_PACKAGE / "conf").is_dir()  # a wheel carries the configs, as pyproject.toml says
ROOT = _PACKAGE.parent if IN_CLONE else _PACKAGE
CONF = ROOT / "conf"
RESULTS = ROOT / "results"
CHECKPOINTS = RESULTS / "checkpoints"

TRAIN = "python train.py" if IN_CLONE else "maml train"
"""What starts a run, in messages."""
EXTRAS = "pip install -e '.[{}]'" if IN_CLONE else "pip install 'maml[{}]'"
"""What installs an optional dependency, in messages."""
