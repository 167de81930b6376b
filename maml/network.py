"""A trained network: adapts to the labelled data of a user's own task, and predicts."""

from __future__ import annotations

import copy
import threading
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image
from torch import Tensor

from maml.algorithm.base import Algorithm
from maml.config.compose import CUSTOM
from maml.data.pictures import to_pixels, warn_of_blank_or_inverted
from maml.domain.base import Domain, Role, SupervisedDomain
from maml.domain.classification import FewShotClassification
from maml.domain.omniglot import Omniglot
from maml.domain.table import Table
from maml.errors import Diverged, MamlError, first_line
from maml.evaluation import Evaluation
from maml.hardware.precision import Precision, use_dtype
from maml.model.base import Model
from maml.types import Examples, Params, Tasks

Inputs = ArrayLike | Tensor

_one_at_a_time = threading.RLock()


@contextmanager
def undisturbed(precision: Precision, device: torch.device) -> Iterator[None]:
    """Computes in the precision of a network, whatever other threads compute and whichever mode of torch is set.

    The precision is a state of the process, so threads wait for each other. Adaptation needs gradients, which
    `torch.inference_mode` would refuse.
    """
    with (
        _one_at_a_time,
        torch.inference_mode(False),
        torch.autocast(device.type, enabled=False),
        use_dtype(precision),
    ):
        yield


