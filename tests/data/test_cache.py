"""The image cache: built once, checked on every load, replaced as a whole."""

import os
import threading
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from maml.data import cache
from maml.data.cache import cached_from_files, cached_tensor, fingerprint, load_cache
from maml.data.files import File, checksum, file_on_disk
from maml.errors import MamlError

IMAGES = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).reshape(2, 3, 4, 4)
CLASSES = ["Greek/character01", "Greek/character02"]


class Builder:
    """Counts how often it is called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> tuple[Tensor, list[str]]:
        self.calls += 1
        return IMAGES.clone(), list(CLASSES)


def must_not_build() -> tuple[Tensor, list[str]]:
    raise AssertionError("a valid cache must not be rebuilt")


def cut_in_half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def cut_last_byte(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def flip_a_pixel(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def rename_a_class(file: Path) -> None:
    content = file.read_bytes()
    assert content.count(b"character02") == 1
    file.write_bytes(content.replace(b"character02", b"character03"))


def replace_by_a_page(file: Path) -> None:
    file.write_bytes(b"<html>404</html>" * 100)


def replace_by_another_tensor(file: Path) -> None:
    save_file({"weight": torch.zeros(3)}, file)


def replace_by_unsigned_images(file: Path) -> None:
    save_file({"images": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)}, file)


def test_cached_tensor_builds_once_and_loads_the_same(tmp_path: Path) -> None:
    build = Builder()
    built = cached_tensor(tmp_path / "new" / "cache", "set", "sources", build)
    loaded = cached_tensor(tmp_path / "new" / "cache", "set", "sources", build)
    assert build.calls == 1
    for image_set in (built, loaded):
        assert image_set.images.dtype == torch.uint8
        assert torch.equal(image_set.images, IMAGES)
        assert image_set.classes == CLASSES
    assert loaded.digest == built.digest
    assert [file.name for file in (tmp_path / "new" / "cache").iterdir()] == ["set.safetensors"]


@pytest.mark.parametrize(
    "damage",
    [
        cut_in_half,
        cut_last_byte,
        empty,
        flip_a_pixel,
        rename_a_class,
        replace_by_a_page,
        replace_by_another_tensor,
        replace_by_unsigned_images,
    ],
)
def test_damaged_cache_is_rebuilt(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    cached_tensor(tmp_path, "set", "sources", Builder())
    damage(tmp_path / "set.safetensors")
    assert load_cache(tmp_path, "set") is None

    build = Builder()
    assert torch.equal(cached_tensor(tmp_path, "set", "sources", build).images, IMAGES)
    assert build.calls == 1
    assert torch.equal(cached_tensor(tmp_path, "set", "sources", must_not_build).images, IMAGES)


def test_cache_of_other_sources_is_rebuilt(tmp_path: Path) -> None:
    cached_tensor(tmp_path, "set", "old", Builder())
    build = Builder()
    cached_tensor(tmp_path, "set", "new", build)
    assert build.calls == 1
    assert load_cache(tmp_path, "set", "old") is None


def test_load_cache_without_sources_takes_any(tmp_path: Path) -> None:
    assert load_cache(tmp_path, "set") is None
    built = cached_tensor(tmp_path, "set", "sources", Builder())
    loaded = load_cache(tmp_path, "set")
    assert loaded is not None
    assert loaded.digest == built.digest


def test_digest_covers_pixels_shape_and_classes(tmp_path: Path) -> None:
    def digest(name: str, images: Tensor, classes: list[str]) -> str:
        return cached_tensor(tmp_path, name, "sources", lambda: (images, classes)).digest

    reference = digest("reference", IMAGES, CLASSES)
    assert digest("same", IMAGES.clone(), list(CLASSES)) == reference
    assert digest("pixels", IMAGES + 1, CLASSES) != reference
    assert digest("shape", IMAGES.reshape(2, 3, 2, 8), CLASSES) != reference
    assert digest("classes", IMAGES, CLASSES[::-1]) != reference


def test_failed_build_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    cached_tensor(tmp_path, "set", "old", Builder())

    def fail() -> tuple[Tensor, list[str]]:
        raise OSError("original files are on fire")

    with pytest.raises(OSError, match="on fire"):
        cached_tensor(tmp_path, "set", "new", fail)
    assert [file.name for file in tmp_path.iterdir()] == ["set.safetensors"]
    assert load_cache(tmp_path, "set", "old") is not None


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_failed_write_keeps_the_old_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    cached_tensor(tmp_path, "set", "old", Builder())

    def save_half(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
        file.write_bytes(b"half")
        raise error

    monkeypatch.setattr(cache, "save_file", save_half)
    with pytest.raises(MamlError, match=r"No space left on device.*cache_dir="):
        cached_tensor(tmp_path, "set", "new", Builder())
    assert [file.name for file in tmp_path.iterdir()] == ["set.safetensors"]
    assert load_cache(tmp_path, "set", "old") is not None


def test_unwritable_cache_dir_is_refused_before_the_build(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache_dir = tmp_path / "file" / "cache"
    with pytest.raises(MamlError) as caught:
        cached_tensor(cache_dir, "set", "sources", must_not_build)
    assert f"cache_dir= (now {cache_dir})" in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_cache_dir_loads_but_does_not_build(tmp_path: Path) -> None:
    cached_tensor(tmp_path, "set", "sources", Builder())
    tmp_path.chmod(0o555)
    cached_tensor(tmp_path, "set", "sources", must_not_build)
    with pytest.raises(MamlError, match="Permission denied"):
        cached_tensor(tmp_path, "set", "other", must_not_build)


def test_simultaneous_builds_leave_one_valid_cache(tmp_path: Path) -> None:
    together = threading.Barrier(4, timeout=30)
    digests = []

    def build() -> tuple[Tensor, list[str]]:
        together.wait()
        return IMAGES.clone(), list(CLASSES)

    threads = [
        threading.Thread(target=lambda: digests.append(cached_tensor(tmp_path, "set", "sources", build).digest))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert digests == [cached_tensor(tmp_path, "set", "sources", must_not_build).digest] * 4
    assert [file.name for file in tmp_path.iterdir()] == ["set.safetensors"]


def test_loaded_images_survive_a_rebuild_of_the_file(tmp_path: Path) -> None:
    cached_tensor(tmp_path, "set", "old", Builder())
    loaded = cached_tensor(tmp_path, "set", "old", must_not_build)
    cached_tensor(tmp_path, "set", "new", lambda: (torch.zeros_like(IMAGES), CLASSES))
    assert torch.equal(loaded.images, IMAGES)


def test_cache_file_is_as_readable_as_other_new_files(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.touch()
    cached_tensor(tmp_path, "set", "sources", Builder())
    assert (tmp_path / "set.safetensors").stat().st_mode == other.stat().st_mode


def write(folder: Path, **contents: bytes) -> dict[str, File]:
    """Writes files and lists them."""
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return {name: file_on_disk(folder / name) for name in contents}


def test_fingerprint_depends_on_names_and_contents_only(tmp_path: Path) -> None:
    reference = fingerprint(write(tmp_path / "a", one=b"12", two=b"345"))
    assert fingerprint(write(tmp_path / "b", two=b"345", one=b"12")) == reference
    assert fingerprint(write(tmp_path / "c", one=b"12", two=b"346")) != reference, "of equal size"
    assert fingerprint(write(tmp_path / "d", one=b"12", three=b"345")) != reference
    assert fingerprint(write(tmp_path / "e", one=b"12")) != reference
    zipped = {name: File(len(text), checksum=zlib.crc32(text)) for name, text in {"one": b"12", "two": b"345"}.items()}
    assert fingerprint(zipped) == reference


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files whose content was read, in the order of reading; an hour has passed since they changed."""
    names = []

    def read(file: File) -> int:
        names.append(Path(file.path).name)
        return checksum(file)

    monkeypatch.setattr(cache, "checksum", read)
    monkeypatch.setattr(cache, "time_ns", lambda: time.time_ns() + 3600 * 10**9)
    return names


