"""A classifier of all training classes, used by two baselines in meta-test (docs/protocol.md#classifier-baselines)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from maml.algorithm.base import Algorithm, Parts
from maml.domain.base import Metrics
from maml.domain.classification import FewShotClassification, accuracy, cross_entropies
from maml.errors import MamlError
from maml.model.functional import for_tasks
from maml.seeding import Stream
from maml.types import Params, Tasks

_NUM_PER_CLASS = 5  # images of each class in a batch
_MOMENTUM = 0.1  # weight of the newest batch in the running statistics


class Classifier(Algorithm):
    """Trains a network to classify all training classes. In meta-test it normalises with running statistics.

    The two baselines differ in meta-test only, so they share one training run. ``meta_batch_size`` is the number of
    images in a batch.

    Args:
        parts: the domain, model, optimizers and stream.

    Raises:
        MamlError: if the domain is not an image set, or the model has no features.
    """

    sums_over_tasks = False  # a batch is one task, normalised as a whole

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        domain = parts.domain
        if not isinstance(domain, FewShotClassification):
            raise MamlError("this baseline classifies images: choose domain=mini_imagenet, cifar_fs or omniglot")
        self.images = domain
        self.classifier = parts.make_model(domain.in_shape, len(domain.splits["train"]))
        self.classifier.check_features()
        theta = self.classifier.init(self.stream)
        self.set_initial(theta, self.classifier.running_statistics(theta))

    def sample_tasks(self, count: int, stream: Stream) -> Tasks:
        """Draws a batch of ``count`` images of the training classes."""
        return self.images.sample_images(count, stream, "train", _NUM_PER_CLASS)

    def task_losses(self, params: Params, tasks: Tasks) -> tuple[Tensor, Metrics]:
        """The mean cross-entropy over all training classes; the metrics hold the new running statistics."""
        outputs, seen = self._forward_in_training_mode(self.theta_of(params), self.domain.data(tasks, "support").x)
        labels = tasks["labels"]
        metrics = {"accuracy": accuracy(outputs, labels)} | new_statistics(params, seen)
        return cross_entropies(outputs, labels).mean(1), metrics

    def _forward_in_training_mode(self, theta: Params, x: Tensor) -> tuple[Tensor, Params]:
        """Normalises with the batch's own statistics; returns the outputs and these statistics, for each layer."""
        seen: Params = {}
        # All images are the reference, as without the argument. With it, normalisation leaves out the kernels, whose
        # rounding would change the bits of seeded runs.
        features = self.classifier.features(theta, x, num_reference=x.shape[1], seen=seen)
        return self.classifier.outputs(theta, features), seen

    @abstractmethod
    def adapt(
        self, params: Params, tasks: Tasks, num_steps: int, step_sizes: Sequence[float] | None = None
    ) -> Iterator[Params]: ...


def new_statistics(params: Params, seen: Params) -> Params:
    """Returns the running statistics after one more batch.

    Args:
        params: holds the running statistics so far, by name.
        seen: the batch's statistics, under the same names.
    """
    return {name: torch.lerp(for_tasks(params[name], len(value)), value, _MOMENTUM) for name, value in seen.items()}
