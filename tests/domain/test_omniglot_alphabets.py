"""Omniglot as Koch et al. used it: alphabets, drawers, and distorted drawings."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from maml.data.omniglot import ALPHABETS
from maml.domain.base import without_data
from maml.domain.omniglot_alphabets import OmniglotAlphabets, draw_maps, warp
from maml.errors import MamlError
from maml.seeding import Stream
from maml.types import Tasks

DATA = os.environ["MAML_DATA"]

DRAWERS = {"train": range(12), "val": range(12, 16), "test": range(16, 20)}


@pytest.fixture(scope="module")
def domain(cache_dir: Path) -> OmniglotAlphabets:
    if not (Path(DATA) / "omniglot").is_dir():
        pytest.skip("the Omniglot files are not at MAML_DATA")
    return OmniglotAlphabets(20, 1, DATA, str(cache_dir), image_size=28)


def alphabets_of(domain: OmniglotAlphabets, classes: Tensor) -> set[str]:
    return {domain.class_names[number].partition("/")[0] for number in classes.flatten().tolist()}


def test_splits_have_whole_alphabets_of_their_own(domain: OmniglotAlphabets) -> None:
    found = {split: alphabets_of(domain, classes) for split, classes in domain.splits.items()}
    assert found["train"] == set(ALPHABETS["images_background"]) and len(domain.splits["train"]) == 964
    assert found["val"] | found["test"] == set(ALPHABETS["images_evaluation"])
    assert len(found["val"]) == len(found["test"]) == 10 and not found["val"] & found["test"]
    assert max(found["val"]) < min(found["test"])


def test_number_of_training_classes_is_known_without_data() -> None:
    with without_data():
        assert OmniglotAlphabets(20, 1, "nowhere", "nowhere").num_train_classes == 964


@pytest.mark.parametrize("split", ["val", "test"])
def test_test_tasks_are_of_one_alphabet_and_between_drawers(domain: OmniglotAlphabets, split: str) -> None:
    tasks = domain.sample_tasks(200, Stream(0), split, 1, 2)  # type: ignore[arg-type]
    seen = set()
    for classes, support, query in zip(*(tasks[name] for name in tasks), strict=True):
        alphabet = alphabets_of(domain, classes)
        assert len(alphabet) == 1 and len(set(classes.tolist())) == 20
        seen |= alphabet
        drawers = torch.cat([support, query], 1)
        assert (drawers == drawers[0]).all(), "one drawer has drawn all characters"
        assert len(set(drawers[0].tolist())) == 3 and set(drawers[0].tolist()) <= set(DRAWERS[split])
    assert seen == alphabets_of(domain, domain.splits[split]), "all have 20 characters or more"  # type: ignore[index]


def test_training_tasks_mix_alphabets_and_have_the_first_twelve_drawers(domain: OmniglotAlphabets) -> None:
    tasks = domain.sample_tasks(50, Stream(0))
    assert min(len(alphabets_of(domain, classes)) for classes in tasks["classes"]) > 5
    drawers = torch.cat([tasks["support_images"], tasks["query_images"]], 2)
    assert set(drawers.flatten().tolist()) == set(DRAWERS["train"])
    assert (drawers[..., 0] != drawers[..., 1]).all()


def test_only_training_drawings_are_distorted(domain: OmniglotAlphabets, cache_dir: Path) -> None:
    plain = OmniglotAlphabets(20, 1, DATA, str(cache_dir), image_size=28, distort=False)

    def images(of: OmniglotAlphabets, tasks: Tasks) -> Tensor:
        return torch.cat([of.data(tasks, role).x for role in ("support", "query")])

    for split in ("train", "test"):
        tasks, undistorted = (each.sample_tasks(3, Stream(1), split) for each in (domain, plain))
        assert torch.equal(tasks["support_images"], undistorted["support_images"])
        share = (images(domain, tasks) != images(plain, undistorted)).flatten(2).any(2).float().mean()
        assert share > 0.9 if split == "train" else share == 0


def test_what_no_alphabet_or_drawer_can_give_is_refused(domain: OmniglotAlphabets, cache_dir: Path) -> None:
    with pytest.raises(MamlError, match="num_ways=48, but the largest alphabet of the test split has 47"):
        domain.with_ways(48).sample_tasks(1, Stream(0), "test", 1, 1)
    with pytest.raises(MamlError, match="num_shots=3 plus num_query=2 is 5, but there are 4 images"):
        domain.sample_tasks(1, Stream(0), "test", 3, 2)
    with pytest.raises(MamlError, match="is 13, but there are 12 images"):
        OmniglotAlphabets(20, 12, DATA, str(cache_dir), num_query=1, image_size=28)


def test_maps_leave_out_each_part_in_half_of_the_drawings_and_keep_their_bounds() -> None:
    maps = draw_maps(Stream(0), (4000,), 105)
    forward = torch.linalg.inv(maps[:, :, :2])
    moved = -(forward @ maps[:, :, 2:]).squeeze(2) * 105 / 2  # in pixels
    assert moved.abs().max() == pytest.approx(2, abs=0.01)
    assert (moved.abs() < 1e-4).float().mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.03)
    assert (forward - torch.eye(2)).abs().flatten(1).amax(1).lt(1e-6).float().mean() == pytest.approx(2**-5, abs=0.01)
    determinants = torch.linalg.det(forward)  # scales, times 1 - the product of the shears
    assert determinants.min() >= 0.64 * 0.91 and determinants.max() <= 1.44 * 1.09


def test_pixels_go_where_the_map_says() -> None:
    image = torch.zeros(1, 1, 28, 28)
    image[0, 0, 3, 5] = 1

    def place(back: list[list[float]]) -> tuple[int, int]:
        row, column = divmod(int(warp(image, torch.tensor([[back]]).float()).argmax()), 28)
        return row, column

    pixel = 2 / 28
    assert place([[1, 0, 0], [0, 1, 0]]) == (3, 5)
    assert place([[1, 0, -2 * pixel], [0, 1, -1 * pixel]]) == (4, 7), "moved by 2 to the right and 1 down"
    assert place([[0, -1, 0], [1, 0, 0]]) == (27 - 5, 3), "turned by a quarter to the left"