def test_files_of_equal_size_and_other_content_are_other_data(tmp_path: Path, reads: list[str]) -> None:
    for count, content in enumerate([b"first", b"other", b"third"], start=1):
        build = Builder()
        cached_from_files(tmp_path / "cache", "set", partial(write, tmp_path, file=content), build)
        assert (build.calls, len(reads)) == (1, count)


def test_content_is_read_again_only_if_a_file_has_changed(tmp_path: Path, reads: list[str]) -> None:
    def load() -> None:
        files = {name: file_on_disk(tmp_path / name) for name in ("one", "two")}
        cached_from_files(tmp_path / "cache", "set", lambda: files, build)

    build = Builder()
    write(tmp_path, one=b"1", two=b"2")
    for _ in range(3):
        load()
    assert sorted(reads) == ["one", "two"]
    os.utime(tmp_path / "one", (0, 0))
    load()
    assert len(reads) == 4
    write(tmp_path, one=b"1")
    os.utime(tmp_path / "one", (0, 0))  # as a program that unpacks does: the time of modification is the old one
    load()
    assert len(reads) == 6
    assert build.calls == 1, "the content has never changed"


def test_archive_is_listed_again_only_if_it_or_the_name_has_changed(tmp_path: Path, reads: list[str]) -> None:
    listed = []

    def load(name: str, content: bytes) -> None:
        def files() -> dict[str, File]:
            listed.append((name, content))
            return {"file": File(len(content), checksum=zlib.crc32(content))}

        cached_from_files(tmp_path / "cache", name, files, build, {"zip": file_on_disk(tmp_path / "zip")})

    build = Builder()
    write(tmp_path, zip=b"one")
    for _ in range(2):
        load("set", b"1")
        load("other", b"1")
    assert listed == [("set", b"1"), ("other", b"1")] and build.calls == 2
    os.utime(tmp_path / "zip", (0, 0))
    load("set", b"1")
    assert len(listed) == 3 and build.calls == 2, "touched, but the content is the same"
    write(tmp_path, zip=b"two")  # of equal size
    load("set", b"2")
    assert len(listed) == 4 and build.calls == 3
    assert "zip" not in reads, "it lists what its files hold"


