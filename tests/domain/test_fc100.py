"""FC100 tasks on the real photos, and its classes against CIFAR-100's own table."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from maml.data.cifar_fs import SPLITS
from maml.domain.cifar_fs import CifarFS
from maml.domain.fc100 import FC100, KINDS
from maml.seeding import Stream

DATA = os.environ["MAML_DATA"]

# The kind of each class, both in alphabetical order, as CIFAR-100's files number them.
KIND_OF_CLASS = [
    *(4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7),
    *(6, 13, 15, 3, 15, 0, 11, 1, 10, 12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10),
    *(16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16),
    *(12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13),
]


@pytest.fixture(scope="module")
def domain(cache_dir: Path) -> FC100:
    if not (Path(DATA) / "cifar-fs").is_dir():
        pytest.skip("the CIFAR-FS files are not at MAML_DATA")
    return FC100(num_ways=5, num_shots=1, num_query=15, data_dir=DATA, cache_dir=str(cache_dir))


def test_kinds_are_those_of_cifar_100s_table() -> None:
    kinds = KINDS["train"] | KINDS["val"] | KINDS["test"]
    classes, names = sorted(label for labels in SPLITS.values() for label in labels), sorted(kinds)
    assert len(KIND_OF_CLASS) == len(classes) == 100 and len(names) == 20
    for number, name in enumerate(names):
        members = [label for label, kind in zip(classes, KIND_OF_CLASS, strict=True) if kind == number]
        assert kinds[name] == members, name


def test_splits_have_60_20_and_20_classes_and_share_no_kind(domain: FC100) -> None:
    assert {split: len(classes) for split, classes in domain.splits.items()} == {"train": 60, "val": 20, "test": 20}
    assert sorted(torch.cat(list(domain.splits.values())).tolist()) == list(range(100))
    assert domain.num_train_classes == 60
    for split, classes in domain.splits.items():
        names = {domain.class_names[i] for i in classes.tolist()}
        assert names == {f"{split}/{kind}/{label}" for kind, labels in KINDS[split].items() for label in labels}
    assert set(KINDS["test"]) == {"aquatic_mammals", "insects", "medium_mammals", "people"}
    assert set(KINDS["val"]) == {
        "large_carnivores",
        "large_omnivores_and_herbivores",
        "non-insect_invertebrates",
        "small_mammals",
    }


def test_photos_are_those_of_the_class_in_cifar_fs(domain: FC100, cache_dir: Path) -> None:
    other = CifarFS(num_ways=5, num_shots=1, data_dir=DATA, cache_dir=str(cache_dir))
    assert [name.split("/")[2] for name in domain.class_names] == [name.split("/")[1] for name in other.class_names]
    assert torch.equal(domain.images, other.images)
    assert domain.data_digest != other.data_digest, "the split is another"


def test_tasks_draw_distinct_classes_of_their_split(domain: FC100) -> None:
    tasks = domain.sample_tasks(20, Stream(0), "test")
    assert torch.isin(tasks["classes"], domain.splits["test"]).all()
    assert all(len(set(task)) == 5 for task in tasks["classes"].tolist())
    data = domain.data(tasks, "query")
    assert data.x.shape == (20, 75, 32, 32, 3)
    assert (data.x.min(), data.x.max()) == (0, 1)
