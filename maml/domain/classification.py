"""N-way K-shot image classification: tasks are drawn as indices into one tensor of images on the device."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Self

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor

from maml.data.cache import ImageSet
from maml.digest import digest
from maml.domain.base import Metrics, Predictions, Role, SupervisedDomain, reads_data
from maml.domain.draw import choice_of_each
from maml.errors import MamlError, first_ten
from maml.hardware.workload import Workload
from maml.model.base import Model
from maml.seeding import Stream
from maml.types import Count, Examples, FilePath, Params, Split, Tasks

# Number of pixels in a chunk of tasks on a CPU, about, support and query together: 80 images of Omniglot. Half of it
# halves the memory, but 20-way tasks are then computed one at a time, no faster than by a plain loop
# (scripts/bench_meta_gradient.py).
_CHUNK_PIXELS = 80 * 28 * 28

Splits = Mapping[Split, Tensor]
"""The class indices of each split, int64 ``(classes,)``."""


class FewShotClassification(SupervisedDomain):
    """Tasks of N classes with K support images each; labels are reshuffled in every task.

    A subclass is an image set. It sets the class attributes and defines `load`.

    Class attributes:
        in_shape: height, width and channels of an image.
        scale: pixels are divided by this number.
        num_train_classes: number of classes in the training split.
        rotate: whether every class of a task is turned by its own multiple of 90 degrees.
        has_turned_classes: whether splits may hold turned classes. If the images are of C classes, class ``c + k * C``
            is class c turned by k quarter turns to the left.

    Args:
        num_ways: N, number of classes in a task, and of outputs of the network; with one class, every answer would be
            right. Meta-test can have another number (``evaluation.num_ways``).
        num_shots: K, number of support images per class.
        num_query: number of query images per class in training; None is K.
        data_dir: folder of the original files.
        cache_dir: folder in which the tensor built from these files is cached.

    Raises:
        MamlError: if files are missing or damaged, a class has too few images, or the training split has too few
            classes.
    """

    in_shape: tuple[int, int, int]
    scale: float
    num_train_classes: int
    rotate = False
    has_turned_classes = False
    draws_classes = True
    headline = "accuracy_transductive"
    larger_is_better = True

    def __init__(
        self,
        num_ways: Annotated[int, Ge(2)],
        num_shots: Count,
        data_dir: FilePath,
        cache_dir: FilePath,
        num_query: Count | None = None,
    ) -> None:
        self.out_dim = self.num_ways = num_ways
        self.num_shots, self.num_query = num_shots, num_query
        self.data_dir, self.cache_dir = Path(data_dir), Path(cache_dir)
        data, splits = self.load(self.data_dir, self.cache_dir) if reads_data() else self._blank()
        images = data.images if data.images.dim() == 5 else data.images.unsqueeze(-1)
        assert images.shape[2:] == self.in_shape, f"{type(self).__name__}.in_shape is not that of its images"
        self.splits = dict(splits)
        self.class_names = data.classes or [str(number) for number in range(len(images))]
        self.counts = data.counts
        self.num_upright = images.shape[0] if data.counts is None else len(data.counts)
        if self.has_turned_classes:
            self.class_names = [f"{name}/rot{90 * turns:03d}" for turns in range(4) for name in self.class_names]
        chosen = {split: classes.tolist() for split, classes in self.splits.items()}
        self.data_digest = digest({"images": data.digest, "splits": chosen}) if data.digest else None
        self.num_images = max(data.counts or [images.shape[1]])
        self.smallest = dict.fromkeys(self.splits, self.num_images)
        if data.counts is not None:
            self.class_counts = torch.tensor(data.counts)
            self.class_starts = self.class_counts.cumsum(0) - self.class_counts
            self.smallest = {
                split: int(self.class_counts[self._upright(chosen)].min()) for split, chosen in self.splits.items()
            }
        # Pixels flat, so that an image and its rotation are one gather.
        self.images = images.flatten(2, 3)
        height, width, _ = self.in_shape
        pixels = torch.arange(height * width).reshape(height, width)
        self.turned = torch.stack([pixels.rot90(k).flatten() for k in range(4)])
        self._check_ways("train")
        self._check_images("train", *images_asked_for(num_shots, num_query or num_shots))

    @abstractmethod
    def load(self, data_dir: Path, cache_dir: Path) -> tuple[ImageSet, Splits]:
        """Loads all images of the data set, and assigns its classes to the splits.

        Args:
            data_dir: folder of the original files.
            cache_dir: folder in which the tensor built from these files is cached.

        Returns:
            The images, uint8 ``(classes, images per class, H, W[, C])`` (`ImageSet` says how classes of unequal size
            are held), and the splits.

        Raises:
            MamlError: if files are missing or damaged.
        """

    def _blank(self) -> tuple[ImageSet, Splits]:
        """Returns blank images and only a training split, for `without_data`."""
        blank = torch.zeros((), dtype=torch.uint8)
        images = blank.expand(1, self.num_shots + (self.num_query or self.num_shots), *self.in_shape)
        return ImageSet(images, [], ""), {"train": torch.arange(self.num_train_classes)}

    @property
    def workload(self) -> Workload:
        """Threads share operations. Training may measure the best chunk; otherwise a chunk fits a CPU's cache."""
        images = self.num_ways * (self.num_shots + (self.num_query or self.num_shots))
        chunk = max(1, round(_CHUNK_PIXELS / (math.prod(self.in_shape) * images)))
        return Workload(task_chunk=chunk, measure_chunk=True, threads="operations")

    @property
    def has_validation(self) -> bool:
        """Whether there is a split of classes for validation."""
        return "val" in self.splits

    def with_ways(self, num_ways: int) -> Self:
        other = copy.copy(self)
        other.num_ways = num_ways
        return other

    def _check_ways(self, split: Split) -> None:
        count = len(self._classes(split))
        if self.num_ways > count:
            raise MamlError(
                f"num_ways={self.num_ways}, but the {split} split has {count} classes; {ways_remedy(split)}"
            )

    def _check_images(self, split: Split, needed: int, asked: str, remedy: str = "lower either") -> None:
        if needed <= self.smallest[split]:
            return
        if self.counts is None:
            raise MamlError(f"{asked}, but there are {self.smallest[split]} images of each class; {remedy}")
        counts = {self.class_names[i]: self.counts[i % self.num_upright] for i in self.splits[split].tolist()}
        few = first_ten([f"{name} has {count} images" for name, count in counts.items() if count < needed])
        raise MamlError(f"{asked}, but {few}; {remedy}, add images, or take the class away")

    def _classes(self, split: Split) -> Tensor:
        if split not in self.splits:
            raise MamlError(f"this data set has no {split} classes, only {' and '.join(self.splits)}")
        return self.splits[split]

    def _upright(self, classes: Tensor) -> Tensor:
        """Returns the upright class of each: the one that it is a turned copy of, or itself."""
        return classes % self.num_upright if self.has_turned_classes else classes

    def to(self, device: torch.device) -> None:
        self.images = self.images.to(device)
        self.turned = self.turned.to(device)
        self.splits = {split: classes.to(device) for split, classes in self.splits.items()}
        if self.counts is not None:
            self.class_counts, self.class_starts = self.class_counts.to(device), self.class_starts.to(device)

    def _draw_images(self, classes: Tensor, count: int, stream: Stream) -> Tensor:
        """Draws distinct images of each class, as numbers within the class, ``(*classes.shape, count)``."""
        if self.counts is None:
            return stream.choice(classes.shape, self.num_images, count)
        sizes = self.class_counts.to(stream.device)[self._upright(classes)]
        return choice_of_each(stream, sizes, self.num_images, count)

    def draw_tasks(self, num_tasks: int, stream: Stream, split: Split, num_shots: int, num_query: int) -> Tasks:
        """Draws classes, rotations and images. Within a task, classes and images are drawn without replacement.

        Departure: the authors list 200,000 tasks once and cycle through them; here every task is new.

        Raises:
            MamlError: if a class has too few images, or the split too few classes.
        """
        self._check_ways(split)
        members = self._classes(split).to(stream.device)
        self._check_images(split, *images_asked_for(num_shots, num_query))
        classes = members[stream.child("classes").choice((num_tasks,), len(members), self.num_ways)]
        images = self._draw_images(classes, num_shots + num_query, stream.child("images"))
        support, query = images.split([num_shots, num_query], dim=-1)
        tasks = {
            "classes": classes,
            "support_images": support,
            "query_images": query,
        }
        if self.rotate:
            tasks["rotations"] = stream.child("rotations").integers((num_tasks, self.num_ways), 4)
        return tasks

    def sample_images(self, count: int, stream: Stream, split: Split, num_per_class: int) -> Tasks:
        """Draws images of all classes of a split, for ordinary classification.

        Args:
            count: number of images, drawn without replacement.
            stream: the source of randomness.
            split: which classes.
            num_per_class: largest number of images of one class.

        Raises:
            MamlError: if ``count`` is more than all classes give, or a class has fewer than ``num_per_class`` images.

        Returns:
            One task in which every image is a class of its own, and ``labels``, ``(1, count)``: class numbers within
            the split.
        """
        classes = self._classes(split).to(stream.device)
        asked = f"an ordinary batch is drawn from {num_per_class} images of each class"
        self._check_images(split, num_per_class, asked, remedy="choose another algorithm")
        if count > len(classes) * num_per_class:
            raise MamlError(
                f"meta_batch_size={count} images cannot be drawn from {num_per_class} each of {len(classes)} classes; "
                f"lower it to {len(classes) * num_per_class} or less"
            )
        drawn = self._draw_images(classes, num_per_class, stream.child("images"))
        slots = stream.child("slots").choice((1,), drawn.numel(), count)
        labels = slots // num_per_class
        tasks = {
            "classes": classes[labels],
            "support_images": drawn.flatten()[slots].unsqueeze(-1),
            "labels": labels,
        }
        if self.rotate:
            tasks["rotations"] = stream.child("rotations").integers((1, count), 4)
        return tasks

    def data(self, tasks: Tasks, role: Role, step: int = 0) -> Examples:
        """Returns K blocks of N images, ``(T, K * N, H, W, C)``, with labels ``0 .. N-1`` in each block."""
        chosen = tasks[f"{role}_images"].transpose(1, 2)  # (T, K, N)
        classes = self._upright(tasks["classes"]).unsqueeze(1)
        if self.counts is not None:
            chosen = chosen + self.class_starts[classes]
            classes = torch.zeros_like(classes)
        if self.rotate or self.has_turned_classes:
            turns = tasks["rotations"] if self.rotate else tasks["classes"] // self.num_upright
            pixels = self.turned[turns].unsqueeze(1)  # (T, 1, N, H * W)
            x = self.images[classes.unsqueeze(-1), chosen.unsqueeze(-1), pixels]
        else:
            x = self.images[classes, chosen]
        count, blocks, ways = chosen.shape
        x = x.to(torch.get_default_dtype()).div(self.scale).reshape(count, blocks * ways, *self.in_shape)
        y = torch.arange(ways, device=x.device).expand(count, blocks, ways).reshape(count, -1)
        return Examples(x, y, num_shots=tasks["support_images"].shape[-1])

    def loss(self, outputs: Tensor, data: Examples) -> tuple[Tensor, Metrics]:
        """The cross-entropy, summed and divided by K, and the accuracy.

        Departure: the paper has the sum (docs/protocol.md#classification-loss).
        """
        return cross_entropies(outputs, data.y).sum(1) / data.num_shots, {"accuracy": accuracy(outputs, data.y)}

    def measure(self, model: Model, params: Params, support: Examples, query: Examples, step: int) -> Metrics:
        """Query accuracy, transductive and inductive.

        Transductive, as in the paper: query images are normalised with the statistics of the whole query batch.
        Inductive: they are normalised with the statistics of the support images only, so that a prediction depends on
        no other query image. With running statistics, the two are one.

        A prediction is one of the task's classes: outputs beyond the task's ways are left out.
        """
        ways = ways_of(support)
        outputs = inductive = model(params, query.x)
        if not model.uses_running_statistics(params):
            both, num_support = torch.cat([support.x, query.x], dim=1), support.x.shape[1]
            inductive = model(params, both, num_reference=num_support)[:, num_support:]
        return {
            "accuracy_transductive": accuracy(outputs[..., :ways], query.y),
            "accuracy_inductive": accuracy(inductive[..., :ways], query.y),
        }

    def predict_classes(self, model: Model, params: Params, tasks: Tasks) -> Predictions:
        query, choices = self.data(tasks, "query"), tasks["classes"]
        best = model(params, query.x)[..., : choices.shape[1]].argmax(-1)
        return Predictions(choices.gather(1, query.y), choices.gather(1, best), choices)


