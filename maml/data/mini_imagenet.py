"""Mini-ImageNet (Vinyals et al. 2016), split by Ravi and Larochelle (2017), in the three common forms."""

import csv
import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from maml.data.cache import ImageSet, cached_from_files, load_cache
from maml.data.files import File, file_on_disk, list_files, unpickle
from maml.data.photos import NUM_CLASSES, Photos, cached_photos, check_classes, stack
from maml.data.pictures import opaque
from maml.errors import MamlError, Unavailable
from maml.status import about, announce

IMAGE_SIZE = 84
_SECONDS_TO_READ_PICKLES = 30

_CACHE_NAME = "mini_imagenet_84x84_lanczos"
_LABEL = "mini-ImageNet"
_PLACES = ("mini-imagenet", "mini_imagenet", "miniimagenet", ".")
_LISTS = "https://github.com/twitter-research/meta-learning-lstm/tree/master/data/miniImagenet"


def load_mini_imagenet(data_dir: Path, cache_dir: Path) -> ImageSet:
    """Loads the photos of all three splits. There is no download, because ImageNet's photos may not be redistributed.

    The photos are searched in ``mini-imagenet/``, ``mini_imagenet/``, ``miniimagenet/`` and ``data_dir`` itself, as

    1. ``images/*.jpg`` listed in ``train.csv``, ``val.csv`` and ``test.csv``, or
    2. ``mini-imagenet-cache-train.pkl``, ``-val.pkl`` and ``-test.pkl``, or
    3. ``train/<class>/*.jpg``, ``val/<class>/*.jpg`` and ``test/<class>/*.jpg``.

    The first form that exists is used; if none exists, an existing cache.

    Args:
        data_dir: folder of the data sets.
        cache_dir: folder in which the tensor built from the original files is cached.

    Returns:
        ``images`` uint8 ``(100, 600, 84, 84, 3)``, where the photos of a class are sorted by file name or by index in a
        pickle; ``classes`` as ``split/label``, sorted.

    Raises:
        MamlError: if files are missing or damaged, or the cache cannot be written.
    """
    for place in (data_dir / name for name in _PLACES):
        if (place / "images").is_dir():
            return _photos(place, _listed, cache_dir)
        if any(path.exists() for path in _pickles(place).values()):
            return _load_pickles(place, cache_dir)
        if (place / "train").is_dir():
            return _photos(place, _in_folders, cache_dir)
    if (cached := load_cache(cache_dir, _CACHE_NAME)) is not None:
        return cached
    raise Unavailable(_how_to_provide(data_dir))


def check_provided(data_dir: Path, cache_dir: Path) -> None:
    """Checks that `load_mini_imagenet` finds files or a cache; these may still be incomplete.

    Raises:
        Unavailable: if it finds neither.
    """
    places = [data_dir / name for name in _PLACES]
    folders = [place / name for place in places for name in ("images", "train")]
    pickles = [path for place in places for path in _pickles(place).values()]
    found = any(path.is_dir() for path in folders) or any(path.exists() for path in pickles)
    if not found and load_cache(cache_dir, _CACHE_NAME) is None:
        raise Unavailable(_how_to_provide(data_dir))


def _photos(place: Path, photos: Callable[[Path], Photos], cache_dir: Path) -> ImageSet:
    return cached_photos(cache_dir, _CACHE_NAME, _LABEL, place, lambda: photos(place), _prepare, _advice(place))


def _listed(place: Path) -> Photos:
    found = dict(list_files(place / "images", _advice(place)))
    photos: dict[str, dict[str, File]] = defaultdict(dict)
    missing = [f"{split}.csv is missing" for split in NUM_CLASSES if not (place / f"{split}.csv").exists()]
    for split in NUM_CLASSES if not missing else ():
        for file, label in _read_list(place / f"{split}.csv"):
            path = f"images/{file}"
            if path in found:
                photos[f"{split}/{label}"][path] = found[path]
            else:
                missing.append(f"{path} of {split}.csv is missing")
    check_classes({cls: len(files) for cls, files in photos.items()}, _advice(place), missing)
    return photos


def _read_list(path: Path) -> list[tuple[str, str]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            if not {"filename", "label"} <= {*(rows.fieldnames or [])}:
                raise ValueError("it does not start with the line filename,label")
            return [(row["filename"], row["label"]) for row in rows]
    except (OSError, ValueError, csv.Error) as error:
        raise MamlError(f"{path} cannot be read as a list of photos ({error}); get it from {_LISTS}") from error


def _in_folders(place: Path) -> Photos:
    photos: dict[str, dict[str, File]] = defaultdict(dict)
    for split in NUM_CLASSES:
        for path, info in list_files(place / split, _advice(place)):
            cls, _, file = path.rpartition("/")
            if file.lower().endswith((".jpg", ".jpeg", ".png")) and not file.startswith("."):
                photos[cls][path] = info
    check_classes({cls: len(files) for cls, files in photos.items()}, _advice(place))
    return photos


def _pickles(place: Path) -> dict[str, Path]:
    return {split: place / f"mini-imagenet-cache-{split}.pkl" for split in NUM_CLASSES}


def _load_pickles(place: Path, cache_dir: Path) -> ImageSet:
    paths = _pickles(place)
    if missing := [path.name for path in paths.values() if not path.exists()]:
        raise MamlError(f"{' and '.join(missing)} missing; {_advice(place)}")

    def build() -> tuple[Tensor, list[str]]:
        announce(f"reading {_LABEL}, once: {about(_SECONDS_TO_READ_PICKLES)}")
        photos = {f"{split}/{label}": rows for split, path in paths.items() for label, rows in _read_pickle(path)}
        check_classes({cls: len(rows) for cls, rows in photos.items()}, _advice(place))
        return stack(photos, lambda pixels: np.asarray(_prepare(Image.fromarray(pixels))))

    return cached_from_files(cache_dir, _CACHE_NAME, lambda: {p.name: file_on_disk(p) for p in paths.values()}, build)


def _read_pickle(path: Path) -> list[tuple[str, list[np.ndarray]]]:
    """Returns each class of one split with its photos, which are views of one array."""
    pixels, indices = unpickle(path, ("image_data", "class_dict"), _advice(path.parent))
    try:
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
            raise ValueError(f"image_data is {pixels.dtype} {pixels.shape}, not uint8 (images, height, width, 3)")
        return [
            (os.fsdecode(label), [pixels[index] for index in sorted({*chosen})]) for label, chosen in indices.items()
        ]
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise MamlError(f"{path} does not hold images and their classes ({error}); {_advice(path.parent)}") from error


def _prepare(image: Image.Image) -> Image.Image:
    # Departure: the authors saved what they had resized as JPEG once more.
    return opaque(image).convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)


def _advice(place: Path) -> str:
    return f"complete or replace mini-ImageNet in {place}, or move it away if you mean another copy"


def _how_to_provide(data_dir: Path) -> str:
    place = data_dir / "mini-imagenet"
    return (
        f"mini-ImageNet not found in data_dir={data_dir}, and there is no download: ImageNet's pixels may not be "
        f"passed on. Put there one of: {place}/images/*.jpg with {place}/train.csv, val.csv and test.csv of {_LISTS}; "
        f"{place}/mini-imagenet-cache-train.pkl, -val.pkl and -test.pkl; {place}/train/<class>/*.jpg, and so for val "
        f"and test. If they are elsewhere, set data_dir= in the config or the environment variable MAML_DATA"
    )
