"""Fine-tuning of a pretrained classifier with a new last layer (docs/protocol.md#classifier-baselines)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from maml.algorithm.base import Parts
from maml.algorithm.classifier import Classifier, new_statistics
from maml.domain.classification import cross_entropies, ways_of
from maml.errors import MamlError
from maml.types import Params, Tasks, expand, num_tasks


class FineTune(Classifier):
    """Replaces the last layer, fine-tunes in training mode, and predicts with the running statistics.

    The new last layer has as many outputs as a task has classes. It is the same for all tasks. ``inner.adapt`` says
    which layers are fine-tuned; in the experiments all are.
    """

    trained_as = "maml.algorithm.classifier.Classifier"
    fixes_ways = False

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self._make_model = parts.make_model
        self.head = self._new_head(self.images.num_ways)

    def keep_best_of_validation(self) -> None:
        raise MamlError(
            "algorithm=finetune draws a new last layer for every task, and training takes no steps on it, so that "
            "validation during training would be chance; set validate_every=null"
        )

    def _new_head(self, num_ways: int) -> Params:
        model = self._make_model(self.images.in_shape, num_ways)
        params = model.init(self.stream.child("new head"))
        return {name: value for name, value in params.items() if name.startswith("head.")}

    def adapt(
        self, params: Params, tasks: Tasks, num_steps: int, step_sizes: Sequence[float] | None = None
    ) -> Iterator[Params]:
        statistics = {name: params[name] for name in self.buffers}
        support = self.domain.data(tasks, "support")

        def loss(params: Params, step: int) -> Tensor:
            outputs, seen = self._forward_in_training_mode(params, support.x)
            statistics.update(new_statistics(statistics, seen))
            return cross_entropies(outputs, support.y).mean(1)

        ways = ways_of(support)
        head = self.head if ways == self.images.num_ways else self._new_head(ways)
        start = self.theta_of(params) | expand(head, num_tasks(tasks))
        for adapted, _ in self.inner.adapt(loss, start, num_steps, create_graph=False, step_sizes=step_sizes):
            yield adapted | statistics
