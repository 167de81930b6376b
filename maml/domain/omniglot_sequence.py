"""Sequences of Omniglot drawings whose labels come one step late (Santoro et al. 2016; docs/protocol.md#mann)."""

from __future__ import annotations

import copy
import math
from typing import Annotated, Literal, Self

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor

from maml.data.omniglot import NUM_DRAWINGS
from maml.domain.base import Metrics, Role, SupervisedDomain
from maml.domain.omniglot import Omniglot
from maml.domain.omniglot_alphabets import warp
from maml.errors import Diverged, MamlError
from maml.hardware.workload import Workload
from maml.model.base import Model
from maml.model.recurrent import Recurrent
from maml.seeding import Stream
from maml.types import Count, Examples, FilePath, Params, Split, Tasks, without_copies

_LARGEST_ANGLE = math.pi / 16  # by which augmentation turns a drawing, to either side
_LARGEST_SHIFT = 10 / 105  # by which it moves a drawing, in each direction, as a share of the width


class _Characters(Omniglot):
    """Omniglot as Santoro et al. used it: 20 x 20 levels of grey, divided by the largest of each drawing."""

    in_shape = (20, 20, 1)
    scale = 255.0


class OmniglotSequence(SupervisedDomain):
    """A task is one sequence of drawings of N characters. The label of each drawing is an input at the next step.

    At step t, the network sees drawing t and the one-hot label of drawing t - 1 (zero at first), and has to say the
    label of drawing t. Characters have new labels in every sequence, so the network has to keep drawings and labels in
    its state. Turned by 90, 180 and 270 degrees, a character is another class.

    Accuracy is measured by showing: at the 1st, 2nd, ..., K-th drawing of a character in the sequence. The
    network has then seen 0, 1, ..., K - 1 labelled drawings of it. Accuracy at the 1st can be above 1 / N, because
    labels that were seen already can be ruled out.

    Departure: which characters Santoro et al. trained on is not published, only that they were 1200. Here the split is
    that of Vinyals et al.

    Departure: the accuracy at a showing is the mean over sequences of the share of their characters that are told
    right; known re-implementations pool the characters of all sequences. The two differ only where sequences differ in
    the number of characters that are shown so often.

    Args:
        num_ways: N, number of characters in a sequence, and of outputs of the network.
        sequence_length: L, number of drawings in a sequence, a multiple of N; K is L / N.
        data_dir: folder of the data sets.
        cache_dir: folder in which the tensor of drawings is cached.
        split: ``vinyals`` is 1028, 172 and 423 characters; ``vinyals_trainval`` trains on its 1200 others, and has no
            validation (docs/protocol.md#omniglot-splits).
        order: ``random`` draws the character of each step, so that characters are shown 10 times on average;
            ``balanced`` shows each of them K times, in random order.
        augment: which drawings are turned by an angle up to pi / 16 and moved by up to 10 / 105 of their width: those
            of ``train``, of ``all`` splits, or ``none``.

    Raises:
        MamlError: if files are missing or damaged, there are too few characters, or L is no multiple of N.
    """

    draws_classes = True
    headline = "accuracy"
    larger_is_better = True
    measured_by = "showing"

    def __init__(
        self,
        num_ways: Annotated[int, Ge(2)],
        sequence_length: Count,
        data_dir: FilePath,
        cache_dir: FilePath,
        split: Literal["vinyals", "vinyals_trainval"] = "vinyals",
        order: Literal["random", "balanced"] = "random",
        augment: Literal["train", "all", "none"] = "train",
    ) -> None:
        if sequence_length % num_ways:
            raise MamlError(
                f"domain.sequence_length={sequence_length} is no multiple of domain.num_ways={num_ways}; a sequence "
                f"has K drawings of each character on average: choose {num_ways * -(-sequence_length // num_ways)}"
            )
        self.out_dim = self.num_ways = num_ways
        self.num_shots, self.order, self.augment = sequence_length // num_ways, order, augment
        self.characters = _Characters(
            num_ways=num_ways, num_shots=1, data_dir=data_dir, cache_dir=cache_dir, split=split, rotations="classes"
        )
        self.data_digest = self.characters.data_digest
        height, width, _ = self.characters.in_shape
        self.in_shape = (sequence_length, height * width + num_ways)

    @property
    def element_domain(self) -> SupervisedDomain:
        """Single drawings."""
        return self.characters

    @property
    def workload(self) -> Workload:
        """Training may measure the best chunk. The program of so many steps is too long to compile."""
        return Workload(measure_chunk=True)

    @property
    def has_validation(self) -> bool:
        """Whether there is a split of characters for validation."""
        return self.characters.has_validation

    def least_elements(self, num_shots: int, num_query: int) -> int:
        """A sequence holds a character and a drawing for each step."""
        return 2 * num_shots * self.num_ways

    def with_ways(self, num_ways: int) -> Self:
        other = copy.copy(self)
        other.num_ways, other.characters = num_ways, self.characters.with_ways(num_ways)
        return other

    def to(self, device: torch.device) -> None:
        self.characters.to(device)

    def check_adaptation(self, algorithm: str) -> None:
        raise MamlError(
            f"{algorithm} adapts by gradient steps, but in OmniglotSequence a network adapts by its state, to labels "
            "that it reads; choose algorithm=pretrain"
        )

    def check_model(self, model: Model) -> None:
        if not isinstance(model, Recurrent):
            raise MamlError(
                f"OmniglotSequence needs outputs after every element of a sequence, and {type(model).__name__} has "
                "none; choose model=mann or model=lstm"
            )

    def draw_tasks(self, num_tasks: int, stream: Stream, split: Split, num_shots: int, num_query: int) -> Tasks:
        """Draws characters, their order and drawings, and how drawings are augmented.

        A drawing of a character comes again only after all others of it. There are no query data: ``num_query`` is not
        used.

        Raises:
            MamlError: if the split has too few characters.
        """
        drawn = self.characters.draw_tasks(num_tasks, stream, split, NUM_DRAWINGS, 0)
        length = num_shots * self.num_ways
        if self.order == "random":
            labels = stream.child("order").integers((num_tasks, length), self.num_ways)
        else:
            labels = stream.child("order").choice((num_tasks,), length, length) % self.num_ways
        numbers = labels * NUM_DRAWINGS + num_earlier(labels, self.num_ways) % NUM_DRAWINGS
        tasks = {
            "classes": drawn["classes"],  # in random order, so that a character has a new label in every sequence
            "labels": labels,
            "drawings": drawn["support_images"].flatten(1).gather(1, numbers),
        }
        if self.augment == "all" or (self.augment == "train" and split == "train"):
            shape = (num_tasks, length)
            tasks["angles"] = stream.child("angles").uniform(shape, -_LARGEST_ANGLE, _LARGEST_ANGLE)
            tasks["shifts"] = stream.child("shifts").uniform((*shape, 2), -_LARGEST_SHIFT, _LARGEST_SHIFT)
        return tasks

    def data(self, tasks: Tasks, role: Role, step: int = 0) -> Examples:
        """Returns the sequence of each task, whatever the role: x ``(T, 1, L, H * W + N)``, y ``(T, 1, L)``.

        An element of x is the pixels of a drawing and the one-hot label of the drawing before.
        """
        labels = tasks["labels"]
        x = self.join(self.images(tasks), labels[:, :-1])
        return Examples(x.unsqueeze(1), labels.unsqueeze(1), num_shots=labels.shape[1] // tasks["classes"].shape[1])

    def join(self, elements: Tensor, labels: Tensor) -> Tensor:
        """Joins drawings and labels, which come one step late: ``(T, L, H * W + N)``."""
        is_label = labels.unsqueeze(2) == torch.arange(self.out_dim, device=labels.device)
        return torch.cat([elements.flatten(2), F.pad(is_label.to(elements.dtype), (0, 0, 1, 0))], dim=2)

    def images(self, tasks: Tasks) -> Tensor:
        """Returns the drawings of T sequences, ``(T, L, H, W)``, ink 1."""
        known = self.characters
        classes = tasks["classes"].gather(1, tasks["labels"])
        upright, turns = classes % known.num_upright, classes // known.num_upright
        pixels = known.images[upright.unsqueeze(2), tasks["drawings"].unsqueeze(2), known.turned[turns], 0]
        images = pixels.to(torch.get_default_dtype()).div(known.scale).unflatten(2, known.in_shape[:2])
        return moved(images, tasks["angles"], tasks["shifts"]) if "angles" in tasks else images

    def loss(self, outputs: Tensor, data: Examples) -> tuple[Tensor, Metrics]:
        """The cross-entropy and the accuracy, means over the steps of each sequence; outputs ``(T, 1, L, N)``."""
        losses = F.cross_entropy(outputs.flatten(0, 2), data.y.flatten(), reduction="none")
        return losses.reshape(len(outputs), -1).mean(1), {"accuracy": _is_right(outputs, data.y).flatten(1).mean(1)}

    def outer_loss(self, model: Model, params: Params, data: Examples) -> tuple[Tensor, Metrics]:
        assert isinstance(model, Recurrent)
        return self.loss(model.outputs_of_each(params, data.x), data)

    def measure(self, model: Model, params: Params, support: Examples, query: Examples, step: int) -> Metrics:
        """Accuracy by showing, ``(T, K)``; a prediction is one of the task's labels."""
        assert isinstance(model, Recurrent)
        labels, num_shots = support.y.squeeze(1), support.num_shots
        num_ways = labels.shape[1] // num_shots
        outputs = model.outputs_of_each(without_copies(params), support.x)[..., :num_ways]
        if outputs.isnan().any():  # a NaN in the result says that there is no such showing
            raise Diverged("the network's outputs in meta-test are not finite")
        return {"accuracy": by_showing(_is_right(outputs, support.y).squeeze(1), labels, num_ways, num_shots)}


def _is_right(outputs: Tensor, labels: Tensor) -> Tensor:
    return (outputs.argmax(-1) == labels).to(outputs.dtype)


def num_earlier(labels: Tensor, num_ways: int) -> Tensor:
    """Returns how often the label of each step was seen before it, ``(T, L)``, given labels ``(T, L)``."""
    is_label = labels.unsqueeze(2) == torch.arange(num_ways, device=labels.device)
    return is_label.cumsum(1).gather(2, labels.unsqueeze(2)).squeeze(2) - 1


def by_showing(values: Tensor, labels: Tensor, num_ways: int, num_showings: int) -> Tensor:
    """Returns the mean over classes of values at the 1st, 2nd, ... showing of a class.

    Args:
        values: a number for each step of T sequences, ``(T, L)``.
        labels: the class of each step, ``(T, L)``.
        num_ways: number of classes.
        num_showings: M, the last showing to return.

    Returns:
        ``(T, M)``, the mean over the classes that have this showing; NaN if none has.
    """
    showings = torch.arange(num_showings, device=labels.device)
    is_at = num_earlier(labels, num_ways).unsqueeze(2) == showings  # (T, L, M)
    return (values.unsqueeze(2) * is_at).sum(1) / is_at.sum(1)


def moved(images: Tensor, angles: Tensor, shifts: Tensor) -> Tensor:
    """Turns images about their centres, then moves them. Pixels are interpolated; paper comes in at the borders.

    Args:
        images: ``(T, L, H, W)`` with H = W.
        angles: to the left, in radians, ``(T, L)``.
        shifts: to the right and down, as a share of the width, ``(T, L, 2)``.
    """
    cos, sin = angles.cos(), angles.sin()
    right, down = (2 * shifts).unbind(-1)  # coordinates go from -1 to 1
    # Where each pixel comes from: it is moved back, then turned back.
    rows = [
        torch.stack([cos, -sin, sin * down - cos * right], -1),
        torch.stack([sin, cos, -sin * right - cos * down], -1),
    ]
    return warp(images, torch.stack(rows, -2))
