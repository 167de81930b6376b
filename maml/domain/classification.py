"""N-way K-shot image classification: episodes drawn by index from one tensor on the device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from maml.data.cache import ImageSet
from maml.domain.base import Metrics, Role, Split, SupervisedDomain
from maml.errors import MamlError
from maml.model.base import Model
from maml.seeding import Stream
from maml.types import Examples, Params, Tasks


class FewShotClassification(SupervisedDomain):
    """Tasks of N classes with K support images each; labels are reshuffled in every task.

    Args:
        data: the images of all classes, ``(classes, images per class, H, W[, C])``, uint8.
        splits: class indices of each split.
        num_ways: N.
        num_shots: K, support images per class.
        num_query: query images per class in training; None is K.
        scale: the pixel value that becomes 1.
        rotate: turns every class of a task by its own multiple of 90 degrees.

    Raises:
        MamlError: if a class has too few images, or a split too few classes.
    """

    headline = "accuracy_transductive"
    larger_is_better = True

    def __init__(
        self,
        data: ImageSet,
        splits: Mapping[Split, Tensor],
        num_ways: int,
        num_shots: int,
        num_query: int | None,
        scale: float,
        rotate: bool,
    ) -> None:
        images = data.images if data.images.dim() == 5 else data.images.unsqueeze(-1)
        self.num_images, height, width, channels = images.shape[1:]
        self.in_shape = (height, width, channels)
        self.out_dim = self.num_ways = num_ways
        self.num_shots = num_shots
        self.num_query = num_query
        self.scale = scale
        self.rotate = rotate
        self.splits = dict(splits)
        # Pixels flat, so that an image and its rotation are one gather.
        self.images = images.flatten(2, 3)
        pixels = torch.arange(height * width).reshape(height, width)
        self.turned = torch.stack([pixels.rot90(k).flatten() for k in range(4)])
        smallest = min(len(classes) for classes in self.splits.values())
        if num_ways > smallest:
            raise MamlError(
                f"domain.num_ways={num_ways}, but the smallest split has {smallest} classes; lower num_ways"
            )
        self._check_images(num_shots, num_query or num_shots)

    def _check_images(self, num_shots: int, num_query: int) -> None:
        if num_shots + num_query > self.num_images:
            raise MamlError(
                f"num_shots={num_shots} plus num_query={num_query} is {num_shots + num_query}, but there are "
                f"{self.num_images} images of each class; lower either"
            )

    def to(self, device: torch.device) -> None:
        self.images = self.images.to(device)
        self.turned = self.turned.to(device)
        self.splits = {split: classes.to(device) for split, classes in self.splits.items()}

    def sample_tasks(
        self,
        num_tasks: int,
        stream: Stream,
        split: Split = "train",
        num_shots: int | None = None,
        num_query: int | None = None,
    ) -> Tasks:
        """Draws classes, rotations and images, all without replacement inside a task.

        Departure: the authors list 200,000 tasks once and cycle through them; here every task is fresh.
        """
        num_query = num_query or (self.num_query if num_shots is None else None) or num_shots or self.num_shots
        num_shots = num_shots or self.num_shots
        self._check_images(num_shots, num_query)
        stream = stream.child(split)
        classes = self.splits[split].to(stream.device)
        shape = (num_tasks, self.num_ways)
        images = stream.child("images").choice(shape, self.num_images, num_shots + num_query)
        support, query = images.split([num_shots, num_query], dim=-1)
        tasks = {
            "classes": classes[stream.child("classes").choice((num_tasks,), len(classes), self.num_ways)],
            "support_images": support,
            "query_images": query,
        }
        if self.rotate:
            tasks["rotations"] = stream.child("rotations").integers(shape, 4)
        return tasks

    def sample_images(self, count: int, stream: Stream, split: Split, num_per_class: int) -> Tasks:
        """Draws images of all classes of a split, for ordinary classification: a "task" with one image of each "class".

        Args:
            count: images, drawn without replacement from ``num_per_class`` of every class.
            stream: the source of randomness.
            split: which classes.
            num_per_class: at most so many are of one class.

        Raises:
            MamlError: if there are not so many.

        Returns:
            One task, whose support data `data` returns, and ``labels`` ``(1, count)``, numbered within the split.
        """
        classes = self.splits[split].to(stream.device)
        if count > len(classes) * num_per_class:
            raise MamlError(
                f"meta_batch_size={count} images cannot be drawn from {num_per_class} each of {len(classes)} classes; "
                f"lower it to {len(classes) * num_per_class} or less"
            )
        drawn = stream.child("images").choice((len(classes),), self.num_images, num_per_class)
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
        classes = tasks["classes"].unsqueeze(1)
        if self.rotate:
            pixels = self.turned[tasks["rotations"]].unsqueeze(1)  # (T, 1, N, H * W)
            x = self.images[classes.unsqueeze(-1), chosen.unsqueeze(-1), pixels]
        else:
            x = self.images[classes, chosen]
        count, blocks, ways = chosen.shape
        x = x.to(torch.get_default_dtype()).div(self.scale).reshape(count, blocks * ways, *self.in_shape)
        y = torch.arange(ways, device=x.device).expand(count, blocks, ways).reshape(count, -1)
        return Examples(x, y, num_shots=tasks["support_images"].shape[-1])

    def loss(self, outputs: Tensor, data: Examples) -> tuple[Tensor, Metrics]:
        """Cross-entropy, summed and divided by K (docs/protocol.md#classification-loss), and the accuracy."""
        losses = F.cross_entropy(outputs.flatten(0, 1), data.y.flatten(), reduction="none").reshape(data.y.shape)
        return losses.sum(1) / data.num_shots, {"accuracy": _accuracy(outputs, data.y)}

    def measure(self, model: Model, params: Params, support: Examples, query: Examples, step: int) -> Metrics:
        """Query accuracy, transductive and inductive.

        Transductive is the paper's: a query image is normalised with the statistics of the whole query batch. Inductive
        uses those of the support images alone, so that a prediction depends on no other query image.
        """
        both = torch.cat([support.x, query.x], dim=1)
        num_support = support.x.shape[1]
        inductive = model(params, both, num_reference=num_support)[:, num_support:]
        return {
            "accuracy_transductive": _accuracy(model(params, query.x), query.y),
            "accuracy_inductive": _accuracy(inductive, query.y),
        }


def _accuracy(outputs: Tensor, labels: Tensor) -> Tensor:
    return (outputs.argmax(-1) == labels).to(outputs.dtype).mean(1)
