"""CIFAR-FS: the real photos, and small intact or damaged sets in every supported layout."""

import os
import pickle
import shutil
import sys
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from PIL import Image

from maml.data import cifar_fs, photos
from maml.data.cache import ImageSet
from maml.data.cifar_fs import SPLITS, load_cifar_fs
from maml.data.photos import class_splits
from maml.errors import MamlError
from tests.data.fake_torchvision import broken_operators, install_torchvision, no_network

SHARED_DATA = Path(os.environ["MAML_DATA"])
ZIP = SHARED_DATA / "cifar-fs" / "cifar100.zip"
FEW_LABELS = {"train": ["cattle", "apple", "bee"], "val": ["worm"], "test": ["fox", "sea"]}
NUM_IMAGES = 5
CLASSES = ["test/fox", "test/sea", "train/apple", "train/bee", "train/cattle", "val/worm"]

pytestmark = pytest.mark.skipif(
    not ZIP.exists(), reason=f"no {ZIP}; set MAML_DATA to the folder that has the data sets"
)


@pytest.fixture(scope="session")
def real_set(cache_dir: Path) -> ImageSet:
    return load_cifar_fs(SHARED_DATA, cache_dir, download=False)


@pytest.fixture
def expect_few_photos(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the loader expect 3, 1 and 2 classes of 5 photos."""
    monkeypatch.setattr(cifar_fs, "SPLITS", FEW_LABELS)
    monkeypatch.setattr(photos, "NUM_CLASSES", {split: len(labels) for split, labels in FEW_LABELS.items()})
    for module in (cifar_fs, photos):
        monkeypatch.setattr(module, "NUM_IMAGES", NUM_IMAGES)


@pytest.fixture(scope="module")
def pngs() -> dict[str, bytes]:
    """The first five photos of six classes, by path."""
    with ZipFile(ZIP) as archive:
        names = sorted(archive.namelist())
        chosen = {
            label: [name for name in names if name.startswith(f"images/{label}/")][:NUM_IMAGES]
            for labels in FEW_LABELS.values()
            for label in labels
        }
        return {name: archive.read(name) for names in chosen.values() for name in names}


def decode(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(png)).convert("RGB"))


def make_zip(data_dir: Path, pngs: Mapping[str, bytes]) -> None:
    (data_dir / "cifar-fs").mkdir(parents=True)
    with ZipFile(data_dir / "cifar-fs" / "cifar100.zip", "w") as archive:
        for name, png in pngs.items():
            archive.writestr(name, png)


def make_folder(data_dir: Path, pngs: Mapping[str, bytes]) -> None:
    for name, png in pngs.items():
        path = data_dir / "cifar-fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png)


def make_published(data_dir: Path, pngs: Mapping[str, bytes]) -> None:
    """Writes the published form: two shuffled halves with channels first."""
    place = data_dir / "cifar-fs" / "cifar-100-python"
    place.mkdir(parents=True)
    labels = sorted({name.split("/")[1] for name in pngs})
    (place / "meta").write_bytes(pickle.dumps({"fine_label_names": labels, "coarse_label_names": []}, 2))
    names = [str(name) for name in np.random.default_rng(0).permutation(sorted(pngs))]
    for half, rows in (("train", names[:20]), ("test", names[20:])):
        content = {
            "filenames": [name.split("/")[2] for name in rows],
            "fine_labels": [labels.index(name.split("/")[1]) for name in rows],
            "data": np.stack([decode(pngs[name]).transpose(2, 0, 1).reshape(-1) for name in rows]),
        }
        (place / half).write_bytes(pickle.dumps(content, 2))


LAYOUTS = {"zip": make_zip, "folder": make_folder, "published": make_published}


def load(tmp_path: Path) -> ImageSet:
    return load_cifar_fs(tmp_path / "data", tmp_path / "cache", download=False)


def error_message(tmp_path: Path) -> str:
    """Returns the error message of a load that fails; checks that no cache is left."""
    with pytest.raises(MamlError) as caught:
        load(tmp_path)
    assert not list((tmp_path / "cache").glob("*"))
    return str(caught.value)


def assert_is_complete_set(image_set: ImageSet, pngs: Mapping[str, bytes]) -> None:
    assert image_set.classes == CLASSES
    for name, images in zip(image_set.classes, image_set.images.numpy(), strict=True):
        paths = sorted(path for path in pngs if path.split("/")[1] == name.split("/")[1])
        np.testing.assert_array_equal(images, np.stack([decode(pngs[path]) for path in paths]))


def test_real_set_has_100_classes_of_600_colour_photos(real_set: ImageSet) -> None:
    assert real_set.images.shape == (100, 600, 32, 32, 3)
    assert real_set.images.dtype == torch.uint8
    assert (real_set.images.min(), real_set.images.max()) == (0, 255)
    assert (real_set.images[..., 0] != real_set.images[..., 2]).float().mean() > 0.5


def test_unchanged_zip_is_not_listed_again(
    real_set: ImageSet, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar_fs, "list_files", lambda *_: pytest.fail("listed"))
    assert load_cifar_fs(SHARED_DATA, cache_dir, download=False).digest == real_set.digest


def test_real_set_is_the_same_everywhere(real_set: ImageSet) -> None:
    # Every result on CIFAR-FS depends on these pixels in this order.
    assert real_set.digest == "727f03251a98d01a99f4cc8e9dbc4ceac94dc21e3192e2d1731e358d55fcc9d2"


def test_real_photos_are_in_the_order_of_their_names_as_pillow_decodes_them(real_set: ImageSet) -> None:
    # The compared photo differs from class to class.
    with ZipFile(ZIP) as archive:
        names = sorted(archive.namelist())
        for index in range(100):
            name = names[600 * index + 7 * index % 600]
            split = next(split for split, labels in SPLITS.items() if name.split("/")[1] in labels)
            image = real_set.images[real_set.classes.index(f"{split}/{name.split('/')[1]}"), 7 * index % 600]
            np.testing.assert_array_equal(image.numpy(), decode(archive.read(name)), err_msg=name)


def test_real_split_is_the_published_one(real_set: ImageSet) -> None:
    rows = class_splits(real_set.classes)
    assert sorted(torch.cat(list(rows.values())).tolist()) == list(range(100))
    for split, labels in SPLITS.items():
        listed = (SHARED_DATA / "cifar-fs" / f"{split}.txt").read_text().split()
        assert labels == listed
        assert [real_set.classes[row] for row in rows[split]] == [f"{split}/{label}" for label in sorted(listed)]  # type: ignore[index]


@pytest.mark.usefixtures("expect_few_photos")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_tensor(
    tmp_path: Path,
    pngs: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    layout: str,
) -> None:
    LAYOUTS[layout](tmp_path / "data", pngs)
    assert_is_complete_set(load(tmp_path), pngs)
    assert capsys.readouterr().err.startswith("reading CIFAR-FS, once: ")
    for module in (photos, cifar_fs):
        monkeypatch.setattr(module, "stack", lambda *args: pytest.fail("the cache should have been enough"))
    assert_is_complete_set(load(tmp_path), pngs)
    shutil.rmtree(tmp_path / "data")
    assert_is_complete_set(load(tmp_path), pngs)


@pytest.mark.usefixtures("expect_few_photos")
def test_published_files_are_found_in_data_dir_itself(tmp_path: Path, pngs: dict[str, bytes]) -> None:
    make_published(tmp_path / "data", pngs)
    (tmp_path / "data" / "cifar-fs" / "cifar-100-python").rename(tmp_path / "data" / "cifar-100-python")
    assert_is_complete_set(load(tmp_path), pngs)


@pytest.mark.usefixtures("expect_few_photos")
def test_extracting_the_zip_keeps_the_cache(
    tmp_path: Path, pngs: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_zip(tmp_path / "data", pngs)
    load(tmp_path)
    monkeypatch.setattr(photos, "stack", lambda *args: pytest.fail("the cache should have been enough"))
    (tmp_path / "data" / "cifar-fs" / "cifar100.zip").unlink()
    make_folder(tmp_path / "data", pngs)
    assert_is_complete_set(load(tmp_path), pngs)


def write_lists(tmp_path: Path, splits: Mapping[str, list[str]]) -> None:
    (tmp_path / "data" / "cifar-fs").mkdir(parents=True, exist_ok=True)
    for split, labels in splits.items():
        (tmp_path / "data" / "cifar-fs" / f"{split}.txt").write_text("\n".join(labels) + "\n")


@pytest.mark.usefixtures("expect_few_photos")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_lists_replace_the_published_split_and_the_cache(tmp_path: Path, pngs: dict[str, bytes], layout: str) -> None:
    LAYOUTS[layout](tmp_path / "data", pngs)
    published = load(tmp_path)
    write_lists(tmp_path, {"train": ["sea", "apple", "bee"], "val": ["worm"], "test": ["fox", "cattle"]})
    other = load(tmp_path)
    assert other.classes == ["test/cattle", "test/fox", "train/apple", "train/bee", "train/sea", "val/worm"]
    assert torch.equal(other.images[0], published.images[CLASSES.index("train/cattle")])
    assert other.digest != published.digest


@pytest.mark.usefixtures("expect_few_photos")
@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        ({"train": ["cattle", "apple"], "val": ["worm"], "test": ["fox", "sea"]}, "train has 2 of 3 classes"),
        ({"train": ["cattle", "apple", "sea"], "val": ["worm"], "test": ["fox", "sea"]}, "sea is a class of 2 splits"),
        ({"train": ["cattle", "apple", "cow"], "val": ["worm"], "test": ["fox", "sea"]}, "cow of train.txt is not"),
        ({"train": ["cattle", "apple", "bee"], "test": ["fox", "sea"]}, "val.txt missing"),
        ({"train": ["<html>404</html>"], "val": ["worm"], "test": ["fox", "sea"]}, "<html>404</html> of train.txt"),
    ],
)
def test_unusable_lists_are_refused(
    tmp_path: Path, pngs: dict[str, bytes], splits: dict[str, list[str]], expected: str
) -> None:
    make_folder(tmp_path / "data", pngs)
    write_lists(tmp_path, splits)
    assert expected in error_message(tmp_path)


@pytest.mark.usefixtures("expect_few_photos")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_missing_photo_and_class_are_named(tmp_path: Path, pngs: dict[str, bytes], layout: str) -> None:
    dropped = next(name for name in pngs if "/bee/" in name)
    LAYOUTS[layout](
        tmp_path / "data", {name: png for name, png in pngs.items() if name != dropped and "/fox/" not in name}
    )
    text = error_message(tmp_path)
    assert "train/bee has 4 of 5 images" in text
    assert "test/fox has 0 of 5 images" in text
    assert "apple" not in text


@pytest.mark.usefixtures("expect_few_photos")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_foreign_class_is_named_and_hidden_files_are_not(tmp_path: Path, pngs: dict[str, bytes], layout: str) -> None:
    some = next(iter(pngs.values()))
    more = {"images/gnu/1.png": some} | ({} if layout == "published" else {"images/bee/._1.png": b""})
    LAYOUTS[layout](tmp_path / "data", pngs | more)
    text = error_message(tmp_path)
    assert "gnu" in text
    assert "bee" not in text


@pytest.mark.usefixtures("expect_few_photos")
@pytest.mark.parametrize("layout", ["zip", "folder"])
@pytest.mark.parametrize("damage", ["truncated", "page", "small"])
def test_undecodable_photo_is_named(tmp_path: Path, pngs: dict[str, bytes], layout: str, damage: str) -> None:
    name = next(name for name in pngs if "/bee/" in name)
    small = BytesIO()
    Image.new("RGB", (28, 28)).save(small, "png")
    broken = {"truncated": pngs[name][:-600], "page": b"<html>404</html>", "small": small.getvalue()}[damage]
    LAYOUTS[layout](tmp_path / "data", pngs | {name: broken})
    assert f"{name} in {tmp_path / 'data' / 'cifar-fs'}" in error_message(tmp_path)


@pytest.mark.usefixtures("expect_few_photos")
def test_damaged_zip_is_named(tmp_path: Path, pngs: dict[str, bytes]) -> None:
    make_zip(tmp_path / "data", pngs)
    (tmp_path / "data" / "cifar-fs" / "cifar100.zip").write_bytes(b"<html>404</html>")
    assert "cifar100.zip cannot be read as a zip" in error_message(tmp_path)


@pytest.mark.usefixtures("expect_few_photos")
@pytest.mark.parametrize("name", ["meta", "train", "test"])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"<html>404</html>", "cannot be read as a pickled dictionary"),
        (None, "cannot be read as a pickled dictionary"),
        (pickle.dumps({"labels": []}), "but labels"),
    ],
)
def test_damaged_published_file_is_named(
    tmp_path: Path, pngs: dict[str, bytes], name: str, content: bytes | None, expected: str
) -> None:
    make_published(tmp_path / "data", pngs)
    path = tmp_path / "data" / "cifar-fs" / "cifar-100-python" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    text = error_message(tmp_path)
    assert str(path) in text
    assert expected in text


@pytest.mark.usefixtures("expect_few_photos")
@pytest.mark.parametrize("rows", [np.zeros((10, 3), np.uint8), np.zeros((9, 3072), np.uint8), [1] * 10])
def test_published_file_of_another_shape_is_named(tmp_path: Path, pngs: dict[str, bytes], rows: object) -> None:
    make_published(tmp_path / "data", pngs)
    path = tmp_path / "data" / "cifar-fs" / "cifar-100-python" / "test"
    content = pickle.loads(path.read_bytes()) | {"data": rows}
    path.write_bytes(pickle.dumps(content))
    assert f"{path} does not hold CIFAR-100" in error_message(tmp_path)


def test_nothing_found_without_download_says_what_goes_where(tmp_path: Path) -> None:
    text, folder = error_message(tmp_path), tmp_path / "data" / "cifar-fs"
    for part in (f"{folder}/cifar-100-python/", f"{folder}/images/<class>/*.png", f"{folder}/cifar100.zip"):
        assert part in text
    assert "MAML_DATA" in text
    assert not (tmp_path / "data").exists()


@pytest.mark.usefixtures("expect_few_photos")
def test_cache_of_another_split_is_not_enough(tmp_path: Path, pngs: dict[str, bytes]) -> None:
    make_folder(tmp_path / "data", pngs)
    load(tmp_path)
    shutil.rmtree(tmp_path / "data")
    write_lists(tmp_path, {"train": ["sea", "apple", "bee"], "val": ["worm"], "test": ["fox", "cattle"]})
    with pytest.raises(MamlError, match="CIFAR-100 not found"):
        load(tmp_path)


@pytest.mark.usefixtures("expect_few_photos")
def test_download_is_moved_into_place_and_read(
    tmp_path: Path, pngs: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def dataset(root: str, download: bool) -> None:
        """Stands in for torchvision's class: writes the archive and the extracted folder to ``root``."""
        assert download
        make_published(tmp_path / "published", pngs)
        shutil.move(tmp_path / "published" / "cifar-fs" / "cifar-100-python", root)
        (Path(root) / "cifar-100-python.tar.gz").touch()

    install_torchvision(monkeypatch, "CIFAR100", dataset)
    assert_is_complete_set(load_cifar_fs(tmp_path / "data", tmp_path / "cache"), pngs)
    assert [path.name for path in (tmp_path / "data" / "cifar-fs").iterdir()] == ["cifar-100-python"]


@pytest.mark.parametrize(
    ("dataset", "cause"), [(no_network, "Temporary failure in name resolution"), (broken_operators, "torchvision::nms")]
)
def test_failed_download_says_what_goes_where_and_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: Callable[..., object], cause: str
) -> None:
    install_torchvision(monkeypatch, "CIFAR100", dataset)
    with pytest.raises(MamlError) as caught:
        load_cifar_fs(tmp_path, tmp_path / "cache")
    for part in (f"{tmp_path}/cifar-fs/cifar-100-python/", f"{tmp_path}/cifar-fs/cifar100.zip", cause):
        assert part in str(caught.value)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_missing_torchvision_says_what_goes_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(MamlError, match=r"cifar100\.zip.*MAML_DATA.*ModuleNotFoundError.*torchvision"):
        load_cifar_fs(tmp_path, tmp_path / "cache")
