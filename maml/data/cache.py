"""Image sets as one tensor each, built once from a user's files and kept in a checked cache file."""

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
    """All images of a data set, with equally many per class.

    Attributes:
        images: uint8 ``(classes, images per class, ...)``; index it, or move it to a device once.
        classes: class names, in the order of the first axis.
        digest: SHA-256 of the shape, the class names and the pixels, which identifies the data in a run's record.
    """

    images: Tensor
    classes: list[str]
    digest: str


def cached_tensor(cache_dir: Path, name: str, sources: str, build: Callable[[], tuple[Tensor, list[str]]]) -> ImageSet:
    """Loads ``cache_dir/name.safetensors``, or builds and writes it where it is absent, damaged or of other sources.

    Several processes may build at once: each writes a file of its own and the last one renamed stays.

    Args:
        cache_dir: created where missing; only written to when something is built.
        name: names the data and how it was prepared; a change of preparation needs a new name.
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
    """Loads ``cache_dir/name.safetensors``, mapped into memory rather than copied.

    Args:
        cache_dir: where `cached_tensor` wrote the file.
        name: as for `cached_tensor`.
        sources: the `fingerprint` that the cache must have been built from; None takes any.

    Returns:
        None where the file is absent, damaged, or not such a cache: content is compared with its digest.
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
    """Returns a hash of original files by relative path and size in bytes, which needs no read of what is in them.

    Times are left out, so that a copy of the data, or the same data zipped or extracted, shares a cache.
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
