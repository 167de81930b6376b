"""Omniglot: the real files, intact or damaged, in every supported layout."""

import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from maml.data import omniglot
from maml.data.cache import ImageSet
from maml.data.omniglot import ALPHABETS, load_omniglot, vinyals_split
from maml.errors import MamlError
from tests.data.fake_torchvision import broken_operators, install_torchvision, no_network

HALVES = ("images_background", "images_evaluation")
FEW_ALPHABETS = {"images_background": {"Braille": 26, "Greek": 24}, "images_evaluation": {"Keble": 26}}
SHARED_DATA = Path(os.environ.get("MAML_DATA") or Path(__file__).parents[2] / "../shared/data").resolve()

pytestmark = pytest.mark.skipif(
    not all((SHARED_DATA / "omniglot" / f"{half}.zip").exists() for half in HALVES),
    reason=f"no omniglot zips in {SHARED_DATA}; set MAML_DATA to the folder that has them",
)


def list_tree(folder: Path) -> list[tuple[str, int, int]]:
    return sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def zipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A read-only ``data_dir`` with the two zips."""
    data_dir = tmp_path_factory.mktemp("zipped")
    (data_dir / "omniglot").mkdir()
    for half in HALVES:
        shutil.copyfile(SHARED_DATA / "omniglot" / f"{half}.zip", data_dir / "omniglot" / f"{half}.zip")
        (data_dir / "omniglot" / f"{half}.zip").chmod(0o444)
    (data_dir / "omniglot").chmod(0o555)
    data_dir.chmod(0o555)
    return data_dir


@pytest.fixture
def extracted(tmp_path: Path, zipped: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A ``data_dir`` with a few alphabets as torchvision extracts them, without the zips."""
    monkeypatch.setattr(omniglot, "ALPHABETS", FEW_ALPHABETS)
    data_dir = tmp_path / "extracted"
    for half, alphabets in FEW_ALPHABETS.items():
        with ZipFile(zipped / "omniglot" / f"{half}.zip") as archive:
            names = [name for name in archive.namelist() if name.split("/")[1] in alphabets]
            archive.extractall(data_dir / "omniglot-py", names)
    return data_dir


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def real_set(zipped: Path, cache_dir: Path) -> ImageSet:
    before = list_tree(zipped)
    image_set = load_omniglot(zipped, cache_dir, download=False)
    assert list_tree(zipped) == before, "data_dir was written to"
    return image_set


