"""Folders of pictures: how they are listed, shared out, read and cached."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from maml.data import image_folder
from maml.data.cache import ImageSet
from maml.data.image_folder import list_splits, load_image_folder
from maml.errors import MamlError, Unavailable

SHAPE = (6, 5, 3)
COUNTS = {"ant": 3, "bee": 2, "cat": 5}


def colour(name: str, number: int) -> tuple[int, int, int]:
    return (ord(name[0]), 10 * number, len(name))


def make(folder: Path, counts: Mapping[str, int], ending: str = "png") -> None:
    """Writes a folder for each class with so many pictures, each of its own colour and size."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            Image.new("RGB", (7 + number, 9), colour(name, number)).save(folder / name / f"{number}.{ending}")


def make_splits(root: Path) -> None:
    make(root / "train", COUNTS)
    make(root / "test", {"dog": 4, "emu": 4})


def names(root: Path, split: object) -> dict[str, list[str]]:
    return {one: [*classes] for one, classes in list_splits(root, split).items()}  # type: ignore[arg-type]


def load(root: Path, cache_dir: Path, split: object = (1.0, 0.0, 0.0)) -> ImageSet:
    listed = list_splits(root, split)  # type: ignore[arg-type]
    classes = {name: files for found in listed.values() for name, files in found.items()}
    return load_image_folder(root, classes, cache_dir, SHAPE, is_drawing=False)


def test_folders_of_splits_are_the_splits(tmp_path: Path) -> None:
    make_splits(tmp_path)
    assert names(tmp_path, None) == {
        "train": ["train/ant", "train/bee", "train/cat"],
        "test": ["test/dog", "test/emu"],
    }


def test_shares_cut_the_classes_always_in_the_same_way(tmp_path: Path) -> None:
    classes = {f"class {number:02d}": 1 for number in range(20)}
    make(tmp_path, classes)
    found = names(tmp_path, (0.6, 0.15, 0.25))
    assert {one: len(chosen) for one, chosen in found.items()} == {"train": 12, "val": 3, "test": 5}
    assert sorted(name for chosen in found.values() for name in chosen) == sorted(classes)
    assert names(tmp_path, (0.6, 0.15, 0.25)) == found
    assert found["test"] != sorted(classes)[-5:], "they are shuffled"
    assert names(tmp_path, (0.75, 0.0, 0.25)) == {"train": sorted(found["train"] + found["val"]), "test": found["test"]}


def test_split_file_says_which_class_is_where(tmp_path: Path) -> None:
    make(tmp_path / "own", COUNTS)
    expected = {"train": ["ant", "cat"], "test": ["bee"]}
    for place in (tmp_path / "own" / "split.csv", tmp_path / "elsewhere.csv"):
        place.write_text("class,split\ncat,train\nbee,test\nant,train\n", encoding="utf-8-sig")
    assert names(tmp_path / "own", "split.csv") == expected
    assert names(tmp_path / "own", str(tmp_path / "elsewhere.csv")) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class,split\nant,train\nbee,tset\ncat,test\n", "bee has the split tset, not train, val or test"),
        ("class,split\nant,train\nbee,test\n", "the folder cat is not in the file"),
        ("class,split\nant,train\nbee,test\ncat,test\ncow,val\n", "cow has no folder in"),
        ("class,split\nant,train\nbee,test\ncat,test\nant,val\n", "ant: in more than one split"),
        ("name,part\nant,train\n", "it does not start with the line class,split"),
        ("class,split\nant\nbee,test\ncat,test\n", "ant has the split None"),
    ],
)
def test_wrong_split_file_says_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    make(tmp_path, COUNTS)
    (tmp_path / "split.csv").write_text(text)
    with pytest.raises(MamlError, match=message):
        list_splits(tmp_path, "split.csv")


def test_line_of_a_split_file_may_come_twice(tmp_path: Path) -> None:
    make(tmp_path, COUNTS)
    (tmp_path / "split.csv").write_text("class,split\nant,train\nant,train\nbee,test\ncat,test\n")
    assert list_splits(tmp_path, "split.csv")["train"].keys() == {"ant"}


