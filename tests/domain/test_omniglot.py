"""Omniglot tasks on the real data, against docs/protocol.md#omniglot-tasks."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from maml.domain.base import without_data
from maml.domain.omniglot import Omniglot
from maml.errors import MamlError
from maml.model.conv4 import Conv4
from maml.seeding import Stream

MODEL = Conv4((28, 28, 1), 5, num_filters=4)
DATA = os.environ["MAML_DATA"]


@pytest.fixture(scope="module")
def make(cache_dir: Path) -> Callable[..., Omniglot]:
    if not (Path(DATA) / "omniglot").is_dir():
        pytest.skip("the Omniglot files are not at MAML_DATA")
    return lambda **options: Omniglot(
        **{"num_ways": 5, "num_shots": 1} | options, data_dir=DATA, cache_dir=str(cache_dir)
    )


def test_splits_are_disjoint_and_of_the_protocols_sizes(make: Callable[..., Omniglot]) -> None:
    splits = make().splits
    assert {name: len(classes) for name, classes in splits.items()} == {"train": 1100, "val": 100, "test": 423}
    assert sorted(torch.cat(list(splits.values())).tolist()) == list(range(1623))


def test_splits_never_change(make: Callable[..., Omniglot]) -> None:
    assert make().splits["test"][:5].tolist() == make(num_ways=20).splits["test"][:5].tolist()
    assert make().splits["test"].sum().item() == 341_484


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_tasks_draw_distinct_classes_of_their_split(make: Callable[..., Omniglot], split: str) -> None:
    domain = make(num_ways=20)
    classes = domain.sample_tasks(50, Stream(0), split)["classes"]  # type: ignore[arg-type]
    assert torch.isin(classes, domain.splits[split]).all()  # type: ignore[index]
    assert all(len(set(task)) == 20 for task in classes.tolist())


def test_support_and_query_share_no_drawing(make: Callable[..., Omniglot]) -> None:
    tasks = make(num_shots=5).sample_tasks(40, Stream(0))
    drawings = torch.cat([tasks["support_images"], tasks["query_images"]], dim=-1)
    assert drawings.shape == (40, 5, 10)
    assert all(len(set(cls)) == 10 for task in drawings.tolist() for cls in task)


def test_images_are_the_drawings_turned_by_their_class(make: Callable[..., Omniglot]) -> None:
    domain = make(num_shots=3)
    tasks = domain.sample_tasks(6, Stream(0))
    for role in ("support", "query"):
        data = domain.data(tasks, role)
        assert data.x.shape == (6, 15, 28, 28, 1)
        for task in range(6):
            for i, label in enumerate(data.y[task].tolist()):
                cls, drawing = tasks["classes"][task, label], tasks[f"{role}_images"][task, label, i // 5]
                image = domain.images[cls, drawing].reshape(28, 28).float()
                expected = torch.rot90(image, int(tasks["rotations"][task, label]))
                assert torch.equal(data.x[task, i, :, :, 0], expected)


def test_rotations_are_uniform_and_drawn_in_test_tasks_too(make: Callable[..., Omniglot]) -> None:
    rotations = make().sample_tasks(2000, Stream(0), "test")["rotations"]
    shares = torch.bincount(rotations.flatten(), minlength=4) / rotations.numel()
    assert (shares - 0.25).abs().max() < 0.02


def test_ink_is_one_and_paper_zero(make: Callable[..., Omniglot]) -> None:
    domain = make()
    x = domain.data(domain.sample_tasks(50, Stream(0)), "support").x
    assert set(x.unique().tolist()) == {0.0, 1.0}
    assert 0.02 < x.mean() < 0.3


def test_labels_are_balanced_and_name_positions_in_the_task(make: Callable[..., Omniglot]) -> None:
    domain = make(num_shots=2)
    y = domain.data(domain.sample_tasks(3, Stream(0)), "query").y
    assert y.tolist() == [[0, 1, 2, 3, 4] * 2] * 3


@pytest.mark.parametrize(("num_shots", "num_query", "expected"), [(None, None, 2), (1, None, 1), (1, 15, 15)])
def test_query_images_per_class_are_k_unless_asked(
    make: Callable[..., Omniglot], num_shots: int | None, num_query: int | None, expected: int
) -> None:
    tasks = make(num_shots=2).sample_tasks(1, Stream(0), "test", num_shots, num_query)
    assert tasks["query_images"].shape[-1] == expected


def test_loss_is_the_summed_cross_entropy_over_k(make: Callable[..., Omniglot]) -> None:
    domain = make(num_shots=4)
    data = domain.data(domain.sample_tasks(2, Stream(0)), "support")
    outputs = Stream(3).normal((2, 20, 5))
    losses, metrics = domain.loss(outputs, data)
    for task in range(2):
        total = sum(F.cross_entropy(outputs[task, i], data.y[task, i]) for i in range(20))
        assert losses[task].item() == pytest.approx(float(total) / 4, rel=1e-5)
        right = sum(int(outputs[task, i].argmax() == data.y[task, i]) for i in range(20))
        assert metrics["accuracy"][task].item() == pytest.approx(right / 20)


def test_inductive_accuracy_depends_on_no_other_query_image(make: Callable[..., Omniglot]) -> None:
    params = {name: value.unsqueeze(0) for name, value in MODEL.init(Stream(0)).items()}
    domain = make()
    tasks = domain.sample_tasks(1, Stream(1), "test", num_query=3)
    support, query = (domain.data(tasks, role) for role in ("support", "query"))
    joint = torch.cat([support.x, query.x], dim=1)
    together = MODEL(params, joint, num_reference=5)[:, 5:]
    alone = torch.cat(
        [MODEL(params, torch.cat([support.x, x.unsqueeze(1)], 1), 5)[:, 5:] for x in query.x.unbind(1)], 1
    )
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together, MODEL(params, query.x), rtol=1e-2)  # the transductive outputs differ


def test_more_images_than_there_are_drawings_is_refused(make: Callable[..., Omniglot]) -> None:
    with pytest.raises(MamlError, match="num_shots=15 plus num_query=15 is 30, but there are 20"):
        make(num_shots=15)
    with pytest.raises(MamlError, match="num_ways=101, but the val split has 100"):
        make(num_ways=101).sample_tasks(1, Stream(0), "val")
    with pytest.raises(MamlError, match="num_ways=1101, but the train split has 1100"):
        make(num_ways=1101)


@pytest.mark.parametrize(
    ("split", "rotations", "expected"),
    [
        ("vinyals", "task", {"train": 1028, "val": 172, "test": 423}),
        ("vinyals", "none", {"train": 1028, "val": 172, "test": 423}),
        ("vinyals", "classes", {"train": 4112, "val": 688, "test": 1692}),
        ("vinyals_trainval", "classes", {"train": 4800, "test": 1692}),
        ("vinyals", "train_classes", {"train": 4112, "val": 172, "test": 423}),
        ("shuffled", "classes", {"train": 4400, "val": 400, "test": 1692}),
    ],
)
def test_split_and_rotations_give_the_number_of_classes(
    make: Callable[..., Omniglot], split: str, rotations: str, expected: dict[str, int]
) -> None:
    options: Any = {"split": split, "rotations": rotations}
    domain = make(**options)
    assert {name: len(classes) for name, classes in domain.splits.items()} == expected
    assert domain.num_train_classes == expected["train"]
    assert domain.has_validation == ("val" in expected)
    everything = torch.cat(list(domain.splits.values()))
    assert len(everything.unique()) == len(everything)
    assert ("rotations" in domain.sample_tasks(1, Stream(0))) == (rotations == "task")
    with without_data():
        bare = Omniglot(num_ways=5, num_shots=1, data_dir="", cache_dir="", **options)
    assert len(bare.splits["train"]) == expected["train"]


@pytest.mark.parametrize("rotations", ["classes", "train_classes"])
def test_turned_copies_of_a_character_are_classes_of_its_split(make: Callable[..., Omniglot], rotations: str) -> None:
    upright, turned = (make(split="vinyals", rotations=each).splits for each in ("none", rotations))
    for name, classes in turned.items():
        copies = 4 if name == "train" or rotations == "classes" else 1
        assert sorted(classes.tolist()) == sorted(
            cls + 1623 * turns for cls in upright[name].tolist() for turns in range(copies)
        )


def test_images_of_a_turned_class_are_its_drawings_turned(make: Callable[..., Omniglot]) -> None:
    domain = make(num_shots=3, split="vinyals", rotations="classes")
    tasks = domain.sample_tasks(6, Stream(0), "test")
    assert set((tasks["classes"] // 1623).flatten().tolist()) == {0, 1, 2, 3}
    for role in ("support", "query"):
        data = domain.data(tasks, role)
        for task in range(6):
            for i, label in enumerate(data.y[task].tolist()):
                cls, drawing = int(tasks["classes"][task, label]), tasks[f"{role}_images"][task, label, i // 5]
                image = domain.images[cls % 1623, drawing].reshape(28, 28).float()
                assert torch.equal(data.x[task, i, :, :, 0], image.rot90(cls // 1623))


def test_drawings_of_turned_classes_are_stored_once_and_named_with_their_rotation(
    make: Callable[..., Omniglot],
) -> None:
    plain, turned = make(), make(rotations="classes")
    assert turned.images.shape == plain.images.shape
    names = [turned.class_names[cls] for cls in (0, 1623, 3 * 1623)]
    assert names == [f"{plain.class_names[0]}/rot{angle}" for angle in ("000", "090", "270")]


def test_ordinary_classification_has_the_turned_classes_of_training(make: Callable[..., Omniglot]) -> None:
    domain = make(split="vinyals", rotations="train_classes")
    tasks = domain.sample_images(500, Stream(0), "train", num_per_class=5)
    assert torch.equal(domain.splits["train"][tasks["labels"]], tasks["classes"])
    assert tasks["labels"].max() > 4000
    assert domain.data(tasks, "support").x.shape == (1, 500, 28, 28, 1)


def test_split_and_rotations_of_the_paper_are_the_defaults(make: Callable[..., Omniglot]) -> None:
    default, named = make(), make(split="shuffled", rotations="task")
    tasks, same = (domain.sample_tasks(3, Stream(0)) for domain in (default, named))
    assert all(torch.equal(value, same[name]) for name, value in tasks.items())
    assert tasks["classes"].sum().item() == 12_666
