"""Few-shot classification of a user's own pictures, which lie in one folder for each class (not in the paper)."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from maml.data.cache import ImageSet
from maml.data.image_folder import list_splits, load_image_folder
from maml.domain.classification import FewShotClassification, Splits
from maml.domain.draw import choice_of_each
from maml.errors import MamlError
from maml.seeding import Stream
from maml.types import Count, NonNegativeFloat


class ImageFolder(FewShotClassification):
    """N classes with K pictures each, from ``folder/{train,val,test}/<class>/*`` or ``folder/<class>/*``.

    Classes may have different numbers of pictures, of any size and any format that Pillow reads.

    Args:
        num_ways: N, number of classes in a task.
        num_shots: K, number of support pictures per class.
        data_dir: folder of the data sets.
        cache_dir: folder in which the tensor of resized pictures is cached.
        folder: folder of the pictures, within ``data_dir`` or with its full path.
        num_query: number of query pictures per class in training; None is K.
        split: None if the folder has folders ``train``, ``test`` and perhaps ``val``. Otherwise the shares of its
            classes for training, validation and test, or a csv file with the columns ``class`` and ``split`` (its path
            may be relative to the folder).
        pixels: ``rgb`` and ``grey`` are pixels from 0 to 1. ``drawing`` is for drawings dark on light, as in Omniglot:
            ink is 1 and paper is 0.
        image_size: height and width to which pictures are resized; a single number is both.
        rotate: whether every class of a task is turned by its own multiple of 90 degrees; images have to be square.

    Raises:
        MamlError: if the folder is not laid out like this, a picture cannot be read, a class has too few pictures, or
            the training split has too few classes.
    """

    def __init__(
        self,
        num_ways: Annotated[int, Ge(2)],
        num_shots: Count,
        data_dir: str,
        cache_dir: str,
        folder: str,
        num_query: Count | None = None,
        split: str | list[NonNegativeFloat] | None = None,
        pixels: Literal["rgb", "grey", "drawing"] = "rgb",
        image_size: Count | tuple[Count, Count] = 84,
        rotate: bool = False,
    ) -> None:
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if rotate and height != width:
            raise MamlError(
                f"domain.rotate=true turns images by 90 degrees, but domain.image_size=[{height},{width}] is not "
                "square; choose one number for both"
            )
        self.in_shape = (height, width, 3 if pixels == "rgb" else 1)
        self.scale = 1.0 if pixels == "drawing" else 255.0
        self.rotate = rotate
        self.root, self.split = Path(data_dir) / folder, split
        super().__init__(num_ways, num_shots, data_dir, cache_dir, num_query)

    def load(self, data_dir: Path, cache_dir: Path) -> tuple[ImageSet, Splits]:
        splits = list_splits(self.root, self.split)
        classes = {name: files for found in splits.values() for name, files in found.items()}
        data = load_image_folder(self.root, classes, cache_dir, self.in_shape, is_drawing=self.scale == 1)
        numbers = {name: number for number, name in enumerate(data.classes)}
        return data, {split: torch.tensor([numbers[name] for name in found]) for split, found in splits.items()}

    def _draw_images(self, classes: Tensor, count: int, stream: Stream) -> Tensor:
        if self.counts is None:  # the base class is slow for large classes
            return choice_of_each(stream, torch.full_like(classes, self.num_images), self.num_images, count)
        return super()._draw_images(classes, count, stream)

    def _blank(self) -> tuple[ImageSet, Splits]:
        # Some baselines have an output for each training class, whose number only the folder tells.
        self.num_train_classes = self.num_ways
        with suppress(MamlError, KeyError):  # no class can train: the error comes later
            self.num_train_classes = len(list_splits(self.root, self.split)["train"])
        return super()._blank()

    def check_available(self) -> None:
        list_splits(self.root, self.split)
