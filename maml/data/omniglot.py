"""Omniglot (Lake et al. 2011): 1623 characters with 20 drawings each, from the user's zips or folders."""

import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import cache, partial
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from maml.data.cache import ImageSet, cached_from_files, load_cache
from maml.data.files import NEEDS_TORCHVISION, File, file_on_disk, list_files, reader
from maml.data.pictures import grey_ink, opaque, warn_of_blank_or_inverted
from maml.errors import MamlError, Unavailable, cause, first_ten
from maml.status import about, announce
from maml.types import Split

NUM_DRAWINGS = 20
IMAGE_SIZE = 28

# The number of characters of each alphabet, for both halves of the data set: 964 and 659 in total.
ALPHABETS = {
    "images_background": {
        "Alphabet_of_the_Magi": 20,
        "Anglo-Saxon_Futhorc": 29,
        "Arcadian": 26,
        "Armenian": 41,
        "Asomtavruli_(Georgian)": 40,
        "Balinese": 24,
        "Bengali": 46,
        "Blackfoot_(Canadian_Aboriginal_Syllabics)": 14,
        "Braille": 26,
        "Burmese_(Myanmar)": 34,
        "Cyrillic": 33,
        "Early_Aramaic": 22,
        "Futurama": 26,
        "Grantha": 43,
        "Greek": 24,
        "Gujarati": 48,
        "Hebrew": 22,
        "Inuktitut_(Canadian_Aboriginal_Syllabics)": 16,
        "Japanese_(hiragana)": 52,
        "Japanese_(katakana)": 47,
        "Korean": 40,
        "Latin": 26,
        "Malay_(Jawi_-_Arabic)": 40,
        "Mkhedruli_(Georgian)": 41,
        "N_Ko": 33,
        "Ojibwe_(Canadian_Aboriginal_Syllabics)": 14,
        "Sanskrit": 42,
        "Syriac_(Estrangelo)": 23,
        "Tagalog": 17,
        "Tifinagh": 55,
    },
    "images_evaluation": {
        "Angelic": 20,
        "Atemayar_Qelisayer": 26,
        "Atlantean": 26,
        "Aurek-Besh": 26,
        "Avesta": 26,
        "Ge_ez": 26,
        "Glagolitic": 45,
        "Gurmukhi": 45,
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
    },
}

_NUM_TRAINVAL = 1200  # characters that are not in the test of Vinyals et al. (2016)
_VAL_ALPHABETS = {"Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)"}

_SOURCE_SIZE = (105, 105)
_SECONDS_TO_READ = 10
_HOMEPAGE = "https://github.com/brendenlake/omniglot/tree/master/python"
_DRAWING = re.compile(r"images_\w+/[^/]+/[^/]+/[^/.][^/]*\.png")  # not the hidden files that some systems add


def load_omniglot(
    data_dir: Path, cache_dir: Path, download: bool = True, size: int = IMAGE_SIZE, is_grey: bool = False
) -> ImageSet:
    """Loads both halves of Omniglot, merged as in section 5.2 of the paper and its code.

    The halves are ``images_background`` and ``images_evaluation``. Each half is searched in ``omniglot/``,
    ``omniglot-py/`` and ``data_dir`` itself, first as a zip and then as an extracted folder. If a half is missing, an
    existing cache is used.

    Args:
        data_dir: folder of the data sets; only a download writes to it.
        cache_dir: folder in which the tensor built from the original files is cached.
        download: whether a missing half is downloaded by torchvision to ``data_dir/omniglot/``.
        size: height and width of the images.
        is_grey: whether drawings are made smaller with a smooth filter (bilinear), so that pixels are levels of grey.
            The darkest pixel of a drawing is 255. Otherwise the nearest pixel is taken, which is ink or paper.

    Returns:
        ``images`` uint8 ``(1623, 20, size, size)``, paper = 0 and ink = 1, or 255 if ``is_grey``, the drawings of a
        character in the order of their file names; ``classes`` as ``alphabet/characterNN``, sorted.

    Raises:
        MamlError: if files are missing or damaged, the download fails, or the cache cannot be written.
    """
    found, cache_name = _find(data_dir), f"omniglot_{size}x{size}_{'bilinear' if is_grey else 'nearest'}"
    if missing := [half for half in ALPHABETS if half not in found]:
        if (cached := load_cache(cache_dir, cache_name)) is not None:
            return cached
        if not download:
            raise Unavailable(_how_to_provide(data_dir, missing))
        _download(data_dir, missing)
        found = _find(data_dir)

    @cache
    def drawings() -> dict[str, File]:
        return {name: file for source in found.values() for name, file in _list_drawings(source)}

    def build() -> tuple[Tensor, list[str]]:
        return _read(found, _group(drawings(), data_dir), size, partial(_grey_ink if is_grey else _ink, size=size))

    zips = {half: file_on_disk(source) for half, source in found.items() if source.suffix == ".zip"}
    return cached_from_files(cache_dir, cache_name, drawings, build, zips if zips.keys() == found.keys() else None)


def vinyals_split(classes: Sequence[str]) -> dict[Split, Tensor]:
    """Returns the split that the field calls Vinyals': 1028, 172 and 423 characters (docs/protocol.md#omniglot-splits).

    Args:
        classes: the sorted names of all characters, as `load_omniglot` returns them.

    Returns:
        The indices of each split's characters, in the order of their folders.
    """
    background = ALPHABETS["images_background"]
    alphabets = [name.partition("/")[0] for name in classes]
    in_folder_order = sorted(range(len(classes)), key=lambda i: alphabets[i] not in background)
    trainval, test = in_folder_order[:_NUM_TRAINVAL], in_folder_order[_NUM_TRAINVAL:]
    train = [i for i in trainval if alphabets[i] not in _VAL_ALPHABETS]
    val = [i for i in trainval if alphabets[i] in _VAL_ALPHABETS]
    return {"train": torch.tensor(train), "val": torch.tensor(val), "test": torch.tensor(test)}


