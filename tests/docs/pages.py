"""Reads the README and the pages of docs/: their code blocks and commands."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SHRINK = ["+debug=smoke", "hardware=cpu", "hardware.num_threads=1"]


def blocks(page: Path, language: str) -> list[tuple[str, str]]:
    """Returns (title, text) of each fenced block in a language; the title may be empty."""
    found = re.findall(rf"^```{language}(?: title=\"(.*?)\")?\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [(title, text) for title, text in found]


def commands(page: Path) -> list[list[str]]:
    """Returns the shell commands of a page, split into words, without comments."""
    lines = [line for _, text in blocks(page, "sh") for line in text.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def trainings(page: Path) -> list[list[str]]:
    """Returns the arguments of each different ``python train.py`` command of a page."""
    found = [tuple(words[2:]) for words in commands(page) if words[:2] == ["python", "train.py"]]
    return [list(words) for words in dict.fromkeys(found)]


def run_in_order(clone: Path, runs: Sequence[Sequence[str]]) -> None:
    """Runs the commands in order, each shrunk to seconds, equal ones once; fails at the first command that fails."""
    lines: dict[str, None] = {}
    for words in runs:
        shrunk = SHRINK if "+debug=smoke" not in words else SHRINK[1:]
        lines[shlex.join([sys.executable, "train.py", *words, *shrunk])] = None
    # FILE means any checkpoint; the oldest one comes from the first command.
    script = "\n".join(lines).replace("checkpoint=FILE", "checkpoint=$(ls -tr runs/*/*/checkpoint.pt | head -n 1)")
    environment = os.environ | {"PYTHONPATH": str(clone), "PYTHONWARNINGS": "error"}
    done = subprocess.run(
        ["bash", "-euxc", script], cwd=clone, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
