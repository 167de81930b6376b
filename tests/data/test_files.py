"""Files of image sets: zips and folders are read alike, and pickles are read without running code."""

from __future__ import annotations

import pickle
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest

from maml.data.files import checksum, file_on_disk, list_files, reader, unpickle
from maml.errors import MamlError

CONTENT = {"set/a/1.png": b"one", "set/a/2.png": b"two!", "set/b/deep/3.png": b""}


@pytest.fixture(params=["zip", "folder"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The same files, once as a zip and once as a folder."""
    for name, content in CONTENT.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    if request.param == "folder":
        return tmp_path / "set"
    return Path(shutil.make_archive(str(tmp_path / "archive"), "zip", tmp_path, "set"))


def test_zip_and_folder_list_the_same_files_with_their_sizes(source: Path) -> None:
    found = {path: file.size for path, file in list_files(source, "mend it") if not path.endswith("/")}
    assert found == {path: len(content) for path, content in CONTENT.items()}


def test_zip_and_folder_have_the_same_checksums(source: Path) -> None:
    found = {path: checksum(file) for path, file in list_files(source, "mend it") if not path.endswith("/")}
    assert found == {path: zlib.crc32(content) for path, content in CONTENT.items()}


def test_checksum_covers_all_of_a_large_file(tmp_path: Path) -> None:
    content = bytes(range(256)) * 4097  # more than is read at once
    (tmp_path / "large").write_bytes(content)
    assert checksum(file_on_disk(tmp_path / "large")) == zlib.crc32(content)


def test_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "gone.png"
    path.write_bytes(b"one")
    file = file_on_disk(path)
    path.unlink()
    with pytest.raises(MamlError, match=r"gone\.png cannot be read \(No such file or directory\)"):
        checksum(file)


def test_listed_paths_can_be_read(source: Path) -> None:
    with reader(source if source.suffix == ".zip" else source.parent) as read:
        assert {path: read(path) for path in CONTENT} == CONTENT


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", None])
def test_zip_that_cannot_be_read_is_named_with_the_advice(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "broken.zip"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MamlError, match=r"broken\.zip cannot be read as a zip \(.*\); fetch it again"):
        list(list_files(path, "fetch it again"))


def test_pickled_values_come_in_the_order_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "pickle"
    path.write_bytes(pickle.dumps({"labels": [1, 2], b"data": np.arange(6).reshape(2, 3), "more": "text"}))
    data, labels = unpickle(path, ["data", "labels"], "mend it")
    assert (data.tolist(), labels) == ([[0, 1, 2], [3, 4, 5]], [1, 2])
    with pytest.raises(MamlError, match="has no fine_labels and no names, but labels, data, more; mend it"):
        unpickle(path, ["fine_labels", "data", "names"], "mend it")


def test_pickle_that_asks_for_more_than_arrays_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pickle"
    path.write_bytes(pickle.dumps({"data": Path("a")}))
    with pytest.raises(MamlError, match=r"asks for pathlib.*, which arrays do not need and could do harm"):
        unpickle(path, ["data"], "mend it")
