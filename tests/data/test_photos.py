"""The code that mini-ImageNet and CIFAR-FS share: splits by name, photo counts, and stacking into one tensor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maml.data import photos
from maml.data.files import file_on_disk
from maml.data.photos import NUM_CLASSES, NUM_IMAGES, cached_photos, check_classes, class_splits, stack
from maml.errors import MamlError

WHOLE = {f"{split}/{split}{number}": NUM_IMAGES for split, count in NUM_CLASSES.items() for number in range(count)}


def test_splits_hold_the_indices_of_their_classes() -> None:
    found = class_splits(["test/a", "train/b", "test/c", "val/d", "train/trainer"])
    assert {split: indices.tolist() for split, indices in found.items()} == {
        "train": [1, 4],
        "val": [3],
        "test": [0, 2],
    }


def test_whole_set_is_accepted() -> None:
    check_classes(WHOLE, "mend it")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train/train0": NUM_IMAGES - 1}, "train/train0 has 599 of 600 images; mend it"),
        ({"val/more": NUM_IMAGES}, "val has 17 of 16 classes; mend it"),
        ({"test/test3": None}, "test has 19 of 20 classes; mend it"),
        ({"val/val3": None, "val/test0": NUM_IMAGES}, "test0 is a class of 2 splits; mend it"),
        ({"train/train0": 1, "test/test3": None}, "test has 19 of 20 classes, train/train0 has 1 of 600 images; mend"),
    ],
)
def test_what_is_missing_or_too_much_is_named(change: dict[str, int | None], message: str) -> None:
    counts = {name: count for name, count in (WHOLE | change).items() if count is not None}
    with pytest.raises(MamlError, match=message):
        check_classes(counts, "mend it")


def test_faults_known_already_come_first() -> None:
    with pytest.raises(MamlError, match=r"^a list is missing, val has 0 of 16 classes; mend it"):
        check_classes(
            {name: n for name, n in WHOLE.items() if not name.startswith("val")}, "mend it", ["a list is missing"]
        )


def test_photos_are_stacked_by_sorted_class_in_the_order_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos, "NUM_IMAGES", 2)
    images, classes = stack({"val/b": [3, 4], "train/a": [2, 1]}, lambda value: np.full((4, 5, 3), value, np.uint8))
    assert classes == ["train/a", "val/b"]
    assert images.shape == (2, 2, 4, 5, 3)
    assert images[:, :, 0, 0, 0].tolist() == [[2, 1], [3, 4]]


def test_photos_of_a_class_are_sorted_by_file_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos, "NUM_IMAGES", 2)
    for name, level in (("2.png", 20), ("1.png", 10)):
        Image.new("RGB", (3, 3), (level, level, level)).save(tmp_path / name)
    listed = {"train/a": {name: file_on_disk(tmp_path / name) for name in ("2.png", "1.png")}}
    data = cached_photos(tmp_path / "cache", "set", "a set", tmp_path, lambda: listed, lambda photo: photo, "mend it")
    assert data.images[0, :, 0, 0, 0].tolist() == [10, 20]
