"""Image sets: each is one tensor, built once from a user's files and kept in a verified cache file."""

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import time_ns

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from maml.data.files import File, checksum
from maml.errors import MamlError
from maml.status import about, announce

_MEMORY = "sources.json"  # the contents of files that were read before, by their sizes and times
_NUM_REMEMBERED = 32
_CLOCK_TICK_NS = 2_000_000_000  # the coarsest clock of a disk: FAT
_SECONDS_PER_FILE, _SECONDS_PER_BYTE, _SECONDS_OF_SILENCE = 5e-5, 1e-9, 5


@dataclass(frozen=True, eq=False)
class ImageSet:
    """All images of a data set.

    Attributes:
        images: the images, uint8 ``(classes, images per class, ...)``; or, if classes differ in size, ``(1, images,
            ...)``, one class after the other.
        classes: the class names, in the order of the images.
        digest: SHA-256 of the shape, the class names and the pixels, which identifies the data in a run's record.
        counts: the number of images of each class, if classes differ in size; None otherwise.
    """

    images: Tensor
    classes: list[str]
    digest: str
    counts: list[int] | None = None


def cached_tensor(cache_dir: Path, name: str, sources: str, build: Callable[[], tuple[Tensor, list[str]]]) -> ImageSet:
    """Loads ``cache_dir/name.safetensors``; builds and writes it if it is missing, damaged or from other sources.

    Several processes may build it at once: each writes its own temporary file and then renames it.

    Args:
        cache_dir: folder of the cache files; created if it is missing.
        name: name of the data and its preparation; a change of the preparation needs a new name.
        sources: the `fingerprint` of the original files, by their content.
        build: returns a contiguous uint8 tensor ``(classes, images per class, ...)`` and the class names.

    Raises:
        MamlError: if the cache cannot be read or written.
    """
    path = _path(cache_dir, name)
    if path.exists() and not os.access(path, os.R_OK):
        raise MamlError(
            f"the image cache {path} belongs to another user and cannot be read; ask for chmod a+r, or set cache_dir="
        )
    if (cached := load_cache(cache_dir, name, sources)) is not None:
        return cached
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with _writing(path):  # before the build, which can take minutes
        cache_dir.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
    try:
        images, classes = build()
        built = ImageSet(images, classes, _digest(images, classes))
        with _writing(path):
            _write(built, sources, temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return built


def load_cache(cache_dir: Path, name: str, sources: str | None = None) -> ImageSet | None:
    """Loads ``cache_dir/name.safetensors``, mapped into memory instead of copied.

    Args:
        cache_dir: as for `cached_tensor`.
        name: as for `cached_tensor`.
        sources: the expected `fingerprint` of the original files; None accepts any.

    Returns:
        The images; None if the file is missing, damaged (its content does not match its digest) or from other sources.
    """
    try:
        with safe_open(_path(cache_dir, name), framework="pt") as file:
            metadata = file.metadata() or {}
            images = file.get_tensor("images")
        classes = json.loads(metadata["classes"])
        usable = sources in (None, metadata["sources"]) and metadata["digest"] == _digest(images, classes)
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    return ImageSet(images, classes, metadata["digest"]) if usable else None


def cached_from_files(
    cache_dir: Path,
    name: str,
    files: Callable[[], Mapping[str, File]],
    build: Callable[[], tuple[Tensor, list[str]]],
    archives: Mapping[str, File] | None = None,
) -> ImageSet:
    """Loads the tensor that was built from these files, or builds it. The content of the files decides.

    The content is read again only if the size, a time or the inode of a file has changed since the last time.

    Args:
        cache_dir: as for `cached_tensor`.
        name: as for `cached_tensor`. A ``{content}`` in it stands for a hash of the contents: each content then has a
            cache of its own, which no other replaces.
        files: lists the original files by name. The names count too, but not the places of the files.
        build: as for `cached_tensor`.
        archives: all that decides what ``files`` lists: zips as they lie on disk, whose listing takes half a second,
            and an entry for each class. If nothing of it has changed since the last time, ``files`` is not called.

    Raises:
        MamlError: if a file cannot be read, or the cache cannot be written.
    """
    on_disk = files() if archives is None else archives
    looks = [(name, file.size, file.stamp, file.checksum) for name, file in sorted(on_disk.items())]
    stamp = _hash(looks if archives is None else [name, looks])
    known, now = _recall(cache_dir), time_ns()
    sources = known.get(stamp) or fingerprint(on_disk if archives is None else files())
    image_set = cached_tensor(cache_dir, name.replace("{content}", sources[:16]), sources, build)
    changed = max((time for file in on_disk.values() for time in file.stamp[:2]), default=None)
    # A file may change twice within one tick of the disk's clock, and then looks as it did after the first change.
    if stamp not in known and changed is not None and changed < now - _CLOCK_TICK_NS:
        _remember(cache_dir, known | {stamp: sources})
    return image_set


def fingerprint(files: Mapping[str, File]) -> str:
    """Returns a hash of the names and contents of files. Files that are not in a zip are read.

    It does not depend on places and times, so that a copy of the data, zipped or extracted, can use the same cache.

    Raises:
        MamlError: if a file cannot be read.
    """
    to_read = [file.size for file in files.values() if file.checksum is None]
    seconds = _SECONDS_PER_FILE * len(to_read) + _SECONDS_PER_BYTE * sum(to_read)
    if seconds > _SECONDS_OF_SILENCE:
        announce(f"reading the files of the data, because they are new or changed: {about(seconds)}")
    return _hash([(name, file.size, checksum(file)) for name, file in sorted(files.items())])


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _recall(cache_dir: Path) -> dict[str, str]:
    """Returns the fingerprints of files that were read before, by a hash of their names, sizes and times."""
    try:
        known = json.loads((cache_dir / _MEMORY).read_text())
        return {str(stamp): str(sources) for stamp, sources in known.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def _remember(cache_dir: Path, known: Mapping[str, str]) -> None:
    """Keeps the newest fingerprints. In a folder that cannot be written to, the files are read again next time."""
    newest = dict([*known.items()][-_NUM_REMEMBERED:])
    temporary = cache_dir / f".{_MEMORY}.{uuid.uuid4().hex}"
    with suppress(OSError):
        try:
            temporary.write_text(json.dumps(newest, indent=1))
            os.replace(temporary, cache_dir / _MEMORY)
        finally:
            temporary.unlink(missing_ok=True)


def _path(cache_dir: Path, name: str) -> Path:
    return cache_dir / f"{name}.safetensors"


def _digest(images: Tensor, classes: list[str]) -> str:
    digest = hashlib.sha256(json.dumps([list(images.shape), classes]).encode())
    digest.update(images.numpy().data)
    return digest.hexdigest()


def _write(image_set: ImageSet, sources: str, path: Path) -> None:
    metadata = {"digest": image_set.digest, "classes": json.dumps(image_set.classes), "sources": sources}
    mode = path.stat().st_mode
    save_file({"images": image_set.images}, path, metadata)
    path.chmod(mode)  # save_file makes files private, but a cache may be shared
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise MamlError(
            f"the image cache {path} cannot be written ({error}); "
            f"set cache_dir= (now {path.parent}) to a folder that is writable and has room"
        ) from error