def test_archive_that_changed_a_moment_ago_is_listed_again(tmp_path: Path, reads: list[str]) -> None:
    archive = {"zip": File(1, str(tmp_path / "zip"), (cache.time_ns() - 10**9, 0, 7))}
    for _ in range(2):
        cached_from_files(
            tmp_path / "cache", "set", lambda: {"file": File(1, "inside", checksum=1)}, Builder(), archive
        )
    assert reads == ["inside"] * 2


def test_copy_of_the_data_uses_the_same_cache(tmp_path: Path, reads: list[str]) -> None:
    originals, copies = (write(tmp_path / place, file=b"same") for place in ("here", "there"))
    cached_from_files(tmp_path / "cache", "set", lambda: originals, Builder())
    for files in (copies, originals, copies):
        cached_from_files(tmp_path / "cache", "set", partial(dict, files), must_not_build)
    assert len(reads) == 2, "each copy was read once"


def test_files_that_changed_a_moment_ago_are_read_again(tmp_path: Path, reads: list[str]) -> None:
    files = {"file": File(1, str(tmp_path / "file"), (cache.time_ns() - 10**9, 0, 7))}
    write(tmp_path, file=b"1")
    for _ in range(2):
        cached_from_files(tmp_path / "cache", "set", lambda: files, Builder())
    assert len(reads) == 2


@pytest.mark.parametrize("memory", ["", "[]", "{", "null", '{"a": 1}'])
def test_damaged_memory_of_contents_costs_a_reading(tmp_path: Path, reads: list[str], memory: str) -> None:
    files = write(tmp_path, file=b"1")
    cached_from_files(tmp_path / "cache", "set", lambda: files, Builder())
    (tmp_path / "cache" / "sources.json").write_text(memory)
    for _ in range(2):
        cached_from_files(tmp_path / "cache", "set", lambda: files, must_not_build)
    assert len(reads) == 2


def test_cache_of_sizes_alone_is_built_once_more(tmp_path: Path, reads: list[str]) -> None:
    """A cache of an earlier version does not know the contents of its files."""
    before = cached_tensor(tmp_path / "cache", "set", "hash of names and sizes", Builder())
    build = Builder()
    for _ in range(2):
        found = cached_from_files(tmp_path / "cache", "set", partial(write, tmp_path, a=b"1"), build)
        assert found.digest == before.digest
    assert build.calls == 1


def test_cache_of_another_user_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> tuple[Tensor, list[str]]:
        return torch.zeros((1, 1, 2), dtype=torch.uint8), ["a"]

    cached_tensor(tmp_path, "name", "files", build)
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.R_OK)
    with pytest.raises(MamlError, match=r"name\.safetensors belongs to another user and cannot be read; ask"):
        cached_tensor(tmp_path, "name", "files", build)
