"""CIFAR-FS tasks on the real photos."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from maml.domain.cifar_fs import CifarFS
from maml.errors import MamlError
from maml.model.conv4 import Conv4
from maml.seeding import Stream

MODEL = Conv4((32, 32, 3), 5, num_filters=4)
DATA = os.environ["MAML_DATA"]


@pytest.fixture(scope="module")
def make(cache_dir: Path) -> Callable[..., CifarFS]:
    if not (Path(DATA) / "cifar-fs").is_dir():
        pytest.skip("the CIFAR-FS files are not at MAML_DATA")
    return lambda **options: CifarFS(
        **{"num_ways": 5, "num_shots": 1} | options, data_dir=DATA, cache_dir=str(cache_dir)
    )


def test_splits_are_disjoint_and_of_64_16_and_20_classes(make: Callable[..., CifarFS]) -> None:
    splits = make().splits
    assert {name: len(classes) for name, classes in splits.items()} == {"train": 64, "val": 16, "test": 20}
    assert sorted(torch.cat(list(splits.values())).tolist()) == list(range(100))


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_tasks_draw_distinct_classes_of_their_split_and_distinct_photos(
    make: Callable[..., CifarFS], split: str
) -> None:
    domain = make(num_shots=5, num_query=15)
    tasks = domain.sample_tasks(40, Stream(0), split)  # type: ignore[arg-type]
    assert torch.isin(tasks["classes"], domain.splits[split]).all()  # type: ignore[index]
    assert all(len(set(task)) == 5 for task in tasks["classes"].tolist())
    photos = torch.cat([tasks["support_images"], tasks["query_images"]], dim=-1)
    assert photos.shape == (40, 5, 20)
    assert (photos.min() >= 0) & (photos.max() < 600)
    assert all(len(set(cls)) == 20 for task in photos.tolist() for cls in task)


@pytest.mark.parametrize("role", ["support", "query"])
def test_images_are_the_photos_unturned_and_between_0_and_1(make: Callable[..., CifarFS], role: str) -> None:
    domain = make(num_shots=2)
    tasks = domain.sample_tasks(6, Stream(0))
    data = domain.data(tasks, role)  # type: ignore[arg-type]
    assert domain.in_shape == (32, 32, 3)
    assert data.x.shape == (6, 10, 32, 32, 3)
    assert "rotations" not in tasks
    assert (data.x.min(), data.x.max()) == (0, 1)
    for task in range(6):
        for i, label in enumerate(data.y[task].tolist()):
            cls, photo = tasks["classes"][task, label], tasks[f"{role}_images"][task, label, i // 5]
            assert torch.equal(data.x[task, i], domain.images[cls, photo].reshape(32, 32, 3).float() / 255)


@pytest.mark.parametrize(("num_shots", "num_query", "expected"), [(None, None, 15), (1, None, 1), (1, 4, 4)])
def test_query_photos_are_num_query_in_training_and_k_in_test(
    make: Callable[..., CifarFS], num_shots: int | None, num_query: int | None, expected: int
) -> None:
    tasks = make(num_query=15).sample_tasks(1, Stream(0), "test", num_shots, num_query)
    assert tasks["query_images"].shape[-1] == expected


def test_more_classes_than_a_split_has_is_refused(make: Callable[..., CifarFS]) -> None:
    domain = make(num_ways=17)
    assert domain.sample_tasks(1, Stream(0))["classes"].shape == (1, 17)
    with pytest.raises(MamlError, match="the val split has 16 classes"):
        domain.sample_tasks(1, Stream(0), "val")
    with pytest.raises(MamlError, match="the train split has 64 classes"):
        make(num_ways=65)