def test_layout_that_does_not_fit_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"there is no folder .*set domain\.folder="):
        list_splits(tmp_path / "gone", None)
    make(tmp_path / "flat", COUNTS)
    with pytest.raises(MamlError, match=r"has no folders train/ and test/.*domain\.split=\[0\.6,0\.2,0\.2\]"):
        list_splits(tmp_path / "flat", None)
    with pytest.raises(MamlError, match="three shares"):
        list_splits(tmp_path / "flat", (0.5, 0.2, 0.2))
    with pytest.raises(MamlError, match=r"gone\.csv cannot be read as a csv file"):
        list_splits(tmp_path / "flat", "gone.csv")
    with pytest.raises(MamlError, match=r"is a folder, but .*flat should hold the pictures of one class"):
        list_splits(tmp_path, (0.6, 0.2, 0.2))
    make_splits(tmp_path / "splits")
    with pytest.raises(MamlError, match="leave out split="):
        list_splits(tmp_path / "splits", (0.6, 0.2, 0.2))
    make(tmp_path / "splits" / "test", {"ant": 1})
    with pytest.raises(MamlError, match="ant: in more than one split"):
        list_splits(tmp_path / "splits", None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MamlError, match="empty has no folders"):
        list_splits(tmp_path / "empty", (0.6, 0.2, 0.2))


def test_class_whose_name_is_not_utf8_is_refused(tmp_path: Path) -> None:
    make(tmp_path, {"caf\udce9": 2, "th\u00e9": 2})
    with pytest.raises(MamlError, match=r"has a folder 'caf\\udce9', whose name is not UTF-8"):
        list_splits(tmp_path, (0.5, 0.0, 0.5))
    (tmp_path / "caf\udce9").rename(tmp_path / "caf\u00e9")
    assert len(list_splits(tmp_path, (0.5, 0.0, 0.5))) == 2


@pytest.mark.parametrize("name", ["dog", "cat/7.png"])
def test_link_that_leads_nowhere_is_refused_because_a_class_would_be_missing(tmp_path: Path, name: str) -> None:
    make(tmp_path, COUNTS)
    (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(MamlError, match=f"{name} is a link to .*elsewhere, which is not there; mend or delete it"):
        names(tmp_path, (1.0, 0.0, 0.0))


def test_classes_of_unequal_size_lie_one_after_the_other(tmp_path: Path) -> None:
    make(tmp_path / "own", COUNTS)
    data = load(tmp_path / "own", tmp_path / "cache")
    assert (data.images.dtype, data.images.shape) == (torch.uint8, (1, 10, *SHAPE))
    assert (data.classes, data.counts) == (["ant", "bee", "cat"], [3, 2, 5])
    expected = [colour(name, number) for name, count in COUNTS.items() for number in range(count)]
    assert data.images[0, :, 0, 0].tolist() == [list(one) for one in expected]
    assert (data.images == data.images[:, :, :1, :1]).all(), "the pictures are plain"


def test_classes_of_equal_size_have_an_axis(tmp_path: Path) -> None:
    make(tmp_path / "own", {"ant": 2, "bee": 2})
    data = load(tmp_path / "own", tmp_path / "cache")
    assert (data.images.shape, data.counts) == ((2, 2, *SHAPE), None)
    assert data.images[1, 1, 0, 0].tolist() == list(colour("bee", 1))


def test_every_common_format_is_read(tmp_path: Path) -> None:
    for number, ending in enumerate(["png", "jpg", "JPEG", "gif", "bmp", "webp", "tiff", "ppm"]):
        path = tmp_path / "own" / f"class {number}" / f"a.{ending}"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (9, 9), (0, 200, 0)).save(path)
    images = load(tmp_path / "own", tmp_path / "cache").images.float()
    assert images.shape == (8, 1, *SHAPE)
    assert (images - torch.tensor([0.0, 200, 0])).abs().max() <= 3


def test_hidden_files_and_those_of_systems_do_not_count_and_others_cause_a_warning(tmp_path: Path) -> None:
    make(tmp_path / "own", COUNTS)
    for name in (".DS_Store", "Thumbs.db", "._0.png"):
        (tmp_path / "own" / "bee" / name).touch()
    (tmp_path / "own" / ".git").mkdir()
    (tmp_path / "own" / "list.txt").touch()
    assert load(tmp_path / "own", tmp_path / "cache").counts == [3, 2, 5]
    (tmp_path / "own" / "bee" / "photo.heic").touch()
    with pytest.warns(UserWarning, match=r"bee/photo\.heic: by the name no picture that Pillow reads"):
        load(tmp_path / "own", tmp_path / "cache")


