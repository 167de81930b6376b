"""The README, followed to the letter: its commands in order, its example domain, its example of a user's model."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SMALL_NET = """
from torch import nn


class SmallNet(nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(nn.Flatten(), nn.Linear(784, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, num_classes))
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Iterator[Path]:
    """A copy of what a user has, with the README's own files added where it says."""
    path = tmp_path_factory.mktemp("clone")
    for name in ("maml", "conf"):
        shutil.copytree(ROOT / name, path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", path)
    for language, target in (("python", "maml/domain/step_function.py"), ("yaml", "conf/domain/step_function.yaml")):
        examples = re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)
        (example,) = [text for text in examples if "StepFunction" in text]
        assert f"`{target}`" in README
        (path / target).write_text(example)
    (path / "my_nets.py").write_text(SMALL_NET)
    (path / ".cache").symlink_to(cache_dir)
    yield path


def commands() -> list[str]:
    lines = re.findall(r"^    (python train\.py .*?)(?:\s+#.*)?$", README, flags=re.MULTILINE)
    assert len(lines) > 8
    return list(dict.fromkeys(lines))


def test_readme_names_only_targets_and_files_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"make ([a-z][a-z-]+)", README)) <= targets
    named = re.findall(r"`((?:maml|conf|results)/[\w/]+(?:\.\w+|/))`", README)
    assert named
    assert [name for name in named if not (ROOT / name).exists() and "step_function" not in name] == []


def test_readme_commands_run_in_order(clone: Path) -> None:
    shrink = ["+debug=smoke", "hardware=cpu", "hardware.num_threads=1"]
    script = "\n".join(
        shlex.join([sys.executable, *shlex.split(command)[1:], *([] if "+debug" in command else shrink)])
        for command in commands()
    )
    # FILE is any checkpoint of that command; the oldest is the first command's.
    script = script.replace("checkpoint=FILE", "checkpoint=$(ls -tr runs/sinusoid_10shot/*/checkpoint.pt | head -n 1)")
    environment = os.environ | {"PYTHONPATH": str(clone), "PYTHONWARNINGS": "error"}
    done = subprocess.run(
        ["bash", "-euxc", script], cwd=clone, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list(clone.glob("runs/sinusoid_10shot/*/report.json"))) >= 3  # the sweep over seeds
    assert list(clone.glob("runs/custom/*/report.json"))  # the user's own domain
