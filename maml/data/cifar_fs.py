"""CIFAR-FS (Bertinetto et al. 2019): CIFAR-100 (Krizhevsky 2009), 100 classes x 600 photos, in a few-shot split."""

import os
import tempfile
from collections.abc import Mapping
from functools import partial
from operator import itemgetter
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from maml.data.cache import ImageSet, cached_from_files, load_cache
from maml.data.files import NEEDS_TORCHVISION, File, file_on_disk, list_files, unpickle
from maml.data.photos import NUM_IMAGES, Photos, cached_photos, check_classes, stack
from maml.data.pictures import opaque
from maml.errors import MamlError, Unavailable, cause
from maml.status import announce

IMAGE_SIZE = 32

# The split as published.
_LABELS = {
    "train": (
        "apple aquarium_fish bear bee bottle bowl boy bridge bus can castle caterpillar chair clock cloud cockroach "
        "couch cup dinosaur dolphin elephant forest girl hamster house kangaroo keyboard lawn_mower lion lizard "
        "lobster mountain mouse mushroom oak_tree orange orchid palm_tree pear pine_tree plate porcupine possum rabbit "
        "raccoon ray road seal shrew skunk skyscraper snake spider squirrel streetcar sunflower tank tiger train trout "
        "tulip turtle willow_tree wolf"
    ),
    "val": (
        "beaver beetle butterfly camel cattle crab crocodile flatfish lamp maple_tree motorcycle otter sea shark "
        "television tractor"
    ),
    "test": (
        "baby bed bicycle chimpanzee fox leopard man pickup_truck plain poppy rocket rose snail sweet_pepper table "
        "telephone wardrobe whale woman worm"
    ),
}
SPLITS = {split: labels.split() for split, labels in _LABELS.items()}

_CACHE_NAME = "cifar_fs_32x32"
_PUBLISHED = "cifar-100-python"
_HOMEPAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"


def load_cifar_fs(data_dir: Path, cache_dir: Path, download: bool = True) -> ImageSet:
    """Loads CIFAR-100, both its halves merged, with the classes of the three splits.

    The photos are searched as ``cifar-fs/cifar100.zip``, as extracted files ``cifar-fs/images/<class>/*.png``, and as
    the published folder ``cifar-100-python/`` in ``cifar-fs/`` or ``data_dir`` itself. The first place that exists is
    used; if none exists, an existing cache. The split is that of ``cifar-fs/{train,val,test}.txt``, with one class per
    line; without these files, it is the published split.

    Args:
        data_dir: folder of the data sets; only a download writes to it.
        cache_dir: folder in which the tensor built from the original files is cached.
        download: whether missing files are downloaded by torchvision to ``data_dir/cifar-fs/``.

    Returns:
        ``images`` uint8 ``(100, 600, 32, 32, 3)``, where the photos of a class are sorted by file name (the published
        files record the names too); ``classes`` as ``split/label``, sorted.

    Raises:
        MamlError: if files are missing or damaged, the download fails, or the cache cannot be written.
    """
    folder = data_dir / "cifar-fs"
    classes = _read_split(folder)
    split = dict.fromkeys(classes.values(), File(0, checksum=0))  # other splits are other data
    for source in (folder / "cifar100.zip", folder / "images"):
        if source.exists():
            root = source if source.suffix == ".zip" else folder
            archives = {source.name: file_on_disk(source)} | split if source.suffix == ".zip" else None
            photos = partial(_pngs, source, classes)
            return cached_photos(cache_dir, _CACHE_NAME, "CIFAR-FS", root, photos, _prepare, _advice(source), archives)
    for source in (folder / _PUBLISHED, data_dir / _PUBLISHED):
        if source.is_dir():
            return _load_published(source, classes, split, cache_dir)
    cached = load_cache(cache_dir, _CACHE_NAME)
    if cached is not None and cached.classes == sorted(classes.values()):
        return cached
    if not download:
        raise Unavailable(_how_to_provide(data_dir))
    _download(data_dir)
    return _load_published(folder / _PUBLISHED, classes, split, cache_dir)


