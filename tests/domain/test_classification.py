"""Few-shot classification tasks on synthetic images whose pixels encode their class and number."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from maml.data.cache import ImageSet
from maml.domain.base import Role, without_data
from maml.domain.classification import FewShotClassification, Splits, accuracy, ways_of
from maml.errors import MamlError
from maml.model.base import Model
from maml.seeding import Stream
from maml.types import Examples, Params, Split, take

NUM_CLASSES, NUM_IMAGES, SIZE = 12, 7, 3
SPLITS: dict[Split, Tensor] = {
    "train": torch.arange(6),
    "val": torch.tensor([6, 8, 10]),
    "test": torch.tensor([7, 9, 11]),
}


def make_domain(
    images: Tensor, num_ways: int, num_shots: int, num_query: int | None, **facts: Any
) -> FewShotClassification:
    """Returns a domain over images, ``(classes, images per class, H, W[, C])``; ``facts`` are its class attributes."""
    shape = tuple(images.shape[2:]) if images.dim() == 5 else (*images.shape[2:], 1)

    def load(self: FewShotClassification, data_dir: Path, cache_dir: Path) -> tuple[ImageSet, Splits]:
        return ImageSet(images, [], ""), SPLITS

    facts = {"in_shape": shape, "num_train_classes": len(SPLITS["train"]), "load": load} | facts
    kind: type[FewShotClassification] = type("MadeUp", (FewShotClassification,), facts)
    return kind(num_ways, num_shots, data_dir="", cache_dir="", num_query=num_query)


def marked_domain(
    num_ways: int = 3, num_shots: int = 2, num_query: int | None = None, **options: Any
) -> FewShotClassification:
    """Returns a domain of 3x3 images: the first pixel is the class, the second the image's number, the last is 1."""
    images = torch.zeros(NUM_CLASSES, NUM_IMAGES, SIZE, SIZE, dtype=torch.uint8)
    images[:, :, 0, 0] = torch.arange(NUM_CLASSES).unsqueeze(1)
    images[:, :, 0, 1] = torch.arange(NUM_IMAGES)
    images[:, :, 2, 2] = 1
    return make_domain(images, num_ways, num_shots, num_query, **{"scale": 1.0, "rotate": False} | options)


@pytest.mark.parametrize("role", ["support", "query"])
def test_images_come_in_blocks_of_one_of_each_class(role: Role) -> None:
    domain = marked_domain(num_query=4)
    tasks = domain.sample_tasks(5, Stream(0))
    x, y, num_shots = domain.data(tasks, role)
    blocks = 2 if role == "support" else 4
    assert x.shape == (5, blocks * 3, SIZE, SIZE, 1)
    assert (y.shape, num_shots) == ((5, blocks * 3), 2)
    for task in range(5):
        for block in range(blocks):
            for label in range(3):
                image, number = x[task, 3 * block + label, :, :, 0], tasks[f"{role}_images"][task, label, block]
                assert y[task, 3 * block + label] == label
                assert image[0, :2].tolist() == [tasks["classes"][task, label], number]


def test_each_split_has_its_own_classes_and_no_image_is_drawn_twice() -> None:
    domain = marked_domain(num_query=3)
    for split, classes in SPLITS.items():
        tasks = domain.sample_tasks(200, Stream(0), split)
        assert set(tasks["classes"].flatten().tolist()) == set(classes.tolist())
        images = torch.cat([tasks["support_images"], tasks["query_images"]], dim=-1)
        assert set(images.flatten().tolist()) == set(range(NUM_IMAGES))
        for task in range(200):
            assert len(set(tasks["classes"][task].tolist())) == 3
            assert all(len(set(row)) == 5 for row in images[task].tolist())


def test_labels_are_reshuffled_in_every_task() -> None:
    """Each class gets each label equally often, so a label says nothing about the class."""
    classes = marked_domain().sample_tasks(3000, Stream(0))["classes"]
    counts = Counter((place, cls) for row in classes.tolist() for place, cls in enumerate(row))
    assert len(counts) == 3 * 6
    assert all(abs(count - 500) < 5 * math.sqrt(500) for count in counts.values())