def test_pictures_outside_of_classes_and_splits_cause_a_warning(tmp_path: Path) -> None:
    make_splits(tmp_path)
    shutil.copytree(tmp_path / "test", tmp_path / "valid")
    with pytest.warns(UserWarning, match=r"valid: not train/, val/ or test/, so left out"):
        splits = list_splits(tmp_path, None)
    assert "val" not in splits
    shutil.rmtree(tmp_path / "valid")
    loose = tmp_path / "test" / "loose.png"
    shutil.copy(next((tmp_path / "test").glob("*/*.png")), loose)
    (tmp_path / "test" / "notes.txt").touch()
    with pytest.warns(UserWarning, match=r"test/loose\.png: in no folder of a class, so left out"):
        assert list_splits(tmp_path, None) == splits


def test_pictures_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    make(tmp_path / "own", COUNTS)
    (tmp_path / "own" / "cat" / "3.png").write_text("<html>404</html>")
    whole = (tmp_path / "own" / "ant" / "1.png").read_bytes()
    (tmp_path / "own" / "ant" / "1.png").write_bytes(whole[:50])
    with pytest.raises(
        MamlError, match=r"no pictures that can be read: .*ant/1\.png \(.*cat/3\.png \(.*mend or remove"
    ):
        load(tmp_path / "own", tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_class_without_pictures_is_named(tmp_path: Path) -> None:
    make(tmp_path / "own", COUNTS | {"cow": 0})
    with pytest.raises(MamlError, match="cow has no pictures"):
        load(tmp_path / "own", tmp_path / "cache")


def test_blank_drawings_cause_one_warning_that_names_them(tmp_path: Path) -> None:
    for name, level in (("ant", 255), ("bee", 0)):
        (tmp_path / "own" / name).mkdir(parents=True)
        Image.new("L", (9, 9), level).save(tmp_path / "own" / name / "1.png")
    (classes,) = list_splits(tmp_path / "own", (1.0, 0.0, 0.0)).values()
    with pytest.warns(UserWarning, match=r"ant/1\.png is all paper, .*bee/1\.png is all ink at 5x6 pixels"):
        data = load_image_folder(tmp_path / "own", classes, tmp_path / "cache", (6, 5, 1), is_drawing=True)
    assert data.images.flatten(1).amax(1).tolist() == [0, 1]


def test_pictures_are_read_once_until_their_content_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "own", COUNTS)
    first = load(tmp_path / "own", tmp_path / "cache")
    read = Mock(wraps=image_folder.to_pixels)
    monkeypatch.setattr(image_folder, "to_pixels", read)
    (tmp_path / "own").rename(tmp_path / "moved")
    for split in ((1.0, 0.0, 0.0), (0.3, 0.3, 0.4)):
        again = load(tmp_path / "moved", tmp_path / "cache", split)
        assert (again.digest, again.classes, again.counts) == (first.digest, first.classes, first.counts)
        assert torch.equal(again.images, first.images)
    assert not read.called
    path = tmp_path / "moved" / "cat" / "4.png"
    Image.new("RGB", (11, 9), (255, 0, 0)).save(path)
    assert load(tmp_path / "moved", tmp_path / "cache").images[0, -1, 0, 0].tolist() == [255, 0, 0]
    assert read.call_count == 10
    assert capsys.readouterr().err == "", "reading took no time worth a line"


def test_grey_and_drawings_have_one_channel(tmp_path: Path) -> None:
    (tmp_path / "own" / "ant").mkdir(parents=True)
    ink = np.zeros((60, 60), bool)
    ink[20:30] = True
    Image.fromarray(np.where(ink, 60, 200).astype(np.uint8)).save(tmp_path / "own" / "ant" / "1.png")
    (classes,) = list_splits(tmp_path / "own", (1.0, 0.0, 0.0)).values()
    for is_drawing, low, high in ((False, 60, 200), (True, 1, 0)):
        images = load_image_folder(tmp_path / "own", classes, tmp_path / "cache", (6, 6, 1), is_drawing).images
        assert int(images[0, 0, 0, 0, 0]) == pytest.approx(high, abs=5)
        assert int(images[0, 0, 2, 0, 0]) == pytest.approx(low, abs=20 if low > 1 else 0)
