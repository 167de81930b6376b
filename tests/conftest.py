"""What the tests share: real data, tiny runs in a folder of their own, and no way out to the network."""

from __future__ import annotations

import functools
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

os.environ.setdefault("MAML_DATA", str(Path(__file__).resolve().parents[2] / "shared" / "data"))
os.environ["WANDB_MODE"] = "offline"
torch.set_num_threads(1)  # the tensors here are small, and no bit may hang on how many cores there are

from tests.runs import DOMAINS, TinyRuns  # noqa: E402 - composes configs, which read the environment


@pytest.fixture(scope="session", autouse=True)
def _no_time_lost_on_files() -> Iterator[None]:
    """Spares the runs of this process what no test sees and what takes longer than their training.

    That is the flushing of files to the disk, which only a power failure could tell, and the drawing of their pictures
    (but tests/record/test_plot.py and tests/test_experiment.py draw).
    """

    def blank(report: Mapping[str, Any], path: Path) -> Path:
        Image.new("RGB", (1, 1)).save(path)
        return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        patch.setattr("maml.experiment.plot_report", blank)
        yield


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache of image sets, because building one takes seconds. mini-ImageNet, not to be shared, is made up."""
    folder = tmp_path_factory.mktemp("cache")
    classes = sorted(f"{split}/{number:02d}" for split, count in NUM_CLASSES.items() for number in range(count))
    pixels = Stream(0).integers((len(classes), 20, 12, 12, 3), 256).to(torch.uint8)
    pixels = pixels.repeat_interleave(7, 2).repeat_interleave(7, 3)
    cached_tensor(folder, "mini_imagenet_84x84_lanczos", "made up", lambda: (pixels, classes))
    return folder


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