def _find(data_dir: Path) -> dict[str, Path]:
    # Zips first: thousands of small files are slow to list on a network drive.
    places = [data_dir / "omniglot", data_dir / "omniglot-py", data_dir]
    found = {}
    for half in ALPHABETS:
        zips, folders = [place / f"{half}.zip" for place in places], [place / half for place in places]
        if source := next((path for path in zips + folders if path.exists()), None):
            found[half] = source
    return found


def _list_drawings(source: Path) -> Iterator[tuple[str, File]]:
    """Yields ``images_background/<alphabet>/<character>/<file>.png`` and what is known of it."""
    for name, file in list_files(source, f"replace it, for example from {_HOMEPAGE}"):
        if _DRAWING.fullmatch(name):
            yield name, file


def _group(names: Iterable[str], data_dir: Path) -> dict[str, list[str]]:
    """Sorts file names into the 1623 folders ``half/alphabet/characterNN``, all of which must be complete."""
    expected = [
        f"{half}/{alphabet}/character{number:02d}"
        for half, alphabets in ALPHABETS.items()
        for alphabet, num_characters in alphabets.items()
        for number in range(1, num_characters + 1)
    ]
    drawings: dict[str, list[str]] = {folder: [] for folder in expected}
    for name in sorted(names):
        drawings.setdefault(name.rpartition("/")[0], []).append(name)

    wrong = [
        f"{folder} has {len(drawings[folder])} of {NUM_DRAWINGS} drawings"
        for folder in expected
        if len(drawings[folder]) != NUM_DRAWINGS
    ]
    wrong += [f"{folder} does not belong to Omniglot" for folder in list(drawings)[len(expected) :]]
    if wrong:
        raise MamlError(
            f"Omniglot in {data_dir} is not the 1623 characters x 20 drawings: {first_ten(wrong)}; "
            f"put the original files back, for example from {_HOMEPAGE}"
        )
    return drawings


def _read(
    sources: dict[str, Path], drawings: dict[str, list[str]], size: int, read_ink: Callable[[bytes], np.ndarray]
) -> tuple[Tensor, list[str]]:
    announce(f"reading Omniglot, once: {about(_SECONDS_TO_READ)}")
    halves = {label: half for half, _, label in (folder.partition("/") for folder in drawings)}
    classes = sorted(halves)
    images = np.empty((len(classes), NUM_DRAWINGS, size, size), np.uint8)
    with ExitStack() as stack:
        roots = {half: source if source.suffix == ".zip" else source.parent for half, source in sources.items()}
        readers = {half: stack.enter_context(reader(root)) for half, root in roots.items()}
        for index, label in enumerate(classes):
            half = halves[label]
            for drawing, name in enumerate(drawings[f"{half}/{label}"]):
                try:
                    images[index, drawing] = ink = read_ink(readers[half](name))
                except Exception as error:  # broken bytes raise a dozen types in Pillow, zipfile and zlib
                    raise MamlError(
                        f"{name} in {sources[half]} cannot be decoded ({error}); "
                        f"put the original file back, for example from {_HOMEPAGE}"
                    ) from error
                warn_of_blank_or_inverted([(f"{name} in {sources[half]}", ink)])
    return torch.from_numpy(images), classes


def _ink(png: bytes, size: int) -> np.ndarray:
    # The authors' code asks for Lanczos, but Pillow resizes 1-bit images by the nearest pixel: ink stays 0 or 1.
    return ~np.asarray(_drawing(png).resize((size, size), Image.Resampling.NEAREST))


def _grey_ink(png: bytes, size: int) -> np.ndarray:
    return grey_ink(_drawing(png), size, size)


def _drawing(png: bytes) -> Image.Image:
    with Image.open(BytesIO(png)) as drawing:
        if drawing.size != _SOURCE_SIZE:
            raise ValueError(f"its size is {drawing.size}, not {_SOURCE_SIZE}")
        return opaque(drawing).convert("1")


def _download(data_dir: Path, halves: list[str]) -> None:
    try:
        from torchvision.datasets import Omniglot  # here, because it cannot be imported with every build of torch
    except Exception as error:
        raise Unavailable(f"{_how_to_provide(data_dir, halves)}. {NEEDS_TORCHVISION} ({cause(error)})") from error
    try:
        folder = data_dir / "omniglot"
        folder.mkdir(parents=True, exist_ok=True)
        announce(f"downloading Omniglot, once, to {folder}")
        for half in halves:
            # Renamed only when complete and verified, so that an interrupted download leaves no half-written zip.
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                dataset = Omniglot(scratch, background=half == "images_background", download=True)
                os.replace(Path(dataset.root) / f"{half}.zip", folder / f"{half}.zip")
    except Exception as error:  # torchvision, the network and the disk raise many kinds of errors
        raise Unavailable(f"{_how_to_provide(data_dir, halves)}. The download failed with {cause(error)}") from error


def _how_to_provide(data_dir: Path, halves: list[str]) -> str:
    zips = " and ".join(f"{data_dir}/omniglot/{half}.zip" for half in halves)
    folders = " and ".join(f"{data_dir}/omniglot-py/{half}/<alphabet>/<character>/*.png" for half in halves)
    return (
        f"Omniglot's {' and '.join(halves)} not found in data_dir={data_dir}. Get the zips from {_HOMEPAGE} and put "
        f"them at {zips}, or extracted at {folders}; if they are elsewhere, set data_dir= in the config or the "
        f"environment variable MAML_DATA"
    )
