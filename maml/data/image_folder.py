"""A user's own pictures, in one folder for each class, read into one tensor."""

from __future__ import annotations

import csv
import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from maml.data.cache import ImageSet, cached_from_files
from maml.data.files import File, file_on_disk
from maml.data.pictures import seconds_to_read, to_pixels, warn_of_blank_or_inverted
from maml.data.splits import SPLITS, share_out
from maml.errors import MamlError, Unavailable, first_ten
from maml.status import about, announce
from maml.types import Split

_MAX_THREADS = 8
_NO_PICTURES = {"Thumbs.db", "desktop.ini"}  # added by a system

Classes = Mapping[str, Mapping[str, File]]
"""The pictures of each class, by file name."""


def list_splits(root: Path, split: str | Sequence[float] | None) -> dict[Split, Classes]:
    """Lists the pictures of all classes, without reading them, and assigns the classes to the splits.

    Args:
        root: the folder.
        split: None if the splits are folders, ``root/train/<class>/*``. With ``root/<class>/*``, the shares of the
            classes for training, validation and test, or a csv file with the columns ``class`` and ``split``.

    Returns:
        The classes of each split, sorted by name; a split without classes is left out. Where splits are folders, a
        class is named ``train/<class>``.

    Raises:
        Unavailable: if the folder does not exist.
        MamlError: if the folder is not laid out like this, a class is in two splits, or the csv file is wrong.
    """
    if not root.is_dir():
        raise Unavailable(
            f"there is no folder {root}; set domain.folder= to the folder of your pictures (with its full path, or "
            "within data_dir=)"
        )
    if split is None:
        if not (root / "train").is_dir() or not (root / "test").is_dir():
            raise MamlError(
                f"{root} has no folders train/ and test/, each with a folder for each class; make them, or set "
                "domain.split=[0.6,0.2,0.2] to share out the classes of one folder"
            )
        if others := [entry.path for entry in _visible(root) if entry.is_dir() and entry.name not in SPLITS]:
            warnings.warn(f"{first_ten(others)}: not train/, val/ or test/, so left out", stacklevel=2)
        found = {one: _list_classes(root / one) for one in SPLITS if (root / one).is_dir()}
        _check_disjoint([(name, one) for one, classes in found.items() for name in classes])
        return {one: {f"{one}/{name}": files for name, files in found[one].items()} for one in found}
    if any(path.is_dir() for path in root.glob("train/*")):
        raise MamlError(f"{root} has a folder train/ with classes, so they are shared out already; leave out split=")
    classes = _list_classes(root)
    chosen = _read_split(root, split, classes) if isinstance(split, str) else share_out(split, [*classes])
    return {one: {name: classes[name] for name in sorted(chosen[one])} for one in SPLITS if chosen[one]}


def _list_classes(folder: Path) -> dict[str, dict[str, File]]:
    """Returns the pictures of each class, both sorted by name. Hidden files and folders do not count."""
    classes, loose = {}, []
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    for cls in _visible(folder):
        _check_link(cls)
        if not cls.is_dir():
            loose += [cls.path] * (os.path.splitext(cls.name)[1].lower() in endings)
            continue
        if not _is_text(cls.name):
            raise MamlError(
                f"{folder} has a folder {cls.name!a}, whose name is not UTF-8, so a report cannot name the class; "
                "rename the folder"
            )
        files = _visible(cls)
        for file in files:
            _check_link(file)
        if deeper := [file.path for file in files if file.is_dir()]:
            raise MamlError(
                f"{deeper[0]} is a folder, but {cls.path} should hold the pictures of one class; is {folder} the right "
                "folder? Its folders are the classes"
            )
        kinds = {file.name: os.path.splitext(file.name)[1].lower() in endings for file in files}
        if others := [file.path for file in files if not kinds[file.name] and file.name not in _NO_PICTURES]:
            warnings.warn(f"{first_ten(others)}: by the name no picture that Pillow reads, so left out", stacklevel=2)
        classes[cls.name] = {file.name: file_on_disk(file.path) for file in files if kinds[file.name]}
    if loose:
        warnings.warn(f"{first_ten(loose)}: in no folder of a class, so left out", stacklevel=2)
    if not classes:
        raise MamlError(f"{folder} has no folders; put the pictures of each class into a folder of its own there")
    return classes


def _check_link(entry: os.DirEntry[str]) -> None:
    if entry.is_symlink() and not os.path.exists(entry.path):
        raise MamlError(f"{entry.path} is a link to {os.readlink(entry.path)}, which is not there; mend or delete it")