@dataclass(frozen=True, eq=False, repr=False)
class Network:
    """A trained network.

    Attributes:
        experiment: name of the experiment that trained it.
        iteration: number of meta-updates it was trained for.
        num_iterations: number of meta-updates of the complete training.
        algorithm: the algorithm with its trained state.
        evaluation: the settings of meta-test.
        step_sizes: step sizes of the recorded meta-test, by K; None stands for the inner optimizer's own. Empty if no
            meta-test was recorded.
        precision: the precision of training, in which it also adapts and predicts; TF32 is switched by the caller.
    """

    experiment: str
    iteration: int
    num_iterations: int
    algorithm: Algorithm
    evaluation: Evaluation
    step_sizes: Mapping[int, list[float] | None]
    precision: Precision = "float32"

    def __repr__(self) -> str:
        return f"<{self.experiment}, iteration {self.iteration:,} of {self.num_iterations:,}>"

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # torch.load may have moved the parameters to another device; it moves tensors only.
        for value in self.theta.values():
            self.algorithm.stream.device = value.device

    @property
    def complete(self) -> bool:
        """Whether it was trained to the end. Only then its accuracy can be compared with the paper's."""
        return self.iteration == self.num_iterations

    @property
    def model(self) -> Model:
        """The model f_theta: ``model(params, x)``, where both arguments have a leading task axis."""
        return self.algorithm.model

    @property
    def theta(self) -> Params:
        """The meta-learnt parameters that meta-test evaluates, without a task axis."""
        return self.algorithm.theta_of(self.evaluation.choose_theta(self.algorithm))

    @property
    def device(self) -> torch.device:
        """The device that computes."""
        return self.algorithm.stream.device

    @property
    def in_shape(self) -> tuple[int, ...]:
        """The shape of one input; for images, ``(H, W, C)``."""
        return self._inputs.in_shape

    @property
    def _inputs(self) -> Domain[Any]:
        """The domain whose inputs a user gives: for sequences, that of their elements."""
        domain = self.algorithm.domain
        elements = domain.element_domain if isinstance(domain, SupervisedDomain) else None
        return elements or domain

    def read(self, pictures: Iterable[str | Path | Image.Image] | str | Path | Image.Image) -> Tensor:
        """Converts pictures to inputs like the training images.

        Drawings become black and white, with dark pixels 1. They should be dark on light, with strokes of about 1/35 of
        the width, as in Omniglot; one that is all paper or mostly ink causes a warning. Photos become RGB or grey,
        from 0 to 1, as in training. Transparent paper is white. Pictures of 16 bits are scaled by their own range.

        Args:
            pictures: paths, or images opened with Pillow, or one of them. They are resized to ``in_shape``.

        Returns:
            The images, ``(S, H, W, C)``.

        Raises:
            MamlError: if the network takes no images, there are no pictures, or a file cannot be read.
        """
        if len(self.in_shape) != 3:
            raise MamlError(
                f"{self.experiment} takes inputs of shape {self.in_shape}, which are no images; give `adapt` numbers"
            )
        pictures = [pictures] if isinstance(pictures, str | Path | Image.Image) else pictures
        with undisturbed(self.precision, self.device):
            read = [self._read(picture, number) for number, picture in enumerate(pictures)]
        if not read:
            raise MamlError("there are no pictures to read; is the folder right that they come from?")
        return torch.stack(read)

    def _read(self, picture: str | Path | Image.Image, number: int) -> Tensor:
        if not isinstance(self._inputs, FewShotClassification):
            raise MamlError(
                f"{type(self._inputs).__name__} does not say how a picture becomes its input; give `adapt` tensors"
            )
        has_levels = self._inputs.scale != 1
        is_drawing = self.in_shape[-1] == 1 and (not has_levels or isinstance(self._inputs, Omniglot))
        name: Any = picture
        try:
            if isinstance(picture, Image.Image):
                name = getattr(picture, "filename", "") or f"picture {number}"
                pixels = to_pixels(picture, self.in_shape, is_drawing, has_levels)
            else:
                with Image.open(picture) as image:
                    pixels = to_pixels(image, self.in_shape, is_drawing, has_levels)
        except Exception as error:  # broken files raise a dozen types in Pillow
            raise MamlError(f"{name} cannot be read as a picture ({error})") from error
        if is_drawing:
            warn_of_blank_or_inverted([(name, pixels)])
        return torch.from_numpy(pixels / (255 if has_levels or not is_drawing else 1)).to(torch.get_default_dtype())

    def adapt(self, x: Inputs, y: Sequence[Hashable] | Inputs, num_steps: int | None = None) -> Predictor:
        """Adapts to the support data of one task, with the step sizes of meta-test.

        If meta-test has different step sizes for each K, those of the nearest K are used.

        Args:
            x: S inputs, ``(S, *in_shape)``. Images with one channel may be ``(S, H, W)``. Pixels are floats in 0 to 1,
                or the integers of the data set (Omniglot: paper 0, ink 1; photos: 0 to 255).
            y: in classification, one label per input, of any hashable type: 2 to N classes with K examples each, in
                any order. N is that of training; algorithms that compare images, such as `NearestNeighbor`, take more.
                The classes of a table are those of its training. In regression, the targets, ``(S, D)``. A network
                that reads sequences (as of `OmniglotSequence`) reads inputs and labels in the given order; its classes
                may differ in the number of examples. It then answers each query from the state after them.
            num_steps: number of gradient steps; None is that of meta-test. A network that reads sequences takes none.

        Returns:
            The adapted network.

        Raises:
            MamlError: if shapes or labels do not fit the network, or if it is a policy, which learns from rollouts.
            Diverged: if the adapted parameters are not finite.
        """
        with undisturbed(self.precision, self.device), torch.no_grad():
            return self._adapt(x, y, num_steps)

    def _adapt(self, x: Inputs, y: Any, num_steps: int | None) -> Predictor:
        domain = self.algorithm.domain
        if not isinstance(domain, SupervisedDomain):
            own = self.experiment == CUSTOM  # without a file in conf/experiment/
            words = "with the overrides of its training" if own else f"+experiment={self.experiment}"
            raise MamlError(
                f"{self.experiment} is a policy, which adapts to rollouts and not to examples; to watch it, run "
                f"python scripts/render.py {words}"
            )
        if num_steps is not None and (not isinstance(num_steps, Integral) or num_steps < 0):
            raise MamlError(f"num_steps={num_steps!r} is no number of gradient steps; give an integer of at least 0")
        inputs, classes = self.prepare(x), None
        if domain.element_domain is not None:
            return self._read_sequence(inputs, y, num_steps)
        if isinstance(domain, FewShotClassification):
            most = domain.out_dim if self.algorithm.fixes_ways else None
            classes, targets, order = _in_blocks(y, len(inputs), most, self.device)
            inputs, num_shots = inputs[order], len(inputs) // len(classes)
        elif isinstance(domain, Table) and domain.classes is not None:
            classes, num_shots = [*domain.classes], len(inputs)
            targets = _class_numbers(y, num_shots, classes, self.device)
        else:
            targets, num_shots = _floats(_tensor(y, "y"), "y", self.device), len(inputs)
            expected = (len(inputs), domain.out_dim)
            if targets.shape != expected:
                raise MamlError(f"y has shape {tuple(targets.shape)}; the targets of x have shape {expected}")
        num_steps = self.evaluation.num_steps if num_steps is None else num_steps
        examples = Examples(inputs.unsqueeze(0), targets.unsqueeze(0), num_shots)
        algorithm: Any = copy.copy(self.algorithm)
        algorithm.domain = _GivenExamples(domain, examples)
        theta, sizes = self.evaluation.choose_theta(self.algorithm), self._step_sizes(num_shots, num_steps)
        *_, params = algorithm.adapt(
            algorithm.params_per_task(1, theta), {"x": examples.x, "y": examples.y}, num_steps, sizes
        )
        params = {name: value.detach() for name, value in params.items()}
        if not all(value.isfinite().all() for value in params.values()):
            raise Diverged(f"{num_steps} gradient steps on these examples diverge; take fewer")
        # The predictor has a copy, because the caller may put other examples into the same memory.
        return Predictor(self, params, inputs.clone(), classes)

    def _read_sequence(self, inputs: Tensor, y: Any, num_steps: int | None) -> Predictor:
        """Returns the predictor of a network that reads labelled elements and adapts by its state."""
        if num_steps:
            raise MamlError(
                f"{self.experiment} adapts by its state, to the labels that it reads, and takes no gradient steps; "
                f"leave out num_steps={num_steps}"
            )
        labels = _labels(y, len(inputs))
        classes = list(dict.fromkeys(labels))
        _check_classes(len(classes), self.algorithm.domain.out_dim)
        params = self.algorithm.params_per_task(1, self.evaluation.choose_theta(self.algorithm))
        numbers = torch.tensor([classes.index(label) for label in labels], device=self.device)
        return Predictor(self, params, inputs.clone(), classes, numbers)

    def _step_sizes(self, num_shots: int, num_steps: int) -> list[float] | None:
        """Returns one step size per step. Steps beyond those of meta-test use its last step size."""
        if self.step_sizes:
            sizes = self.step_sizes[min(self.step_sizes, key=lambda known: abs(known - num_shots))]
        else:
            given = self.evaluation.step_size
            listed = [int(shots) for shots in given] if isinstance(given, dict) else [num_shots]
            sizes = self.evaluation.step_sizes(min(listed, key=lambda known: abs(known - num_shots)))
        return [*sizes, *sizes[-1:] * (num_steps - len(sizes))] if sizes else None

    def prepare(self, x: Inputs) -> Tensor:
        """Checks inputs and returns them as the network takes them, ``(S, *in_shape)``, on its device.

        Args:
            x: S inputs, as in `adapt`.

        Raises:
            MamlError: if the shape or the values are not those of the network's inputs.
        """
        domain = self._inputs
        original = _tensor(x, "x")
        inputs = _floats(original, "x", self.device)
        if self.in_shape[-1] == 1 and inputs.shape[1:] == self.in_shape[:-1]:
            inputs = inputs.unsqueeze(-1)
        if inputs.shape[1:] != self.in_shape or not len(inputs):
            raise MamlError(
                f"x has shape {tuple(original.shape)}; {self.experiment} takes inputs of shape {('S', *self.in_shape)}"
            )
        if isinstance(domain, FewShotClassification):
            dtype = original.dtype
            scale = 1.0 if dtype.is_floating_point or dtype == torch.bool else domain.scale
            if inputs.min() < 0 or inputs.max() > scale:
                low, high, kind = inputs.min().item(), inputs.max().item(), str(dtype).removeprefix("torch.")
                raise MamlError(
                    f"pixels of x go from {low:g} to {high:g}; as {kind} they have to lie in "
                    f"0 to {scale:g}. `read` converts pictures to such pixels"
                )
            inputs = inputs.div(scale)
        return inputs