def test_a_class_is_turned_as_a_whole_by_its_own_quarter_turns() -> None:
    upright, turned = marked_domain(), marked_domain(rotate=True)
    tasks = turned.sample_tasks(40, Stream(0))
    assert set(tasks["rotations"].flatten().tolist()) == {0, 1, 2, 3}
    for role in ("support", "query"):
        plain, x = upright.data(tasks, role).x, turned.data(tasks, role).x
        for task in range(40):
            for i in range(x.shape[1]):
                turns = int(tasks["rotations"][task, i % 3])
                assert torch.equal(x[task, i], plain[task, i].rot90(turns, (0, 1)))


def test_turned_classes_of_unequal_size_have_the_images_of_their_class() -> None:
    counts = [4, 6, 5]
    images = torch.zeros(1, sum(counts), SIZE, SIZE, dtype=torch.uint8)
    images[0, :, 0, 0] = torch.repeat_interleave(torch.arange(3), torch.tensor(counts)) + 1
    images[0, :, 0, 1] = torch.cat([torch.arange(count) for count in counts])

    def load(self: FewShotClassification, data_dir: Path, cache_dir: Path) -> tuple[ImageSet, Splits]:
        return ImageSet(images, ["a", "b", "c"], "", counts), {"train": torch.arange(12)}

    facts = {"in_shape": (SIZE, SIZE, 1), "scale": 1.0, "num_train_classes": 12, "has_turned_classes": True}
    kind: type[FewShotClassification] = type("Turned", (FewShotClassification,), facts | {"load": load})
    domain = kind(5, 2, data_dir="", cache_dir="")
    tasks = domain.sample_tasks(50, Stream(0))
    assert set(tasks["classes"].flatten().tolist()) == set(range(12))
    x = domain.data(tasks, "query").x
    for task in range(50):
        for way, cls in enumerate(tasks["classes"][task].tolist()):
            upright, number = x[task, way, :, :, 0].rot90(-(cls // 3)), tasks["query_images"][task, way, 0]
            assert upright.tolist()[0][:2] == [cls % 3 + 1, number]
    with pytest.raises(MamlError, match="a/rot000 has 4 images, a/rot090 has 4 images"):
        domain.sample_tasks(1, Stream(0), num_shots=3, num_query=2)


def test_the_other_draws_of_a_task_do_not_depend_on_whether_it_is_turned() -> None:
    plain, turned = (marked_domain(rotate=rotate).sample_tasks(4, Stream(3)) for rotate in (False, True))
    assert all(torch.equal(value, turned[name]) for name, value in plain.items())


def test_pixels_are_divided_by_the_scale_and_colours_kept() -> None:
    images = Stream(0).integers((NUM_CLASSES, NUM_IMAGES, 2, 3, 3), 256).to(torch.uint8)
    domain = make_domain(images, 2, 1, None, scale=255.0)
    tasks = domain.sample_tasks(3, Stream(1))
    x = domain.data(tasks, "support").x
    assert domain.in_shape == (2, 3, 3)
    for task in range(3):
        for way in range(2):
            drawn = images[tasks["classes"][task, way], tasks["support_images"][task, way, 0]]
            torch.testing.assert_close(x[task, way], drawn.float() / 255)


def test_a_task_does_not_depend_on_how_many_are_drawn() -> None:
    few, many = (marked_domain(rotate=True).sample_tasks(count, Stream(5), "val") for count in (2, 9))
    assert all(torch.equal(value, take(many, 0, 2)[name]) for name, value in few.items())


@pytest.mark.parametrize(
    ("own_query", "num_shots", "num_query", "expected"),
    [
        (None, None, None, (2, 2)),
        (4, None, None, (2, 4)),
        (4, 1, None, (1, 1)),
        (4, 3, 2, (3, 2)),
        (4, None, 5, (2, 5)),
    ],
)
def test_k_asked_for_brings_as_many_query_images_unless_they_are_asked_for_too(
    own_query: int | None, num_shots: int | None, num_query: int | None, expected: tuple[int, int]
) -> None:
    domain = marked_domain(num_query=own_query)
    tasks = domain.sample_tasks(1, Stream(0), "test", num_shots, num_query)
    assert tuple(tasks[f"{role}_images"].shape[-1] for role in ("support", "query")) == expected
    assert domain.data(tasks, "query").num_shots == expected[0]


def test_loss_is_the_cross_entropy_summed_and_divided_by_k() -> None:
    domain = marked_domain(num_shots=2)
    data = domain.data(domain.sample_tasks(2, Stream(0)), "support")
    outputs = Stream(1).uniform((2, 6, 3), -2.0, 2.0, dtype=torch.float64)
    losses, metrics = domain.loss(outputs, data)
    for task in range(2):
        total, right = 0.0, 0
        for scores, label in zip(outputs[task].tolist(), data.y[task].tolist(), strict=True):
            total -= math.log(math.exp(scores[label]) / sum(map(math.exp, scores)))
            right += scores[label] == max(scores)
        assert losses[task].item() == pytest.approx(total / 2, rel=1e-12)
        assert metrics["accuracy"][task].item() == pytest.approx(right / 6)


class Centred(Model):
    """Predicts 1 for an image whose class number is above the mean class number of the reference images, else 0."""

    def init(self, stream: Stream) -> Params:
        return {}

    def __call__(self, params: Params, x: Tensor, num_reference: int | None = None) -> Tensor:
        values = x[..., 0, 0, 0]
        above = values - values[:, :num_reference].mean(1, keepdim=True)
        return torch.stack([-above, above], dim=-1)


def test_accuracies_differ_in_which_images_give_the_statistics() -> None:
    def examples(values: list[float], labels: list[int]) -> Examples:
        return Examples(torch.tensor(values).reshape(1, -1, 1, 1, 1), torch.tensor([labels]), num_shots=1)

    support, query = examples([0.0, 4.0], [0, 1]), examples([1.0, 3.0, 5.0, 7.0], [0, 1, 1, 1])
    measured = marked_domain(num_ways=2).measure(Centred(), {}, support, query, step=1)
    assert measured["accuracy_inductive"].tolist() == [1.0], "above the support images' mean of 2 are 3, 5 and 7"
    assert measured["accuracy_transductive"].tolist() == [0.75], "above the query images' mean of 4 are 5 and 7"


def test_outputs_that_are_not_numbers_are_no_answer() -> None:
    outputs = torch.tensor([[[2.0, 1.0], [-torch.inf, 0.0]], [[torch.nan, 1.0], [0.0, 1.0]]])
    found = accuracy(outputs, torch.tensor([[0, 0], [0, 1]]))
    torch.testing.assert_close(found, torch.tensor([0.5, torch.nan]), equal_nan=True)


@pytest.mark.parametrize("num_ways", [2, 3])
def test_tasks_of_other_ways_are_those_of_a_domain_with_these_ways(num_ways: int) -> None:
    domain = marked_domain(num_ways=3, rotate=True)
    other, expected = domain.with_ways(num_ways), marked_domain(num_ways=num_ways, rotate=True)
    assert (domain.num_ways, other.num_ways, other.out_dim) == (3, num_ways, 3), "the network's outputs stay"
    tasks, same = (each.sample_tasks(4, Stream(2), "test", 1, 3) for each in (other, expected))
    assert all(torch.equal(tasks[name], value) for name, value in same.items())
    support = domain.data(tasks, "support")  # the data of tasks follows the tasks, not the domain
    assert support.y.tolist() == [[*range(num_ways)]] * 4
    assert ways_of(support) == num_ways


def test_prediction_is_a_class_of_the_task() -> None:
    class Third(Centred):
        """Has a third output, which is the largest."""

        def __call__(self, params: Params, x: Tensor, num_reference: int | None = None) -> Tensor:
            outputs = super().__call__(params, x, num_reference)
            return torch.cat([outputs, outputs.amax(-1, keepdim=True) + 1], dim=-1)

    x, y = torch.tensor([0.0, 4.0]).reshape(1, -1, 1, 1, 1), torch.tensor([[0, 1]])
    data = Examples(x, y, num_shots=1)
    measured = marked_domain(num_ways=3).measure(Third(), {}, data, data, step=0)
    assert {name: value.tolist() for name, value in measured.items()} == {name: [1.0] for name in measured}


def test_images_of_ordinary_classification_are_of_all_classes_and_none_twice() -> None:
    domain = marked_domain(rotate=True)
    tasks = domain.sample_images(20, Stream(0), "train", num_per_class=4)
    x = domain.data(tasks, "support").x
    assert x.shape == (1, 20, SIZE, SIZE, 1)
    drawn = list(zip(tasks["classes"][0].tolist(), tasks["support_images"][0, :, 0].tolist(), strict=True))
    assert len(set(drawn)) == 20
    assert max(Counter(cls for cls, _ in drawn).values()) <= 4
    assert SPLITS["train"][tasks["labels"][0]].tolist() == tasks["classes"][0].tolist()
    for image, (cls, number), turns in zip(x[0, ..., 0], drawn, tasks["rotations"][0].tolist(), strict=True):
        assert image.rot90(-turns).tolist()[0][:2] == [cls, number]
    labels = domain.sample_images(9, Stream(0), "test", 3)["labels"][0].tolist()
    assert sorted(labels) == [0, 0, 0, 1, 1, 1, 2, 2, 2], "numbered within the split"


def test_more_than_there_is_is_refused() -> None:
    with pytest.raises(MamlError, match=r"num_ways=4, but the val split has 3 classes; lower domain\.num_ways"):
        marked_domain(num_ways=4).sample_tasks(1, Stream(0), "val")
    with pytest.raises(MamlError, match=r"num_ways=99, but the train split has \d+ classes; lower domain\.num_ways"):
        marked_domain(num_ways=99)
    with pytest.raises(MamlError, match="num_shots=4 plus num_query=4 is 8, but there are 7 images of each class"):
        marked_domain(num_shots=4)
    with pytest.raises(MamlError, match="num_shots=2 plus num_query=6 is 8, but there are 7 images of each class"):
        marked_domain().sample_tasks(1, Stream(0), num_query=6)
    with pytest.raises(MamlError, match="10 images cannot be drawn from 3 each of 3 classes; lower it to 9"):
        marked_domain().sample_images(10, Stream(0), "val", 3)


class Grey(FewShotClassification):
    """Grey synthetic images; records the folders that `load` is given."""

    in_shape = (2, 3, 1)
    scale = 10.0
    num_train_classes = 6
    places: tuple[Path, Path] | None = None

    def load(self, data_dir: Path, cache_dir: Path) -> tuple[ImageSet, Splits]:
        type(self).places = (data_dir, cache_dir)
        return ImageSet(torch.full((NUM_CLASSES, NUM_IMAGES, 2, 3), 10, dtype=torch.uint8), [], ""), SPLITS


def grey_arguments(num_shots: int = 2) -> dict[str, Any]:
    return {"num_ways": 3, "num_shots": num_shots, "data_dir": "data", "cache_dir": "cache"}


def test_image_set_is_a_class_that_states_its_facts() -> None:
    domain = Grey(**grey_arguments())
    assert Grey.places == (Path("data"), Path("cache"))
    tasks = domain.sample_tasks(4, Stream(0))
    data = domain.data(tasks, "support")
    assert data.x.shape == (4, 6, 2, 3, 1)
    assert (data.x == 1).all()
    assert "rotations" not in tasks


def test_without_data_nothing_is_loaded_and_the_facts_are_the_same() -> None:
    with_images = Grey(**grey_arguments())
    Grey.places = None
    with without_data():
        bare = Grey(**grey_arguments())
        Grey(**grey_arguments(num_shots=100))  # without data the number of images is unknown
    assert Grey.places is None
    for attribute in ("in_shape", "out_dim", "num_shots", "scale", "rotate", "workload"):
        assert getattr(bare, attribute) == getattr(with_images, attribute)
    assert len(bare.splits["train"]) == 6


def test_images_of_another_shape_than_stated_are_an_error() -> None:
    class Wrong(Grey):
        in_shape = (3, 3, 1)

    with pytest.raises(AssertionError, match=r"Wrong.in_shape is not that of its images"):
        Wrong(**grey_arguments())