def ways_remedy(split: Split) -> str:
    """Returns which key to lower if a split has too few classes for a task."""
    if split == "test":
        return "lower evaluation.num_ways if it is set, otherwise domain.num_ways"
    return "lower domain.num_ways" + (", or in meta-test evaluation.num_ways" if split == "val" else "")


def images_asked_for(num_shots: int, num_query: int) -> tuple[int, str]:
    """Returns how many images of a class a task needs, and how it asks for them, in words."""
    needed = num_shots + num_query
    return needed, f"num_shots={num_shots} plus num_query={num_query} is {needed}"


def ways_of(support: Examples) -> int:
    """Returns N of tasks from their support data, which has K examples of each class."""
    return support.y.shape[1] // support.num_shots


def cross_entropies(outputs: Tensor, labels: Tensor) -> Tensor:
    """Returns the cross-entropy of each example, ``(T, S)``, from class scores, ``(T, S, classes)``."""
    return F.cross_entropy(outputs.flatten(0, 1), labels.flatten(), reduction="none").reshape(labels.shape)


def accuracy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Returns the share of examples whose largest output is that of their label, ``(T,)``; NaN if an output is NaN."""
    is_right = (outputs.argmax(-1) == labels).to(outputs.dtype)
    return is_right.masked_fill(outputs.isnan().any(-1), torch.nan).mean(1)  # the largest of NaNs is the first
