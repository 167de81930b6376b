"""What the tests share: real data, tiny runs in a folder of their own, and no way out to the network."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

os.environ.setdefault("MAML_DATA", str(Path(__file__).resolve().parents[2] / "shared" / "data"))
os.environ["WANDB_MODE"] = "offline"
torch.set_num_threads(1)  # the tensors here are small, and no bit may hang on how many cores there are

from tests.runs import DOMAINS, TinyRuns  # noqa: E402 - composes configs, which read the environment


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache of image sets, because building Omniglot's takes seconds."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def tiny(tmp_path: Path, cache_dir: Path) -> TinyRuns:
    """Tiny runs on sinusoids, in a folder of the test's own."""
    return TinyRuns(tmp_path / "runs", cache_dir).of("sinusoid")


@pytest.fixture
def tiny_images(tiny: TinyRuns) -> TinyRuns:
    """The same on Omniglot."""
    folder = Path(os.environ["MAML_DATA"]) / "omniglot"
    if not folder.is_dir():
        pytest.skip(f"no {folder}; set MAML_DATA to the folder that has the data sets")
    return tiny.of("omniglot")


@pytest.fixture(params=list(DOMAINS))
def each_domain(request: pytest.FixtureRequest, tiny: TinyRuns) -> TinyRuns:
    """The same on either."""
    return tiny if request.param == "sinusoid" else request.getfixturevalue("tiny_images")


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[TinyRuns], Path]:
    """Gives the folder of a run that nothing disturbed; it is run once and must not be changed."""
    runs_dir = tmp_path_factory.mktemp("uninterrupted")

    @functools.cache
    def run(cache_dir: Path, base: tuple[str, ...]) -> Path:
        return TinyRuns(runs_dir, cache_dir, base).run()

    return lambda tiny: run(tiny.cache_dir, tiny.base)
