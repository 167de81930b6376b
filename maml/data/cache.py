"""Image sets: each is one tensor, built once from a user's files and kept in a verified cache file."""

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from maml.errors import MamlError


@dataclass(frozen=True, eq=False)
class ImageSet:
    """All images of a data set; every class has the same number of images.

    Attributes:
        images: the images, uint8 ``(classes, images per class, ...)``.
        classes: class names, in the order of the first axis.
        digest: SHA-256 of the shape, the class names and the pixels, which identifies the data in a run's record.
    """

    images: Tensor
    classes: list[str]
    digest: str


def cached_tensor(cache_dir: Path, name: str, sources: str, build: Callable[[], tuple[Tensor, list[str]]]) -> ImageSet:
    """Loads ``cache_dir/name.safetensors``; builds and writes it if it is missing, damaged or from other sources.

    Several processes may build it at once: each writes its own temporary file and then renames it.

    Args:
        cache_dir: folder of the cache files; created if it is missing.
        name: name of the data and its preparation; a change of the preparation needs a new name.
        sources: the `fingerprint` of the original files.
        build: returns a contiguous uint8 tensor ``(classes, images per class, ...)`` and the class names.

    Raises:
        MamlError: if the cache cannot be written.
    """
    if (cached := load_cache(cache_dir, name, sources)) is not None:
        return cached
    path = _path(cache_dir, name)
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


def fingerprint(sizes: Mapping[str, int]) -> str:
    """Returns a hash of the original files' relative paths and sizes in bytes; their content is not read.

    It does not depend on times, so that a copy of the data, zipped or extracted, can use the same cache.
    """
    return hashlib.sha256(json.dumps(sorted(sizes.items())).encode()).hexdigest()


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