def _read_split(folder: Path) -> dict[str, str]:
    """Returns ``split/label`` of each class by label."""
    paths = {split: folder / f"{split}.txt" for split in SPLITS}
    absent = [path.name for path in paths.values() if not path.exists()]
    advice = f"put CIFAR-FS's lists back into {folder}, or remove all three to use the published split"
    if len(absent) == len(paths):
        splits = SPLITS
    elif absent:
        raise MamlError(f"{' and '.join(absent)} missing beside the other lists of classes; {advice}")
    else:
        splits = {split: _read_list(path, advice) for split, path in paths.items()}
    known = {label for labels in SPLITS.values() for label in labels}
    unknown = [
        f"{label} of {split}.txt is not a class of CIFAR-100"
        for split, labels in splits.items()
        for label in labels
        if label not in known
    ]
    classes = [f"{split}/{label}" for split, labels in splits.items() for label in labels]
    check_classes(dict.fromkeys(classes, NUM_IMAGES), advice, unknown)
    return {name.partition("/")[2]: name for name in classes}


def _read_list(path: Path, advice: str) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").split()
    except OSError as error:
        raise MamlError(f"{path} cannot be read as a list of classes ({error.strerror}); {advice}") from error


def _pngs(source: Path, classes: Mapping[str, str]) -> Photos:
    photos: dict[str, dict[str, File]] = {name: {} for name in classes.values()}
    foreign = set()
    for path, info in list_files(source, _advice(source)):
        match path.split("/"):
            case ["images", label, file] if file.endswith(".png") and not file.startswith("."):
                if label in classes:
                    photos[classes[label]][path] = info
                else:
                    foreign.add(f"images/{label} does not belong to CIFAR-100")
    check_classes({name: len(files) for name, files in photos.items()}, _advice(source), sorted(foreign))
    return photos


def _load_published(source: Path, classes: Mapping[str, str], split: dict[str, File], cache_dir: Path) -> ImageSet:
    advice = _advice(source)

    def build() -> tuple[Tensor, list[str]]:
        announce("reading CIFAR-FS, once: a few seconds")
        named_photos: dict[str, list[tuple[str, np.ndarray]]] = {name: [] for name in classes.values()}
        [labels] = unpickle(source / "meta", ["fine_label_names"], advice)
        for half in ("train", "test"):
            columns = unpickle(source / half, ["fine_labels", "filenames", "data"], advice)
            try:
                for number, file, pixels in zip(*columns, strict=True):
                    photo = pixels.reshape(3, IMAGE_SIZE, IMAGE_SIZE).transpose(1, 2, 0)
                    named_photos[classes[labels[number]]].append((file, photo))
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                reason = f"{type(error).__name__}: {error}"
                raise MamlError(f"{source / half} does not hold CIFAR-100 ({reason}); {advice}") from error
        check_classes({name: len(photos) for name, photos in named_photos.items()}, advice)
        photos = {name: sorted(photos, key=itemgetter(0)) for name, photos in named_photos.items()}
        return stack(photos, itemgetter(1))

    return cached_from_files(cache_dir, _CACHE_NAME, lambda: dict(list_files(source, advice)) | split, build)


def _prepare(image: Image.Image) -> Image.Image:
    if image.size != (IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(f"its size is {image.size}, not {(IMAGE_SIZE, IMAGE_SIZE)}")
    return opaque(image).convert("RGB")


def _download(data_dir: Path) -> None:
    try:
        from torchvision.datasets import CIFAR100  # here, because it cannot be imported with every build of torch
    except Exception as error:
        raise Unavailable(f"{_how_to_provide(data_dir)}. {NEEDS_TORCHVISION} ({cause(error)})") from error
    try:
        folder = data_dir / "cifar-fs"
        folder.mkdir(parents=True, exist_ok=True)
        announce(f"downloading CIFAR-100 (170 MB), once, to {folder}")
        # Renamed only when complete and verified, so that an interrupted download leaves no incomplete folder.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            CIFAR100(scratch, download=True)
            os.replace(Path(scratch) / _PUBLISHED, folder / _PUBLISHED)
    except Exception as error:  # torchvision, the network and the disk raise many kinds of errors
        raise Unavailable(f"{_how_to_provide(data_dir)}. The download failed with {cause(error)}") from error


def _advice(source: Path) -> str:
    return f"put CIFAR-100 in {source} back as it was published, for example from {_HOMEPAGE}"


def _how_to_provide(data_dir: Path) -> str:
    folder = data_dir / "cifar-fs"
    return (
        f"CIFAR-100 not found in data_dir={data_dir}. Get its Python version from {_HOMEPAGE} and extract it at "
        f"{folder}/{_PUBLISHED}/, or put its photos at {folder}/images/<class>/*.png, zipped at {folder}/cifar100.zip "
        f"or extracted; if they are elsewhere, set data_dir= in the config or the environment variable MAML_DATA"
    )
