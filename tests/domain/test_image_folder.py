"""Tasks from a folder of pictures: classes of unequal size, and the same numbers as the built-in set."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch
from PIL import Image
from torch import Tensor

import maml
from maml.algorithm.maml import MAML
from maml.config.compose import compose
from maml.config.schema import build, build_without_data
from maml.data.cache import ImageSet
from maml.data.omniglot import load_omniglot
from maml.domain.classification import Splits
from maml.domain.image_folder import ImageFolder
from maml.domain.omniglot import Omniglot
from maml.errors import MamlError
from maml.inner.sgd import SGD
from maml.model.conv4 import Conv4
from maml.seeding import Stream
from maml.types import Split, take
from tests import algorithms
from tests.runs import TinyRuns

COUNTS = {
    "train": {"a": 4, "b": 9, "c": 5, "d": 4},
    "val": {"e": 4, "f": 5},
    "test": {"g": 2, "h": 7, "i": 3},
}
PLACES = [f"{split}/{name}" for split in sorted(COUNTS) for name in COUNTS[split]]


def make(root: Path, counts: Mapping[str, Mapping[str, int]] = COUNTS) -> None:
    """Writes pictures whose first channel is the class, and whose second is the number of the picture."""
    for split, classes in counts.items():
        for name, count in classes.items():
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (8, 8), (ord(name), number, 7)).save(root / split / name / f"{number}.png")


def domain_of(root: Path, **options: Any) -> ImageFolder:
    given: dict[str, Any] = {"num_ways": 2, "num_shots": 1, "image_size": 4, "folder": "own"}
    return ImageFolder(data_dir=str(root), cache_dir=str(root / "cache"), **(given | options))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make(tmp_path / "own")
    return tmp_path


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_tasks_have_the_pictures_of_their_classes_and_none_twice(root: Path, split: Split) -> None:
    domain = domain_of(root)
    tasks = domain.sample_tasks(300, Stream(0), split)
    support, query = (domain.data(tasks, role).x for role in ("support", "query"))
    assert support.shape == query.shape == (300, 2, 4, 4, 3)
    assert (support == support[..., :1, :1, :]).all()
    seen = set()
    for task in range(300):
        for way in range(2):
            drawn = [tuple((x[task, way, 0, 0] * 255).round().int().tolist()) for x in (support, query)]
            assert drawn[0][0] == drawn[1][0] == ord(PLACES[tasks["classes"][task, way]][-1])
            assert drawn[0][1] != drawn[1][1]
            seen |= {(chr(cls), number) for cls, number, _ in drawn}
    assert seen == {(name, number) for name, count in COUNTS[split].items() for number in range(count)}


def test_tasks_are_drawn_and_gathered_on_the_device(root: Path) -> None:
    domain = domain_of(root, rotate=True)
    domain.to(torch.device("meta"))  # like a GPU, it refuses tensors of the CPU
    for split in COUNTS:
        tasks = domain.sample_tasks(3, Stream(0, "meta"), split)  # type: ignore[arg-type]
        assert {value.device.type for value in (*tasks.values(), *domain.data(tasks, "query")[:2])} == {"meta"}
    assert domain.sample_images(4, Stream(0, "meta"), "train", 2)["labels"].device.type == "meta"


def test_pictures_of_a_class_are_equally_likely(root: Path) -> None:
    tasks = domain_of(root).sample_tasks(4000, Stream(0), "train", num_query=2)
    classes, numbers = tasks["classes"], tasks["support_images"][..., 0]
    for name, count in COUNTS["train"].items():
        shares = torch.bincount(numbers[classes == PLACES.index(f"train/{name}")], minlength=9) / 2000
        assert (shares[:count] - 1 / count).abs().max() < 0.05
        assert shares[count:].sum() == 0


def test_a_task_depends_neither_on_how_many_are_drawn_nor_on_the_run(root: Path) -> None:
    few, many, other = (domain_of(root, rotate=True).sample_tasks(count, Stream(5)) for count in (2, 9, 2))
    for name, value in few.items():
        assert torch.equal(value, take(many, 0, 2)[name])
        assert torch.equal(value, other[name])


def test_equal_classes_are_drawn_as_ever_and_beside_an_unequal_one_too(tmp_path: Path) -> None:
    """The largest class is as large as the others were, so every draw that has no small class is the same."""
    make(tmp_path / "equal", {"train": dict.fromkeys("abcd", 6), "test": dict.fromkeys("ef", 6)})
    make(tmp_path / "unequal", {"train": dict.fromkeys("abcd", 6), "test": {"e": 6, "f": 5}})
    equal, unequal = (domain_of(tmp_path, folder=name) for name in ("equal", "unequal"))
    assert (equal.counts, unequal.counts) == (None, [6, 5, 6, 6, 6, 6])
    expected, found = (domain.sample_tasks(50, Stream(1), num_query=5) for domain in (equal, unequal))
    for name, value in expected.items():
        assert torch.equal(value, found[name])
    for role in ("support", "query"):
        assert torch.equal(equal.data(expected, role).x, unequal.data(found, role).x)


def test_turned_pictures_are_quarter_turns(tmp_path: Path) -> None:
    for split, classes in COUNTS.items():
        for name, count in classes.items():
            (tmp_path / "own" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = Stream(hash((ord(name), number))).integers((4, 4), 256).to(torch.uint8)
                Image.fromarray(pixels.numpy()).save(tmp_path / "own" / split / name / f"{number}.png")
    upright, turned = (domain_of(tmp_path, pixels="grey", rotate=rotate) for rotate in (False, True))
    assert turned.in_shape == (4, 4, 1)
    tasks = turned.sample_tasks(20, Stream(0))
    plain, x = upright.data(tasks, "query").x, turned.data(tasks, "query").x
    for task in range(20):
        for way in range(2):
            assert torch.equal(x[task, way], plain[task, way].rot90(int(tasks["rotations"][task, way]), (0, 1)))


def test_pictures_of_ordinary_classification_are_of_all_classes_and_none_twice(root: Path) -> None:
    domain = domain_of(root)
    tasks = domain.sample_images(16, Stream(0), "train", num_per_class=4)
    x = (domain.data(tasks, "support").x[0, :, 0, 0] * 255).round().int().tolist()
    assert len({(cls, number) for cls, number, _ in x}) == 16
    assert [chr(cls) for cls, _, _ in x] == ["abcd"[label] for label in tasks["labels"][0].tolist()]
    with pytest.raises(MamlError, match="drawn from 5 images of each class, but train/a has 4 images, train/d has 4"):
        domain.sample_images(16, Stream(0), "train", num_per_class=5)


def test_too_few_pictures_or_classes_are_named(root: Path) -> None:
    with pytest.raises(
        MamlError, match=r"num_shots=3 plus num_query=2 is 5, but train/a has 4 images, train/d has 4 im"
    ):
        domain_of(root, num_shots=3, num_query=2)
    domain = domain_of(root, num_query=3)
    with pytest.raises(
        MamlError, match=r"num_shots=1 plus num_query=3 is 4, but test/g has 2 images, test/i has 3 imag"
    ):
        domain.sample_tasks(1, Stream(0), "test")
    with pytest.raises(MamlError, match=r"num_ways=3, but the val split has 2 classes; lower domain\.num_ways"):
        domain_of(root, num_ways=3).sample_tasks(1, Stream(0), "val")
    with pytest.raises(MamlError, match=r"num_ways=9, but the train split has \d classes; lower domain\.num_ways"):
        domain_of(root, num_ways=9)
    with pytest.raises(MamlError, match=r"domain\.image_size=\[4,6\] is not square"):
        domain_of(root, rotate=True, image_size=(4, 6))
    assert domain_of(root, image_size=(4, 6)).in_shape == (4, 6, 3)


def test_folder_without_validation_trains_and_says_so_if_asked(root: Path) -> None:
    for path in sorted((root / "own" / "val").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (root / "own" / "val").rmdir()
    domain = domain_of(root)
    assert not domain.has_validation
    with pytest.raises(MamlError, match="this data set has no val classes, only train and test"):
        domain.sample_tasks(1, Stream(0), "val")


def test_one_class_is_refused_because_every_answer_would_be_right(root: Path) -> None:
    words = ["domain=image_folder", "domain.folder=own", f"data_dir={root}", "model=conv4", "evaluation=accuracy"]
    with pytest.raises(MamlError, match="num_ways=1: input should be greater than or equal to 2"):
        compose([*words, "evaluation.num_steps=1", "domain.num_ways=1"])


def test_without_data_the_facts_are_the_same(root: Path) -> None:
    options = {"num_ways": 2, "num_shots": 1, "num_query": 3, "folder": "own", "pixels": "grey", "image_size": [5, 6]}
    part = {"_target_": "maml.domain.image_folder.ImageFolder", "data_dir": str(root), "cache_dir": str(root)} | options
    bare: Any = build_without_data(part)
    assert not list(root.glob("*.safetensors"))
    full = domain_of(root, **{**options, "image_size": (5, 6)})
    for attribute in ("in_shape", "out_dim", "num_shots", "num_query", "scale", "rotate", "workload"):
        assert getattr(bare, attribute) == getattr(full, attribute)
    assert len(bare.splits["train"]) == 4
    nowhere: Any = build_without_data(part | {"data_dir": "nowhere"})
    assert nowhere.in_shape == (5, 6, 1)


# --- Omniglot, written out as folders ---

CHARACTERS: dict[Split, range] = {"train": range(0, 60, 5), "val": range(100, 106), "test": range(1000, 1007)}


class FewOmniglot(Omniglot):
    """Omniglot with a few of its characters."""

    def load(self, data_dir: Path, cache_dir: Path) -> tuple[ImageSet, Splits]:
        data = load_omniglot(data_dir, cache_dir)
        return data, {split: torch.tensor([*numbers]) for split, numbers in CHARACTERS.items()}


def test_digest_tells_pictures_and_splits_apart(tmp_path: Path) -> None:
    make(tmp_path, {"own": dict.fromkeys("abcdefgh", 4)})
    digests = [
        domain_of(tmp_path, split=split).data_digest for split in ([0.5, 0, 0.5], [0.5, 0, 0.5], [0.75, 0, 0.25])
    ]
    assert digests[0] == digests[1] != digests[2]
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "own" / "a" / "0.png")
    assert domain_of(tmp_path, split=[0.5, 0, 0.5]).data_digest not in digests


@pytest.fixture(scope="module")
def omniglot_folders(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    """A data_dir with a few characters of Omniglot, each in a folder, as the zips hold them."""
    data_dir = Path(os.environ["MAML_DATA"])
    zips = {half: data_dir / "omniglot" / f"images_{half}.zip" for half in ("background", "evaluation")}
    if not all(path.exists() for path in zips.values()):
        pytest.skip("no zips of Omniglot at MAML_DATA")
    classes = load_omniglot(data_dir, cache_dir).classes
    root = tmp_path_factory.mktemp("folders")
    for half, path in zips.items():
        with ZipFile(path) as archive:
            members = [name for name in archive.namelist() if name.endswith(".png")]
            for split, numbers in CHARACTERS.items():
                for number in numbers:
                    for name in members:
                        if name.startswith(f"images_{half}/{classes[number]}/"):
                            file = root / "characters" / split / f"{number:04d}" / name.rpartition("/")[2]
                            file.parent.mkdir(parents=True, exist_ok=True)
                            file.write_bytes(archive.read(name))
    return root


def test_omniglot_as_folders_trains_to_the_same_numbers(omniglot_folders: Path, cache_dir: Path) -> None:
    options: dict[str, Any] = {"num_ways": 5, "num_shots": 2, "num_query": 3, "cache_dir": str(cache_dir)}
    domains = [
        FewOmniglot(data_dir=os.environ["MAML_DATA"], **options),
        ImageFolder(
            data_dir=str(omniglot_folders), folder="characters", pixels="drawing", image_size=28, rotate=True, **options
        ),
    ]
    trained = []
    for domain in domains:
        algorithm = algorithms.build_from(
            MAML, domain, Conv4((28, 28, 1), 5, num_filters=4), SGD(0.4, 1, order=2, adapt=["*"])
        )
        losses = [
            algorithms.step(algorithm, algorithm.sample_tasks(2, Stream(7).child(number)))["loss"]
            for number in range(3)
        ]
        test = domain.data(domain.sample_tasks(3, Stream(0), "test"), "query")
        trained.append((torch.stack(losses), test.x, *algorithm.theta.values()))
    assert all(isinstance(one, Tensor) and torch.equal(one, other) for one, other in zip(*trained, strict=True))


def test_own_drawings_train_and_are_recognised_by_the_loaded_network(tiny: TinyRuns, root: Path) -> None:
    overrides = [
        "+experiment=own_drawings",
        "num_iterations=3",
        "model.num_filters=8",
        "log_every=1",
        "evaluation.num_tasks=3",
        "hardware=cpu",
        "hardware.num_threads=1",
    ]
    network = maml.load(TinyRuns(tiny.runs_dir, tiny.cache_dir).run(*overrides))
    files = sorted(Path("examples/drawings/test").glob("*/1.png"))
    names = [file.parent.name for file in files]
    predictor = network.adapt(network.read(files), names)
    assert predictor.classes == names == ["heart", "house", "star", "tree", "wave"]
    assert set(predictor(network.read(files))) <= set(names)
    domain: ImageFolder = build(TinyRuns(tiny.runs_dir, tiny.cache_dir).config(*overrides).domain)
    first = domain.images[0, domain.class_starts[0]].reshape(28, 28, 1)
    assert domain.class_names[0] == "test/heart"
    assert torch.equal(network.read(files[:1])[0], first.float())
