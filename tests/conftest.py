"""Shared fixtures: the real data, tiny runs in temporary folders, and settings that keep tests offline and fast."""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from maml.data.cache import cached_tensor
from maml.data.photos import NUM_CLASSES
from maml.seeding import Stream

_ROOT = Path(__file__).resolve().parents[1]
_SHARED = _ROOT.parent / "shared" / "data"
os.environ.setdefault("MAML_DATA", str(_SHARED if _SHARED.is_dir() else _ROOT / "data"))
os.environ["WANDB_MODE"] = "offline"
torch.set_num_threads(1)  # tensors are small, and results must not depend on the number of cores

from tests.runs import DOMAINS, TinyRuns  # noqa: E402 - composes configs, which read the environment

# The files that take longest. They start first, so that no process is left alone with one at the end.
_LONGEST = (
    "training/test_survival.py",
    "test_experiments.py",
    "scripts/test_paper.py",
    "logger/test_wandb_service.py",
    "docs/test_pages.py",
    "scripts/test_benchmarks.py",
    "sweep/test_callback.py",
    "training/test_seeds.py",
    "paper/test_report.py",
    "docs/test_readme.py",
    "paper/test_figures.py",
    "test_api.py",
    "hardware/test_distributed.py",
    "test_package.py",
    "docs/test_extending.py",
    "test_kills.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first, for `make test`, whose processes take whole files in this order."""
    places = {_ROOT / "tests" / name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_collection_finish() -> None:
    """Collects garbage rarely, and not among the imported modules and tests: it took a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)


@pytest.fixture(scope="session", autouse=True)
def _skip_flushing_and_drawing() -> Iterator[None]:
    """Skips flushing files to disk and drawing pictures: both take longer than the training of a tiny run.

    No test notices: flushing matters only in a power failure, and tests/record/test_plot.py and
    tests/test_experiment.py draw pictures themselves.
    """

    def save_blank_image(report: Mapping[str, Any], path: Path, metrics: object) -> Path:
        Image.new("RGB", (1, 1)).save(path)
        return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        patch.setattr("maml.experiment.plot_report", save_blank_image)
        yield


@pytest.fixture
def float64() -> Iterator[None]:
    """Computes in float64, in which gradients are compared."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One image cache for all tests of all processes, because building one takes seconds.

    Its mini-ImageNet is synthetic.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    folder.mkdir(exist_ok=True)
    classes = sorted(f"{split}/{number:02d}" for split, count in NUM_CLASSES.items() for number in range(count))
    pixels = Stream(0).integers((len(classes), 20, 12, 12, 3), 256).to(torch.uint8)
    pixels = pixels.repeat_interleave(7, 2).repeat_interleave(7, 3)
    cached_tensor(folder, "mini_imagenet_84x84_lanczos", "made up", lambda: (pixels, classes))
    return folder


@pytest.fixture
def tiny(tmp_path: Path, cache_dir: Path) -> TinyRuns:
    """Tiny runs on sinusoids, in a temporary folder."""
    return TinyRuns(tmp_path / "runs", cache_dir).on_domain("sinusoid")


@pytest.fixture
def tiny_images(tiny: TinyRuns) -> TinyRuns:
    """Tiny runs on Omniglot, in a temporary folder."""
    folder = Path(os.environ["MAML_DATA"]) / "omniglot"
    if not folder.is_dir():
        pytest.skip(f"no {folder}; set MAML_DATA to the folder that has the data sets")
    return tiny.on_domain("omniglot")


@pytest.fixture(params=list(DOMAINS))
def each_domain(request: pytest.FixtureRequest, tiny: TinyRuns) -> TinyRuns:
    """Tiny runs, once on sinusoids and once on Omniglot."""
    return tiny if request.param == "sinusoid" else request.getfixturevalue("tiny_images")


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[TinyRuns], Path]:
    """Returns the folder of a run without interruptions; tests share it and must not change it."""
    runs_dir = tmp_path_factory.mktemp("uninterrupted")

    @functools.cache
    def run(cache_dir: Path, base: tuple[str, ...]) -> Path:
        return TinyRuns(runs_dir, cache_dir, base).run()

    return lambda tiny: run(tiny.cache_dir, tiny.base)
