"""Common code of mini-ImageNet and CIFAR-FS: 64 training, 16 validation and 20 test classes of 600 photos each."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from maml.data.cache import ImageSet, cached_from_files
from maml.data.files import File, reader
from maml.data.pictures import seconds_to_read
from maml.errors import MamlError, first_ten
from maml.status import about, announce
from maml.types import Split

# Departure: the paper has 64, 12 and 24; the lists of Ravi and Larochelle, which its code reads, have these.
NUM_CLASSES: dict[Split, int] = {"train": 64, "val": 16, "test": 20}
NUM_IMAGES = 600

Photo = TypeVar("Photo")
Photos = Mapping[str, Mapping[str, File]]
"""The files of each class, which is named ``split/label``, by their path in the zip or folder."""


def class_splits(classes: Sequence[str]) -> dict[Split, Tensor]:
    """Returns the indices of each split's classes, which are named ``split/label``."""
    return {
        split: torch.tensor([index for index, name in enumerate(classes) if name.startswith(f"{split}/")])
        for split in NUM_CLASSES
    }


def check_classes(counts: Mapping[str, int], advice: str, faults: Sequence[str] = ()) -> None:
    """Checks that there are 64, 16 and 20 classes of 600 photos, each class in one split.

    Args:
        counts: the number of photos of each class, named ``split/label``.
        advice: end of the error message: the place of the files, and what to do.
        faults: other faults that were found before; they are part of the message.

    Raises:
        MamlError: lists all faults.
    """
    found = Counter(name.partition("/")[0] for name in counts)
    labels = Counter(name.partition("/")[2] for name in counts)
    wrong = [*faults]
    wrong += [
        f"{split} has {found[split]} of {num} classes" for split, num in NUM_CLASSES.items() if found[split] != num
    ]
    wrong += [f"{label} is a class of {num} splits" for label, num in labels.items() if num > 1]
    wrong += [f"{name} has {num} of {NUM_IMAGES} images" for name, num in counts.items() if num != NUM_IMAGES]
    if wrong:
        raise MamlError(f"{first_ten(wrong)}; {advice}")


def stack(photos: Mapping[str, Sequence[Photo]], decode: Callable[[Photo], np.ndarray]) -> tuple[Tensor, list[str]]:
    """Returns the images, ``(classes, images per class, H, W, 3)``, and the sorted class names."""
    classes = sorted(photos)
    first = decode(photos[classes[0]][0])
    images = np.empty((len(classes), NUM_IMAGES, *first.shape), np.uint8)
    for index, name in enumerate(classes):
        for number, photo in enumerate(photos[name]):
            images[index, number] = decode(photo)
    return torch.from_numpy(images), classes


def cached_photos(
    cache_dir: Path,
    name: str,
    label: str,
    source: Path,
    photos: Callable[[], Photos],
    prepare: Callable[[Image.Image], Image.Image],
    advice: str,
    archives: Mapping[str, File] | None = None,
) -> ImageSet:
    """Loads the tensor of photos that are single files, or builds it. Photos of a class are sorted by file name.

    Args:
        cache_dir: as for `cached_tensor`.
        name: as for `cached_tensor`.
        label: name of the data set for the status line.
        source: the zip or folder that holds the photos.
        photos: lists and checks all photos.
        prepare: converts every photo to the same size and to RGB.
        advice: what to do if a photo cannot be decoded.
        archives: as for `cached_from_files`.

    Raises:
        MamlError: if a photo cannot be decoded, or the cache cannot be written.
    """
    listed = cache(photos)

    def files() -> dict[str, File]:
        return {f"{cls}/{path}": file for cls, files in listed().items() for path, file in files.items()}

    def build() -> tuple[Tensor, list[str]]:
        announce(f"reading {label}, once: {about(seconds_to_read(files().values()))}")
        with reader(source) as read:

            def decode(path: str) -> np.ndarray:
                try:
                    with Image.open(BytesIO(read(path))) as image:
                        return np.asarray(prepare(image))
                except Exception as error:  # broken bytes raise a dozen types in Pillow, zipfile and zlib
                    raise MamlError(f"{path} in {source} cannot be decoded ({error}); {advice}") from error

            return stack({cls: sorted(files) for cls, files in listed().items()}, decode)

    return cached_from_files(cache_dir, name, files, build, archives)
