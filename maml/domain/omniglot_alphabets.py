"""Omniglot as Koch et al. (2015) used it: a test within an alphabet and between two drawers, on large drawings."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from torch import Tensor

from maml.data.cache import ImageSet
from maml.data.omniglot import ALPHABETS, load_omniglot
from maml.domain.base import Role
from maml.domain.classification import Splits, images_asked_for, ways_remedy
from maml.domain.draw import choice_of_each
from maml.domain.omniglot import Omniglot
from maml.errors import MamlError
from maml.seeding import Stream
from maml.types import Count, Examples, FilePath, Split, Tasks

_LARGEST_ANGLE, _LARGEST_SHEAR, _LARGEST_SHIFT = math.radians(10), 0.3, 2  # the shift is in pixels
_SCALES = 0.8, 1.2


class _Part(NamedTuple):
    """One split.

    Attributes:
        half: the folder of its alphabets.
        first_alphabet: number of its first alphabet in that folder, in the order of names.
        num_alphabets: number of its alphabets.
        first_drawer: number of its first drawer.
        num_drawers: number of its drawers.
    """

    half: str
    first_alphabet: int
    num_alphabets: int
    first_drawer: int
    num_drawers: int


_PARTS: dict[Split, _Part] = {
    "train": _Part("images_background", 0, 30, 0, 12),
    "val": _Part("images_evaluation", 0, 10, 12, 4),
    "test": _Part("images_evaluation", 10, 10, 16, 4),
}


class OmniglotAlphabets(Omniglot):
    """N characters of one alphabet: support drawings by some drawers, query drawings by others.

    A training task has N characters of any alphabets, so that pairs of different characters need not be of the same
    one. Its drawings are distorted: turned by up to 10 degrees, sheared by up to 0.3, scaled by 0.8 to 1.2 and moved by
    up to 2 pixels, each part in half of the drawings.

    Departure: Koch et al. made 8 distorted copies of each pair once; here every drawing is distorted anew.

    Departure: they do not list their alphabets, 30 for training and 10 each for validation and test. Here training has
    the 30 of ``images_background``; the others, in the order of their names, have the first and the last 10 of
    ``images_evaluation``. Their numbers of drawers, 12, 4 and 4, are kept: drawers 1 to 12, 13 to 16 and 17 to 20.

    Args:
        num_ways: N, number of characters in a task.
        num_shots: K, number of support drawings per character, each by another drawer.
        data_dir: folder of the data sets.
        cache_dir: folder in which the tensor of drawings is cached.
        num_query: number of query drawings per character in training; None is K.
        image_size: height and width of the drawings; the originals have 105.
        distort: whether training distorts drawings.

    Raises:
        MamlError: if files are missing or damaged, or there are too few characters or drawers.
    """

    def __init__(
        self,
        num_ways: Annotated[int, Ge(2)],
        num_shots: Count,
        data_dir: FilePath,
        cache_dir: FilePath,
        num_query: Count | None = None,
        image_size: Annotated[int, Ge(1), Le(105)] = 105,
        distort: bool = True,
    ) -> None:
        self.in_shape, self.distort = (image_size, image_size, 1), distort
        super().__init__(num_ways, num_shots, data_dir, cache_dir, num_query, rotations="none")
        self.smallest = {split: part.num_drawers for split, part in _PARTS.items() if split in self.splits}
        self._check_images("train", *images_asked_for(num_shots, num_query or num_shots))

    def _blank(self) -> tuple[ImageSet, Splits]:
        self.num_train_classes = sum(_sizes(_PARTS["train"]))
        return super()._blank()

    def load(self, data_dir: Path, cache_dir: Path) -> tuple[ImageSet, Splits]:
        data = load_omniglot(data_dir, cache_dir, size=self.in_shape[0])
        # The characters of an alphabet follow each other.
        names = [name.partition("/")[0] for name in data.classes]
        self.alphabets = {split: [names.index(name) for name in _alphabets(part)] for split, part in _PARTS.items()}
        members: dict[Split, set[str]] = {split: set(_alphabets(part)) for split, part in _PARTS.items()}
        splits = {
            split: torch.tensor([number for number, name in enumerate(names) if name in chosen])
            for split, chosen in members.items()
        }
        return data, splits

    def _draw_images(self, classes: Tensor, count: int, stream: Stream) -> Tensor:
        """Draws training drawings. The number of a drawing is that of its drawer."""
        return stream.choice(classes.shape, _PARTS["train"].num_drawers, count)

    def draw_tasks(self, num_tasks: int, stream: Stream, split: Split, num_shots: int, num_query: int) -> Tasks:
        """Draws characters, drawers, and in training distortions.

        Raises:
            MamlError: if there are too few drawers, or no alphabet has enough characters.
        """
        if split == "train":
            tasks = super().draw_tasks(num_tasks, stream, split, num_shots, num_query)
            if self.distort:
                for role, count in (("support", num_shots), ("query", num_query)):
                    shape = (num_tasks, count * self.num_ways)
                    tasks[f"{role}_maps"] = draw_maps(stream.child("distortions").child(role), shape, self.in_shape[0])
            return tasks
        self._check_images(split, *images_asked_for(num_shots, num_query))
        part = _PARTS[split]
        known = zip(self.alphabets[split], _sizes(part), strict=True)
        large = [(start, size) for start, size in known if size >= self.num_ways]
        if not large:
            raise MamlError(
                f"num_ways={self.num_ways}, but the largest alphabet of the {split} split has {max(_sizes(part))} "
                f"characters; {ways_remedy(split)}"
            )
        starts, sizes = torch.tensor(large, device=stream.device).unbind(1)
        which = stream.child("alphabets").integers((num_tasks,), len(large))
        characters = choice_of_each(stream.child("classes"), sizes[which], max(_sizes(part)), self.num_ways)
        drawers = stream.child("drawers").choice((num_tasks, 1), part.num_drawers, num_shots + num_query)
        drawn = (part.first_drawer + drawers).expand(-1, self.num_ways, -1)
        support, query = drawn.split([num_shots, num_query], dim=-1)
        return {
            "classes": starts[which].unsqueeze(1) + characters,
            "support_images": support,
            "query_images": query,
        }

    def data(self, tasks: Tasks, role: Role, step: int = 0) -> Examples:
        examples = super().data(tasks, role, step)
        if f"{role}_maps" not in tasks:
            return examples
        return examples._replace(x=warp(examples.x.squeeze(-1), tasks[f"{role}_maps"]).unsqueeze(-1))


def _alphabets(part: _Part) -> list[str]:
    return sorted(ALPHABETS[part.half])[part.first_alphabet : part.first_alphabet + part.num_alphabets]


def _sizes(part: _Part) -> list[int]:
    return [ALPHABETS[part.half][name] for name in _alphabets(part)]


def draw_maps(stream: Stream, shape: tuple[int, ...], size: int) -> Tensor:
    """Draws affine maps as `warp` takes them, ``(*shape, 2, 3)``; each part is left out with probability 1/2.

    Args:
        stream: the source of randomness.
        shape: number of maps in each dimension.
        size: height and width of the images, in pixels.
    """

    def part(name: str, count: int, low: float, high: float, neutral: float) -> Any:
        own = stream.child(name)
        values = own.uniform((*shape, count), low, high)
        is_used = own.child("used").integers((*shape, count), 2) == 1
        return torch.where(is_used, values, neutral).unbind(-1)

    (angle,) = part("angle", 1, -_LARGEST_ANGLE, _LARGEST_ANGLE, 0)
    shear_x, shear_y = part("shear", 2, -_LARGEST_SHEAR, _LARGEST_SHEAR, 0)
    scale_x, scale_y = part("scale", 2, *_SCALES, 1)
    right, down = part("shift", 2, -2 * _LARGEST_SHIFT / size, 2 * _LARGEST_SHIFT / size, 0)  # the width is 2
    cos, sin = angle.cos(), angle.sin()
    one = torch.ones_like(angle)

    def matrix(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return torch.stack([torch.stack([a, b], -1), torch.stack([c, d], -1)], -2)

    # A point of the drawing is scaled, sheared, turned, and then moved. A pixel comes from where the inverse leads.
    forward = matrix(cos, -sin, sin, cos) @ matrix(one, shear_x, shear_y, one)
    forward = forward @ matrix(scale_x, torch.zeros_like(one), torch.zeros_like(one), scale_y)
    a, b, c, d = forward.flatten(-2).unbind(-1)
    back = matrix(d, -b, -c, a) / (a * d - b * c)[..., None, None]  # `inv` waits for the GPU, which a graph cannot
    return torch.cat([back, -back @ torch.stack([right, down], -1).unsqueeze(-1)], -1)


def warp(images: Tensor, maps: Tensor) -> Tensor:
    """Moves the pixels of images; values in between are interpolated, and paper comes in at the borders.

    Args:
        images: ``(T, S, H, W)`` with H = W.
        maps: where each pixel comes from, an affine map of (x, y), both from -1 to 1, ``(T, S, 2, 3)``.
    """
    flat = images.flatten(0, 1).unsqueeze(1)
    grid = F.affine_grid(maps.flatten(0, 1), list(flat.shape), align_corners=False)
    return F.grid_sample(flat, grid, align_corners=False).reshape(images.shape)