@pytest.fixture
def forbid_build(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise AssertionError("the cache should have been enough")

    monkeypatch.setattr(omniglot, "_read", fail)


def test_omniglot_has_1623_characters_of_20_binary_drawings(real_set: ImageSet) -> None:
    assert real_set.images.shape == (1623, 20, 28, 28)
    assert real_set.images.dtype == torch.uint8
    assert set(np.unique(real_set.images.numpy())) == {0, 1}
    assert [sum(ALPHABETS[half].values()) for half in HALVES] == [964, 659]
    assert [len(ALPHABETS[half]) for half in HALVES] == [30, 20]


def test_omniglot_is_the_same_everywhere(real_set: ImageSet) -> None:
    # Every result on Omniglot depends on these pixels in this order.
    assert real_set.digest == "4cf8edd0738d6190acacd642df31ff3f5c464ee993611ac45a346ed441e24f46"


def test_classes_are_the_folders_of_both_halves_sorted(real_set: ImageSet, zipped: Path) -> None:
    folders = set()
    for half in HALVES:
        with ZipFile(zipped / "omniglot" / f"{half}.zip") as archive:
            folders |= {"/".join(name.split("/")[1:3]) for name in archive.namelist()}
    assert real_set.classes == sorted(folders)


def test_vinyals_split_is_the_first_1200_folders_and_the_last_423(real_set: ImageSet, zipped: Path) -> None:
    folders = []
    for half in HALVES:
        with ZipFile(zipped / "omniglot" / f"{half}.zip") as archive:
            folders += sorted({"/".join(name.split("/")[1:3]) for name in archive.namelist()})
    names = {
        split: [real_set.classes[i] for i in chosen.tolist()]
        for split, chosen in vinyals_split(real_set.classes).items()
    }
    assert names["test"] == folders[1200:]
    assert sorted(names["train"] + names["val"]) == sorted(folders[:1200])


def test_vinyals_split_has_the_published_characters_of_each_alphabet(real_set: ImageSet) -> None:
    counts = {
        split: Counter(real_set.classes[i].split("/")[0] for i in chosen.tolist())
        for split, chosen in vinyals_split(real_set.classes).items()
    }
    whole = ALPHABETS["images_background"] | ALPHABETS["images_evaluation"]
    validation = {"Armenian": 41, "Bengali": 46, "Early_Aramaic": 22, "Hebrew": 22, "Mkhedruli_(Georgian)": 41}
    test = {
        "Gurmukhi": 4,
        "Kannada": 41,
        "Keble": 26,
        "Malayalam": 47,
        "Manipuri": 40,
        "Mongolian": 30,
        "Old_Church_Slavonic_(Cyrillic)": 45,
        "Oriya": 46,
        "Sylheti": 28,
        "Syriac_(Serto)": 23,
        "Tengwar": 25,
        "Tibetan": 42,
        "ULOG": 26,
    }
    assert (counts["val"], counts["test"]) == (validation, test)
    assert counts["train"] + counts["val"] + counts["test"] == Counter(whole)
    assert counts["train"]["Gurmukhi"] == 41
    assert (sum(counts["train"].values()), sum(validation.values()), sum(test.values())) == (1028, 172, 423)


def test_pixels_are_the_ones_of_the_authors_code(real_set: ImageSet, zipped: Path) -> None:
    # The authors' code asks for Lanczos and inverts. The compared drawing differs from character to character.
    compared = 0
    for half in HALVES:
        with ZipFile(zipped / "omniglot" / f"{half}.zip") as archive:
            names = sorted(archive.namelist())
            for character in range(len(names) // 20):
                name = names[20 * character + character % 20]
                with archive.open(name) as file, Image.open(file) as drawing:
                    reference = 1 - np.array(drawing.resize((28, 28), Image.Resampling.LANCZOS)).astype(np.uint8)
                image = real_set.images[real_set.classes.index("/".join(name.split("/")[1:3])), character % 20]
                np.testing.assert_array_equal(image.numpy(), reference, err_msg=name)
                compared += 1
    assert compared == 1623


def test_ink_is_the_smaller_part_of_each_drawing(real_set: ImageSet) -> None:
    ink = real_set.images.float().mean((2, 3))
    assert ink.min() > 0
    assert ink.max() < 0.5


def test_extracted_folders_give_the_same_as_zips(
    real_set: ImageSet, extracted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image_set = load_omniglot(extracted, tmp_path / "cache", download=False)
    expected = [label for label in real_set.classes if label.split("/")[0] in ("Braille", "Greek", "Keble")]
    assert image_set.classes == expected
    assert torch.equal(image_set.images, real_set.images[[real_set.classes.index(label) for label in expected]])


@pytest.mark.parametrize("place", ["omniglot", "omniglot-py", "."])
@pytest.mark.usefixtures("forbid_build")
def test_zips_are_found_in_every_place(
    real_set: ImageSet, zipped: Path, cache_dir: Path, tmp_path: Path, place: str
) -> None:
    (tmp_path / place).mkdir(exist_ok=True)
    for half in HALVES:
        (tmp_path / place / f"{half}.zip").symlink_to(zipped / "omniglot" / f"{half}.zip")
    assert load_omniglot(tmp_path, cache_dir, download=False).digest == real_set.digest


@pytest.mark.parametrize("place", ["omniglot", "."])
def test_folders_are_found_in_every_place_and_zipping_them_keeps_the_cache(
    extracted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    reference = load_omniglot(extracted, tmp_path / "cache", download=False)
    monkeypatch.setattr(omniglot, "_read", lambda *args: pytest.fail("the cache should have been enough"))
    for half in HALVES:
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / half).symlink_to(extracted / "omniglot-py" / half)
    assert load_omniglot(tmp_path, tmp_path / "cache", download=False).digest == reference.digest
    for half in HALVES:
        shutil.make_archive(str(tmp_path / "zipped" / half), "zip", extracted / "omniglot-py", half)
    assert load_omniglot(tmp_path / "zipped", tmp_path / "cache", download=False).digest == reference.digest


@pytest.mark.usefixtures("forbid_build")
def test_cache_is_loaded_instead_of_the_drawings(real_set: ImageSet, zipped: Path, cache_dir: Path) -> None:
    assert load_omniglot(zipped, cache_dir).digest == real_set.digest


@pytest.mark.usefixtures("forbid_build")
def test_unchanged_zips_are_not_listed_again(
    real_set: ImageSet, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_omniglot(SHARED_DATA, cache_dir, download=False)
    monkeypatch.setattr(omniglot, "list_files", lambda *_: pytest.fail("listed"))
    assert load_omniglot(SHARED_DATA, cache_dir, download=False).digest == real_set.digest


def test_cache_is_enough_where_the_original_files_are_gone(real_set: ImageSet, cache_dir: Path, tmp_path: Path) -> None:
    assert load_omniglot(tmp_path / "nowhere", cache_dir, download=True).digest == real_set.digest
    assert list(tmp_path.iterdir()) == []


def test_missing_drawing_and_character_are_named(extracted: Path, tmp_path: Path) -> None:
    greek = extracted / "omniglot-py" / "images_background" / "Greek"
    next((greek / "character07").glob("*_13.png")).unlink()
    shutil.rmtree(greek / "character09")
    with pytest.raises(MamlError) as caught:
        load_omniglot(extracted, tmp_path / "cache", download=False)
    message = str(caught.value)
    assert "images_background/Greek/character07 has 19 of 20 drawings" in message
    assert "images_background/Greek/character09 has 0 of 20 drawings" in message
    assert "character08" not in message
    assert str(extracted) in message


def test_foreign_character_is_named_and_hidden_files_are_not(extracted: Path, tmp_path: Path) -> None:
    greek = extracted / "omniglot-py" / "images_background" / "Greek"
    (greek / "character01" / "._0394_01.png").touch()
    (greek / "character01" / "Thumbs.db").touch()
    (greek / "character99").mkdir()
    (greek / "character99" / "x.png").touch()
    with pytest.raises(MamlError) as caught:
        load_omniglot(extracted, tmp_path / "cache", download=False)
    message = str(caught.value)
    assert "images_background/Greek/character99 does not belong to Omniglot" in message
    assert "character01" not in message


def test_many_missing_characters_are_counted(tmp_path: Path, zipped: Path) -> None:
    (tmp_path / "images_background").mkdir()
    (tmp_path / "images_evaluation.zip").symlink_to(zipped / "omniglot" / "images_evaluation.zip")
    with pytest.raises(MamlError, match="and 954 more"):
        load_omniglot(tmp_path, tmp_path / "cache", download=False)


@pytest.mark.parametrize("damage", ["truncated", "page", "small"])
def test_undecodable_drawing_is_named(extracted: Path, tmp_path: Path, damage: str) -> None:
    file = next((extracted / "omniglot-py" / "images_background" / "Greek" / "character01").glob("*_03.png"))
    content = file.read_bytes()
    if damage == "small":
        Image.new("1", (28, 28)).save(file)
    else:
        file.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"<html>404</html>")
    with pytest.raises(MamlError, match=rf"character01/{file.name} in .*images_background cannot be decoded"):
        load_omniglot(extracted, tmp_path / "cache", download=False)
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("damage", ["truncated", "page"])
def test_damaged_zip_is_named_and_never_downloaded_over(
    tmp_path: Path, zipped: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    install_torchvision(monkeypatch, "Omniglot", lambda *args, **kwargs: pytest.fail("asked torchvision"))
    for half in HALVES:
        shutil.copyfile(zipped / "omniglot" / f"{half}.zip", tmp_path / f"{half}.zip")
    content = (tmp_path / "images_evaluation.zip").read_bytes()
    (tmp_path / "images_evaluation.zip").write_bytes(content[:-1000] if damage == "truncated" else b"<html>404</html>")
    with pytest.raises(MamlError, match=r"images_evaluation\.zip cannot be read as a zip"):
        load_omniglot(tmp_path, tmp_path / "cache")


def test_damaged_member_of_a_zip_is_named(tmp_path: Path, zipped: Path) -> None:
    for half in HALVES:
        shutil.copyfile(zipped / "omniglot" / f"{half}.zip", tmp_path / f"{half}.zip")
    name = "images_background/Alphabet_of_the_Magi/character01/0709_01.png"
    with ZipFile(tmp_path / "images_background.zip") as archive:
        offset = archive.getinfo(name).header_offset + 30 + len(name) + 50
    with (tmp_path / "images_background.zip").open("r+b") as file:
        file.seek(offset)
        file.write(b"\0" * 50)
    with pytest.raises(MamlError, match=r"0709_01\.png in .*images_background\.zip cannot be decoded"):
        load_omniglot(tmp_path, tmp_path / "cache", download=False)


def test_nothing_found_without_download_says_what_goes_where(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    with pytest.raises(MamlError) as caught:
        load_omniglot(data_dir, tmp_path / "cache", download=False)
    for half in HALVES:
        assert f"{data_dir}/omniglot/{half}.zip" in str(caught.value)
        assert f"{data_dir}/omniglot-py/{half}/" in str(caught.value)
    assert f"data_dir={data_dir}" in str(caught.value)
    assert "MAML_DATA" in str(caught.value)
    assert not data_dir.exists()


@pytest.mark.parametrize(
    ("dataset", "cause"), [(no_network, "Temporary failure in name resolution"), (broken_operators, "torchvision::nms")]
)
def test_failed_download_says_what_goes_where_and_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: Callable[..., object], cause: str
) -> None:
    install_torchvision(monkeypatch, "Omniglot", dataset)
    with pytest.raises(MamlError) as caught:
        load_omniglot(tmp_path, tmp_path / "cache")
    for part in (f"{tmp_path}/omniglot/images_background.zip", f"{tmp_path}/omniglot-py/images_evaluation/", cause):
        assert part in str(caught.value)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_missing_torchvision_says_what_goes_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    message = r"images_background\.zip.*MAML_DATA.*install the one that belongs to your torch.*ModuleNotFoundError"
    with pytest.raises(MamlError, match=message):
        load_omniglot(tmp_path, tmp_path / "cache")


def test_download_into_an_unwritable_data_dir_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_torchvision(monkeypatch, "Omniglot", no_network)
    (tmp_path / "file").touch()
    with pytest.raises(MamlError, match=r"MAML_DATA.*NotADirectoryError"):
        load_omniglot(tmp_path / "file" / "data", tmp_path / "cache")


def test_download_fetches_the_missing_half_only(tmp_path: Path, zipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    (data_dir / "images_background.zip").symlink_to(zipped / "omniglot" / "images_background.zip")
    asked = []

    class Download:
        """Stands in for torchvision's class: writes the verified zip to ``root/omniglot-py``."""

        def __init__(self, root: str, background: bool, download: bool) -> None:
            asked.append((background, download))
            self.root = os.path.join(root, "omniglot-py")
            os.mkdir(self.root)
            shutil.copyfile(zipped / "omniglot" / "images_evaluation.zip", f"{self.root}/images_evaluation.zip")

    def read(sources: dict[str, Path], drawings: dict[str, list[str]], *_: object) -> tuple[Tensor, list[str]]:
        assert sources["images_evaluation"] == data_dir / "omniglot" / "images_evaluation.zip"
        assert sum(map(len, drawings.values())) == 1623 * 20
        return torch.zeros(1, 1, 2, 2, dtype=torch.uint8), ["x"]

    install_torchvision(monkeypatch, "Omniglot", Download)
    monkeypatch.setattr(omniglot, "_read", read)
    load_omniglot(data_dir, tmp_path / "cache")
    assert asked == [(False, True)]
    assert [path.name for path in (data_dir / "omniglot").iterdir()] == ["images_evaluation.zip"]


def test_blank_drawing_causes_a_warning_that_names_it(extracted: Path, tmp_path: Path) -> None:
    path = extracted / "omniglot-py" / "images_background" / "Braille" / "character01"
    blank = sorted(path.glob("*.png"))[3]
    Image.new("RGBA", (105, 105), (0, 0, 0, 0)).save(blank)  # transparent paper without ink
    with pytest.warns(UserWarning, match=rf"{blank.name} in .* is all paper at 28x28 pixels"):
        images = load_omniglot(extracted, tmp_path / "cache", download=False).images
    assert images[0, 3].sum() == 0