class _GivenExamples:
    """A domain whose only task has the examples given by the user, instead of drawn ones."""

    def __init__(self, domain: SupervisedDomain, examples: Examples) -> None:
        self._domain, self._examples = domain, examples

    def data(self, tasks: Tasks, role: Role, step: int = 0) -> Examples:
        return self._examples

    def __getattr__(self, name: str) -> Any:
        return getattr(self._domain, name)


def _tensor(values: Any, name: str) -> Tensor:
    """Returns the values as a tensor, and refuses what is not an array of numbers."""
    if isinstance(values, Tensor):
        return values.clone() if values.is_inference() else values  # the clone can be used for gradients
    try:
        return torch.as_tensor(np.ascontiguousarray(values), device="cpu")
    except (TypeError, ValueError) as error:
        raise MamlError(f"{name} is no array of numbers ({first_line(error)})") from error


def _labels(values: Any, count: int) -> list[Hashable]:
    """Returns the labels as a list, and refuses any other number of them than that of the inputs."""
    if isinstance(values, Tensor | np.ndarray) and values.ndim != 1:
        raise MamlError(
            f"y has shape {tuple(values.shape)}, but each of the {count} inputs needs a label: y.flatten() of a "
            "column, y.argmax(1) of one-hot rows"
        )
    if not isinstance(values, Iterable):
        raise MamlError(f"y is {values!r}, but each of the {count} inputs needs a label")
    # A tensor is equal to itself only, so a list of tensors would have as many classes as examples.
    given: list[Any] = [
        label.tolist() if isinstance(label, Tensor | np.ndarray | np.generic) else label for label in values
    ]
    if wrong := [label for label in given if not isinstance(label, Hashable)]:
        raise MamlError(f"y has the label {wrong[0]!r}; give one label for each input, such as a number or a text")
    if len(given) != count:
        raise MamlError(f"there are {count} inputs, but {len(given)} labels")
    return given


