"""Mini-ImageNet tasks on small synthetic files, because the real photos must not be redistributed."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from maml.data import photos
from maml.domain.mini_imagenet import MiniImagenet
from maml.errors import MamlError
from maml.model.conv4 import Conv4
from maml.seeding import Stream

MODEL = Conv4((84, 84, 3), 2, num_filters=4)
NUM_CLASSES = {"train": 4, "val": 2, "test": 3}
NUM_IMAGES = 6


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., MiniImagenet]:
    """Makes domains with 4 training, 2 validation and 3 test classes of 6 photos."""
    monkeypatch.setattr(photos, "NUM_CLASSES", NUM_CLASSES)
    monkeypatch.setattr(photos, "NUM_IMAGES", NUM_IMAGES)
    random = np.random.default_rng(0)
    for split, num_classes in NUM_CLASSES.items():
        rows = np.arange(num_classes * NUM_IMAGES).reshape(num_classes, -1)
        content = {
            "image_data": random.integers(0, 256, (rows.size, 84, 84, 3), np.uint8),
            "class_dict": {f"{split}{cls}": indices.tolist() for cls, indices in enumerate(rows)},
        }
        (tmp_path / f"mini-imagenet-cache-{split}.pkl").write_bytes(pickle.dumps(content))
    return lambda **options: MiniImagenet(
        **{"num_ways": 2, "num_shots": 1} | options, data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache")
    )


def test_splits_are_those_of_the_files(make: Callable[..., MiniImagenet]) -> None:
    splits = make().splits
    assert {name: len(classes) for name, classes in splits.items()} == NUM_CLASSES
    assert sorted(torch.cat(list(splits.values())).tolist()) == list(range(9))


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_tasks_draw_distinct_classes_of_their_split_and_distinct_photos(
    make: Callable[..., MiniImagenet], split: str
) -> None:
    domain = make(num_shots=2, num_query=4)
    tasks = domain.sample_tasks(40, Stream(0), split)  # type: ignore[arg-type]
    assert torch.isin(tasks["classes"], domain.splits[split]).all()  # type: ignore[index]
    assert all(len(set(task)) == 2 for task in tasks["classes"].tolist())
    drawn = torch.cat([tasks["support_images"], tasks["query_images"]], dim=-1)
    assert all(sorted(cls) == list(range(6)) for task in drawn.tolist() for cls in task)


def test_images_are_the_photos_unturned_and_between_0_and_1(make: Callable[..., MiniImagenet]) -> None:
    domain = make(num_shots=2)
    tasks = domain.sample_tasks(3, Stream(0))
    data = domain.data(tasks, "query")
    assert domain.in_shape == (84, 84, 3)
    assert data.x.shape == (3, 4, 84, 84, 3)
    assert (data.x.min(), data.x.max()) == (0, 1)
    for task in range(3):
        for i, label in enumerate(data.y[task].tolist()):
            cls, photo = tasks["classes"][task, label], tasks["query_images"][task, label, i // 2]
            assert torch.equal(data.x[task, i], domain.images[cls, photo].reshape(84, 84, 3).float() / 255)


def test_a_model_takes_what_is_collected(make: Callable[..., MiniImagenet]) -> None:
    domain = make()
    params = {name: value.unsqueeze(0) for name, value in MODEL.init(Stream(0)).items()}
    data = domain.data(domain.sample_tasks(1, Stream(0)), "support")
    assert MODEL(params, data.x).shape == (1, 2, 2)


def test_missing_files_are_refused_with_what_goes_where(tmp_path: Path) -> None:
    with pytest.raises(MamlError, match=r"mini-imagenet-cache-train\.pkl"):
        MiniImagenet(5, 1, str(tmp_path / "nowhere"), str(tmp_path / "cache"))