def _is_text(name: str) -> bool:
    """Returns whether the name of a file is UTF-8. Python puts surrogates in place of bytes that are not."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _visible(folder: str | Path | os.DirEntry[str]) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def _check_disjoint(assigned: Sequence[tuple[str, str]]) -> None:
    """Checks pairs of a class and its split."""
    counts = Counter(name for name, _ in assigned)
    if shared := sorted(name for name, count in counts.items() if count > 1):
        raise MamlError(
            f"{first_ten(shared)}: in more than one split. A task is new only if its classes are, so each class "
            "belongs to one split; rename the folders if these are different classes"
        )


def _read_split(root: Path, split: str, classes: Classes) -> dict[Split, list[str]]:
    """Reads a csv file, whose path may be relative to the folder of the pictures."""
    path = root / split
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            if not {"class", "split"} <= {*(rows.fieldnames or [])}:
                raise ValueError("it does not start with the line class,split")
            assigned = [*dict.fromkeys((row["class"], row["split"]) for row in rows)]  # a line may come twice
    except (OSError, ValueError, csv.Error) as error:
        raise MamlError(
            f"domain.split: {path} cannot be read as a csv file with the columns class and split ({error})"
        ) from error
    named = {name for name, _ in assigned}
    wrong = [f"{name} has the split {one}, not train, val or test" for name, one in assigned if one not in SPLITS]
    wrong += [f"{name} has no folder in {root}" for name in sorted(named - {*classes})]
    wrong += [f"the folder {name} is not in the file" for name in sorted({*classes} - named)]
    if wrong:
        raise MamlError(f"{path}: {first_ten(wrong)}")
    _check_disjoint(assigned)
    return {one: [name for name, given in assigned if given == one] for one in SPLITS}


def load_image_folder(
    root: Path, classes: Classes, cache_dir: Path, in_shape: tuple[int, int, int], is_drawing: bool
) -> ImageSet:
    """Reads and resizes the pictures of all classes, or loads the cached result. The files' content decides.

    Args:
        root: the folder, for messages.
        classes: all classes.
        cache_dir: folder in which the tensor is cached.
        in_shape: height, width and channels.
        is_drawing: as for `to_pixels`.

    Returns:
        The images; classes and their files are sorted by name.

    Raises:
        MamlError: names the classes without pictures, and the pictures that cannot be read.
    """
    if empty := [name for name, pictures in classes.items() if not pictures]:
        raise MamlError(f"{first_ten([f'{root / name} has no pictures' for name in empty])}; add some, or remove it")
    # Sorted, so that how the classes are shared out does not change the tensor.
    classes = {name: classes[name] for name in sorted(classes)}
    files = {f"{name}/{file}": info for name, pictures in classes.items() for file, info in pictures.items()}

    def build() -> tuple[Tensor, list[str]]:
        if (seconds := seconds_to_read(files.values())) > 1:
            announce(f"reading {root}, once: {about(seconds)}")
        images = np.empty((len(files), 1, *in_shape), np.uint8)
        faults = {}

        def read(index: int, name: str) -> None:
            try:
                with Image.open(files[name].path) as picture:
                    images[index, 0] = to_pixels(picture, in_shape, is_drawing)
            except Exception as error:  # broken files raise a dozen types in Pillow
                faults[name] = f"{files[name].path} ({error})"

        with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
            list(pool.map(read, range(len(files)), files))
        if faults:
            raise MamlError(
                f"no pictures that can be read: {first_ten([faults[name] for name in sorted(faults)])}; mend or remove "
                "them"
            )
        if is_drawing:
            warn_of_blank_or_inverted(
                (files[name].path, image) for name, image in zip(files, images[:, 0], strict=True)
            )
        return torch.from_numpy(images), [name for name, pictures in classes.items() for _ in pictures]

    height, width, channels = in_shape
    kind = "ink" if is_drawing else ("", "grey", "", "rgb")[channels]
    cached = cached_from_files(cache_dir, f"image_folder_{{content}}_{height}x{width}_{kind}", lambda: files, build)
    counts = [len(pictures) for pictures in classes.values()]
    if len(set(counts)) == 1:
        return ImageSet(cached.images.reshape(len(classes), -1, *in_shape), [*classes], cached.digest)
    return ImageSet(cached.images.transpose(0, 1), [*classes], cached.digest, counts)