def _floats(values: Tensor, name: str, device: torch.device) -> Tensor:
    """Returns the values as floats on a device, and refuses values that are not finite."""
    floats = values.detach().to(device, torch.get_default_dtype())
    if not floats.isfinite().all():
        raise MamlError(f"{name} has values that are not finite")
    return floats


def _in_blocks(
    labels: Any, count: int, most: int | None, device: torch.device
) -> tuple[list[Hashable], Tensor, Tensor]:
    """Sorts examples into K blocks with one example of each of N classes, as in a drawn task.

    Examples that are sorted already keep their order.

    Args:
        labels: one label per example.
        count: number of examples.
        most: the largest N; None is any.
        device: where the tensors are made.

    Returns:
        The classes, in the order of their first example; the class number of each sorted example, ``(S,)``; and the
        positions of the sorted examples, ``(S,)``.

    Raises:
        MamlError: if there are not K examples of each class, only one class, or too many.
    """
    examples: dict[Hashable, list[int]] = {}
    for position, label in enumerate(_labels(labels, count)):
        examples.setdefault(label, []).append(position)
    num_ways = len(examples)
    _check_classes(num_ways, most)
    if len({len(positions) for positions in examples.values()}) > 1:
        counts = ", ".join(f"{len(positions)} of {label!r}" for label, positions in examples.items())
        raise MamlError(f"every class needs the same number of examples, but there are {counts}")
    order = torch.tensor(list(examples.values()), device=device).T.flatten()
    return list(examples), torch.arange(num_ways, device=device).repeat(count // num_ways), order


def _check_classes(num_ways: int, most: int | None) -> None:
    """Refuses more classes than the network tells apart, and a single class."""
    if most is not None and num_ways > most:
        raise MamlError(f"this network tells {most} classes apart, the labels have {num_ways}")
    if num_ways < 2:
        raise MamlError(f"there is nothing to tell apart: the labels have {num_ways} class; give two or more")


def _class_numbers(labels: Any, count: int, classes: list[Hashable], device: torch.device) -> Tensor:
    """Returns the number of each label among classes that are the same in every task, ``(S,)``."""
    labels = _labels(labels, count)
    if unknown := [label for label in labels if label not in classes]:
        raise MamlError(f"{unknown[0]!r} is none of the classes that the network was trained on, {classes}")
    return torch.tensor([classes.index(label) for label in labels], device=device)


@dataclass(frozen=True, eq=False, repr=False)
class Predictor:
    """A network adapted to one task: call it with inputs.

    Attributes:
        network: the network before adaptation.
        params: the adapted parameters, name -> ``(1, ...)``.
        support: the support inputs, ``(S, *in_shape)``.
        classes: the labels of the classes, in the order of `probabilities`; None in regression.
        labels: the class numbers of the support inputs, ``(S,)``, if the network reads them as a sequence; else None.
    """

    network: Network
    params: Params
    support: Tensor
    classes: list[Hashable] | None
    labels: Tensor | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # As in Network, which has no parameters if it compares pixels.
        self.network.algorithm.stream.device = self.support.device

    def __call__(self, x: Inputs, transductive: bool = False) -> Any:
        """Returns the label of each input, as a list; in regression, the values, a tensor ``(Q, D)``.

        Args:
            x: Q inputs, as in `Network.adapt`.
            transductive: whether inputs are normalised with the statistics of x, as the paper does to measure accuracy.
                This is better if x has many inputs and about the same number of each class. If false, inputs are
                normalised with the statistics of the support data, so that predictions do not depend on each other.

        Raises:
            MamlError: if x does not fit the network.
        """
        outputs = self.outputs(x, transductive)
        return outputs if self.classes is None else [self.classes[best] for best in outputs.argmax(-1).tolist()]

    def probabilities(self, x: Inputs, transductive: bool = False) -> Tensor:
        """Returns the probability of each class for each input, ``(Q, N)``, in the order of `classes`.

        It is a softmax of the outputs. Those of nearest neighbours, Siamese networks, the memory module and the neural
        statistician are similarities, which are not trained to be log-probabilities of the classes: only their order
        has a meaning.

        Raises:
            MamlError: in regression, or if x does not fit the network.
        """
        if self.classes is None:
            raise MamlError(f"{self.network.experiment} predicts values, which have no probabilities")
        return self.outputs(x, transductive).softmax(-1)

    def outputs(self, x: Inputs, transductive: bool = False) -> Tensor:
        """Returns the outputs of the adapted network, ``(Q, N)`` for N classes; in regression, ``(Q, D)``.

        Raises:
            MamlError: if x does not fit the network.
        """
        with undisturbed(self.network.precision, self.network.device), torch.no_grad():
            return self._outputs(x, transductive)

    def _outputs(self, x: Inputs, transductive: bool) -> Tensor:
        inputs = self.network.prepare(x)
        if self.labels is not None:
            outputs = self._outputs_after_support(inputs, self.labels)
        elif transductive:
            outputs = self.network.model(self.params, inputs.unsqueeze(0))[0]
        else:
            both, count = torch.cat([self.support, inputs]).unsqueeze(0), len(self.support)
            outputs = self.network.model(self.params, both, num_reference=count)[0, count:]
        # The network has an output for each class of a training task; a task with fewer classes uses the first ones.
        return outputs if self.classes is None else outputs[:, : len(self.classes)]

    def _outputs_after_support(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Returns the outputs for each input as the last element of a sequence, ``(Q, out_dim)``."""
        domain = self.network.algorithm.domain
        assert isinstance(domain, SupervisedDomain)
        count = len(inputs)
        support = self.support.expand(count, *self.support.shape)
        elements = torch.cat([support, inputs.unsqueeze(1)], dim=1)  # (Q, S + 1, *in_shape)
        sequences = domain.join(elements, labels.expand(count, -1))
        return self.network.model(self.params, sequences.unsqueeze(0))[0]
