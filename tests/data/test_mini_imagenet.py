"""Mini-ImageNet: small synthetic sets, intact or damaged, in the three supported layouts."""

import csv
import os
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from maml.data import mini_imagenet, photos
from maml.data.cache import ImageSet
from maml.data.mini_imagenet import load_mini_imagenet
from maml.data.photos import class_splits
from maml.errors import MamlError

SHARED_DATA = Path(os.environ["MAML_DATA"])
LABELS = {"train": ["n01", "n02", "n03"], "val": ["n04"], "test": ["n05", "n06"]}
NUM_IMAGES = 4
IMAGE_SIZE = 12


@pytest.fixture(autouse=True)
def expect_few_photos(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the loader expect 3, 1 and 2 classes of 4 photos of 12x12."""
    monkeypatch.setattr(photos, "NUM_CLASSES", {split: len(labels) for split, labels in LABELS.items()})
    monkeypatch.setattr(photos, "NUM_IMAGES", NUM_IMAGES)
    monkeypatch.setattr(mini_imagenet, "IMAGE_SIZE", IMAGE_SIZE)


def pixels() -> dict[str, np.ndarray]:
    """Returns the photos of each class, ``(4, 12, 12, 3)``."""
    random = np.random.default_rng(0)
    shape = (NUM_IMAGES, IMAGE_SIZE, IMAGE_SIZE, 3)
    return {label: random.integers(0, 256, shape, np.uint8) for labels in LABELS.values() for label in labels}


def save(image: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, "png")  # PNG content in spite of the name .jpg: lossless, so no pixel changes


def write_list(path: Path, rows: list[tuple[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("filename", "label"), *rows])


def make_listed(place: Path) -> None:
    for split, labels in LABELS.items():
        names = [(f"{label}{number:08d}.jpg", label) for label in labels for number in range(NUM_IMAGES)]
        write_list(place / f"{split}.csv", names)
        for row, (name, label) in enumerate(names):
            save(pixels()[label][row % NUM_IMAGES], place / "images" / name)


def make_folders(place: Path) -> None:
    for split, labels in LABELS.items():
        for label in labels:
            for number, image in enumerate(pixels()[label]):
                save(image, place / split / label / f"{number}.jpg")


def split_content(split: str) -> dict[str, Any]:
    labels = LABELS[split]
    rows = {label: list(range(NUM_IMAGES * i, NUM_IMAGES * (i + 1))) for i, label in enumerate(labels)}
    return {"image_data": np.concatenate([pixels()[label] for label in labels]), "class_dict": rows}


def write_pickle(place: Path, split: str, content: object, protocol: int = 2) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    path = place / f"mini-imagenet-cache-{split}.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def make_pickles(place: Path, protocol: int = 2) -> None:
    for split in LABELS:
        write_pickle(place, split, split_content(split), protocol)


LAYOUTS = {"listed": make_listed, "pickles": make_pickles, "folders": make_folders}


def python2_pickle(image_data: np.ndarray, class_dict: dict[str, list[int]]) -> bytes:
    """Returns a pickle as Python 2 and its numpy wrote it: text as bytes, and flags as numbers."""

    def text(value: str) -> bytes:
        return b"U" + bytes([len(value)]) + value.encode()

    def numbers(values: Any) -> bytes:
        return b"".join(b"M" + int(value).to_bytes(2, "little") for value in values)

    raw = image_data.tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01("
        + numbers(image_data.shape)
        + b"tcnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + len(raw).to_bytes(4, "little")
        + raw
        + b"tb"
    )
    classes = b"".join(text(label) + b"](" + numbers(rows) + b"e" for label, rows in class_dict.items())
    return b"\x80\x02}(" + text("image_data") + array + text("class_dict") + b"}(" + classes + b"uu."


def load(tmp_path: Path) -> ImageSet:
    return load_mini_imagenet(tmp_path / "data", tmp_path / "cache")


def error_message(tmp_path: Path) -> str:
    """Returns the error message of a load that fails; checks that no cache is left."""
    with pytest.raises(MamlError) as caught:
        load(tmp_path)
    assert not list((tmp_path / "cache").glob("*"))
    return str(caught.value)


def assert_is_complete_set(image_set: ImageSet) -> None:
    assert image_set.classes == ["test/n05", "test/n06", "train/n01", "train/n02", "train/n03", "val/n04"]
    assert image_set.images.dtype == torch.uint8
    expected = np.stack([pixels()[name.split("/")[1]] for name in image_set.classes])
    np.testing.assert_array_equal(image_set.images.numpy(), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("place", ["mini-imagenet", "mini_imagenet", "miniimagenet", "."])
def test_every_layout_in_every_place_gives_the_same_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], layout: str, place: str
) -> None:
    LAYOUTS[layout](tmp_path / "data" / place)
    assert_is_complete_set(load(tmp_path))
    assert capsys.readouterr().err.startswith("reading mini-ImageNet, once: about ")
    monkeypatch.setattr(photos, "stack", lambda *args: pytest.fail("the cache should have been enough"))
    monkeypatch.setattr(mini_imagenet, "stack", lambda *args: pytest.fail("the cache should have been enough"))
    assert_is_complete_set(load(tmp_path))
    shutil.rmtree(tmp_path / "data")
    assert_is_complete_set(load(tmp_path))
    assert capsys.readouterr().err == "", "a cache is read in silence"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rewritten_files_of_equal_size_give_the_new_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    write = LAYOUTS | {"pickles": partial(make_pickles, protocol=4)}  # earlier ones write bytes as text of any length
    write[layout](tmp_path / "data")
    before = load(tmp_path)
    sizes = {path: path.stat().st_size for path in (tmp_path / "data").rglob("*.*")}
    others = {label: 255 - images for label, images in pixels().items()}
    monkeypatch.setitem(globals(), "pixels", lambda: others)
    write[layout](tmp_path / "data")
    for path, size in sizes.items():
        assert path.stat().st_size == size
        os.utime(path, (0, 0))
    after = load(tmp_path)
    assert_is_complete_set(after)
    assert torch.equal(after.images, 255 - before.images)
    assert after.digest != before.digest


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_every_protocol_give_the_same_tensor(tmp_path: Path, protocol: int) -> None:
    make_pickles(tmp_path / "data", protocol)
    assert_is_complete_set(load(tmp_path))


def test_pickles_of_python_2_give_the_same_tensor(tmp_path: Path) -> None:
    make_pickles(tmp_path / "data")
    path = tmp_path / "data" / "mini-imagenet-cache-train.pkl"
    path.write_bytes(python2_pickle(**split_content("train")))
    assert_is_complete_set(load(tmp_path))


def test_pickles_with_keys_of_bytes_and_indices_in_arrays_give_the_same_tensor(tmp_path: Path) -> None:
    make_pickles(tmp_path / "data")
    content = split_content("train")
    classes = {label.encode(): np.array(rows[::-1]) for label, rows in content["class_dict"].items()}
    write_pickle(tmp_path / "data", "train", {b"image_data": content["image_data"], b"class_dict": classes})
    assert_is_complete_set(load(tmp_path))


def test_class_splits_are_the_indices_of_each_split(tmp_path: Path) -> None:
    make_folders(tmp_path / "data")
    image_set = load(tmp_path)
    splits = class_splits(image_set.classes)
    assert {split: rows.tolist() for split, rows in splits.items()} == {"train": [2, 3, 4], "val": [5], "test": [0, 1]}


def test_images_of_other_sizes_and_modes_are_resized_rgb(tmp_path: Path) -> None:
    make_folders(tmp_path / "data")
    folder = tmp_path / "data" / "train" / "n01"
    large = np.random.default_rng(1).integers(0, 256, (120, 200, 3), np.uint8)
    save(large, folder / "0.jpg")
    Image.fromarray(large).convert("L").save(folder / "1.jpg", "jpeg")
    first, grey = load(tmp_path).images[2, :2].numpy()
    np.testing.assert_array_equal(first, Image.fromarray(large).resize((12, 12), Image.Resampling.LANCZOS))
    assert (grey == grey[..., :1]).all()


def test_transparent_image_is_laid_on_white(tmp_path: Path) -> None:
    make_folders(tmp_path / "data")
    clear = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    clear.save(tmp_path / "data" / "train" / "n01" / "0.jpg", "png")
    assert (load(tmp_path).images[2, 0] == 255).all()


def test_nothing_found_says_what_goes_where(tmp_path: Path) -> None:
    text, place = error_message(tmp_path), tmp_path / "data" / "mini-imagenet"
    for part in ("images/*.jpg", "train.csv", "mini-imagenet-cache-train.pkl", "train/<class>/*.jpg"):
        assert f"{place}/{part}" in text
    assert "MAML_DATA" in text
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("layout", ["listed", "folders"])
def test_missing_image_is_named_by_its_class(tmp_path: Path, layout: str) -> None:
    LAYOUTS[layout](tmp_path / "data")
    next((tmp_path / "data").rglob("*.jpg")).unlink()
    assert "has 3 of 4 images" in error_message(tmp_path)


def test_image_that_a_list_names_and_is_missing_is_named(tmp_path: Path) -> None:
    make_listed(tmp_path / "data")
    (tmp_path / "data" / "images" / "n0200000003.jpg").unlink()
    text = error_message(tmp_path)
    assert "images/n0200000003.jpg of train.csv is missing" in text
    assert "train/n02 has 3 of 4 images" in text
    assert "n01" not in text


def test_many_missing_images_are_counted(tmp_path: Path) -> None:
    make_listed(tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "images")
    (tmp_path / "data" / "images").mkdir()
    # 24 images and the classes of 3 splits are missing; the message names 10.
    assert "and 17 more" in error_message(tmp_path)


def test_surplus_image_is_refused_and_hidden_files_are_not(tmp_path: Path) -> None:
    make_folders(tmp_path / "data")
    (tmp_path / "data" / "val" / "n04" / "._1.jpg").touch()
    (tmp_path / "data" / "val" / "n04" / "Thumbs.db").touch()
    save(pixels()["n01"][0], tmp_path / "data" / "train" / "n03" / "9.jpg")
    text = error_message(tmp_path)
    assert "train/n03 has 5 of 4 images" in text
    assert "n04" not in text


@pytest.mark.parametrize("layout", ["pickles", "folders"])
def test_missing_class_is_counted(tmp_path: Path, layout: str) -> None:
    LAYOUTS[layout](tmp_path / "data")
    if layout == "folders":
        shutil.rmtree(tmp_path / "data" / "test" / "n06")
    else:
        content = split_content("test")
        del content["class_dict"]["n06"]
        write_pickle(tmp_path / "data", "test", content)
    assert "test has 1 of 2 classes" in error_message(tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_missing_split_is_named(tmp_path: Path, layout: str) -> None:
    LAYOUTS[layout](tmp_path / "data")
    if layout == "folders":
        shutil.rmtree(tmp_path / "data" / "val")
        assert "val has 0 of 1 classes" in error_message(tmp_path)
    else:
        path = next((tmp_path / "data").glob("*val.[cp]*"))
        path.unlink()
        assert path.name in error_message(tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_class_in_two_splits_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    monkeypatch.setitem(LABELS, "test", ["n05", "n01"])
    LAYOUTS[layout](tmp_path / "data")
    assert "n01 is a class of 2 splits" in error_message(tmp_path)


@pytest.mark.parametrize("content", [b"<html>404</html>", b"", b"\xff\xfe\x00", b"name,class\na.jpg,n01\n"])
def test_unusable_list_is_refused(tmp_path: Path, content: bytes) -> None:
    make_listed(tmp_path / "data")
    (tmp_path / "data" / "val.csv").write_bytes(content)
    assert "val.csv cannot be read as a list" in error_message(tmp_path)


@pytest.mark.parametrize("layout", ["listed", "folders"])
@pytest.mark.parametrize("damage", ["truncated", "page"])
def test_undecodable_image_is_named(tmp_path: Path, layout: str, damage: str) -> None:
    LAYOUTS[layout](tmp_path / "data")
    path = sorted((tmp_path / "data").rglob("*.jpg"))[5]
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"<html>404</html>")
    text = error_message(tmp_path)
    assert f"{path.relative_to(tmp_path / 'data')} in {tmp_path / 'data'} cannot be decoded" in text


class ShellCommand:
    """Runs a shell command when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_with_code_is_refused_and_not_run(tmp_path: Path, protocol: int) -> None:
    make_pickles(tmp_path / "data")
    content = split_content("val") | {"more": ShellCommand(tmp_path / "harmed")}
    write_pickle(tmp_path / "data", "val", content, protocol)
    assert "system, which arrays do not need and could do harm" in error_message(tmp_path)
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("function", [eval, exec, getattr, __import__, np.load, np.fromfile])
def test_pickle_that_names_any_function_is_refused(tmp_path: Path, function: object) -> None:
    make_pickles(tmp_path / "data")
    write_pickle(tmp_path / "data", "val", {"image_data": function})
    assert "could do harm" in error_message(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "page", "empty"])
def test_damaged_pickle_is_named(tmp_path: Path, damage: str) -> None:
    make_pickles(tmp_path / "data")
    path = tmp_path / "data" / "mini-imagenet-cache-test.pkl"
    content = path.read_bytes()
    path.write_bytes({"truncated": content[:-5], "page": b"<html>404</html>", "empty": b""}[damage])
    assert f"{path} cannot be read as a pickled dictionary of arrays" in error_message(tmp_path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"data": [1], "labels": [2]}, "has no image_data and no class_dict, but data, labels"),
        ({}, "has no image_data and no class_dict, but nothing"),
        ([1, 2], "cannot be read as a pickled dictionary"),
        ({"image_data": np.zeros((4, 12, 12, 3), np.float32), "class_dict": {}}, "image_data is float32"),
        ({"image_data": [1, 2], "class_dict": {}}, "does not hold images and their classes"),
        (split_content("val") | {"class_dict": {"n04": [0, 1, 2, 4]}}, "out of bounds"),
        (split_content("val") | {"class_dict": {"n04": [0, 1, 2, 2]}}, "val/n04 has 3 of 4 images"),
        (split_content("val") | {"class_dict": ["n04"]}, "does not hold images and their classes"),
    ],
)
def test_pickle_of_something_else_says_what_it_holds(tmp_path: Path, content: object, expected: str) -> None:
    make_pickles(tmp_path / "data")
    write_pickle(tmp_path / "data", "val", content)
    assert expected in error_message(tmp_path)


@pytest.mark.skipif(
    not (SHARED_DATA / "mini-imagenet" / "train.csv").exists(), reason=f"no lists of mini-ImageNet in {SHARED_DATA}"
)
def test_real_lists_are_64_16_and_20_classes_of_600(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    place = SHARED_DATA / "mini-imagenet"
    names = [name for split in LABELS for name, _ in mini_imagenet._read_list(place / f"{split}.csv")]
    monkeypatch.setattr(mini_imagenet, "list_files", lambda *args: [(f"images/{name}", 1) for name in names])
    listed = mini_imagenet._listed(place)  # raises if the lists are not complete
    assert len(listed) == 100
    assert next(iter(listed["train/n01532829"])) == "images/n0153282900000005.jpg"
