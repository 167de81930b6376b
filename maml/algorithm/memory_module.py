"""The memory module of Kaiser et al. (2017): learning to remember rare events (docs/protocol.md#memory-module)."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Lt
from torch import Tensor

from maml.algorithm.base import Parts
from maml.algorithm.classifier import new_statistics
from maml.algorithm.embedding import Embedding
from maml.algorithm.key_value_memory import Memory
from maml.domain.base import Metrics
from maml.errors import MamlError
from maml.hardware.memory import check_memory
from maml.model.functional import for_tasks, matmul
from maml.outer.base import Objective
from maml.pictures import Lines, Picture
from maml.seeding import Stream
from maml.types import Count, NonNegativeFloat, Params, PositiveFloat, Tasks, num_tasks, take, without_copies

_PROJECTION = "comparison.projection"
_PROJECTION_STD = 0.01  # the normal distribution is cut off at two standard deviations (authors' code)
_MEMORY = "memory."  # the entries of tasks and buffers that hold the memory
_NUM_LABELS = "memory.num_labels"
_QUERIES = "queries"  # the metric that holds the queries of a step
# The picture of a stream shows a class so many times, in about so many images altogether.
_NUM_SHOWINGS, _NUM_IMAGES = 10, 2000


class MemoryModule(Embedding):
    """Writes images into a memory, and answers with the value of the nearest key. Embeddings are learnt on streams.

    An episode is a stream of images: every class is shown once before any is shown twice, in random order. It has all
    support and query images of a task. All episodes of a meta-batch go on at the same time and share one memory; their
    classes have different labels. After each time step, one image of every episode, theta is updated and the images are
    written to the memory, so an iteration makes as many updates as an episode has images.

    In meta-test, the support images of a task are written one after the other into an empty memory, and nothing else.

    Departure: the authors' code goes on writing while it is tested. Here query images are not written, so that they are
    those of the other methods, and no answer depends on another query image.

    Args:
        parts: the domain, model, optimizers and stream.
        num_slots: number of slots of the memory in training. In meta-test, there is one for each support image.
        num_neighbors: k, number of nearest slots that the keys of the loss are chosen from.
        margin: alpha, by how much the best key of the right label has to be better than the best of a wrong one.
        dropout: share of an embedding's entries that are set to 0 in training. What is left is not scaled up, because
            queries are normalised.
        age_noise: bound of the uniform noise that is added to ages before the oldest slot is chosen.
        clear: whether the memory is emptied at the start of every meta-batch. If it is kept, it is part of the
            checkpoint, and classes of later meta-batches have labels of their own.

    Raises:
        MamlError: if the domain has no classes with support images, the model has no features, or there are fewer slots
            than neighbours.
    """

    sums_over_tasks = False  # the updates follow each other
    draws_dropout = False  # the layers drop nothing, only embeddings do

    def __init__(
        self,
        parts: Parts,
        num_slots: Count = 8192,
        num_neighbors: Count = 256,
        margin: PositiveFloat = 0.1,
        dropout: Annotated[float, Ge(0), Lt(1)] = 0.7,
        age_noise: NonNegativeFloat = 8.0,
        clear: bool = True,
    ) -> None:
        if num_neighbors > num_slots:
            raise MamlError(
                f"algorithm.num_neighbors={num_neighbors} slots cannot be found among algorithm.num_slots={num_slots}; "
                "lower num_neighbors, or raise num_slots"
            )
        if parts.outer.changes_step_size:
            raise MamlError(
                "algorithm=memory_module makes an update after every image of an episode, and a step size that changes "
                "with the number of updates would reach its end after a few iterations; set outer.schedule=null, and "
                "with outer=sgd also outer.final_step_size=null"
            )
        self.num_slots, self.num_neighbors, self.margin = num_slots, num_neighbors, margin
        self.dropout, self.age_noise, self.clear = dropout, age_noise, clear
        super().__init__(parts)
        self._statistics = list(self.buffers)
        check_memory(num_slots * self.network.num_features * 4, f"a memory of algorithm.num_slots={num_slots}")
        if not clear:
            memory = {f"{_MEMORY}{name}": value[0] for name, value in self._empty(1, num_slots)._asdict().items()}
            count = torch.zeros((), dtype=torch.int64, device=self.stream.device)
            self.set_initial(self.theta, self.buffers | memory | {_NUM_LABELS: count})

    def init_comparison(self, stream: Stream) -> Params:
        """Draws the projection of embeddings to queries, ``(D, D)``."""
        size = self.network.num_features
        return {_PROJECTION: stream.child("projection").normal((size, size), _PROJECTION_STD, bound=2)}

    def sample_tasks(self, count: int, stream: Stream) -> Tasks:
        """Draws ``count`` episodes, in the order of time: a task is a time step with one image of each episode.

        Departure: the authors' images are dark on light, with values up to 255. Here they are those of the domain.

        Raises:
            MamlError: if the memory has fewer slots than there are images.
        """
        drawn = self.domain.sample_tasks(count, stream)
        images = torch.cat([drawn["support_images"], drawn["query_images"]], dim=2).transpose(1, 2)  # (B, rounds, N)
        _, rounds, ways = images.shape
        length = rounds * ways
        if count * length > self.num_slots:
            raise MamlError(
                f"algorithm.num_slots={self.num_slots} is less than the {count * length} images of a meta-batch, "
                f"meta_batch_size={count} episodes of {length}, so that they would overwrite each other; raise "
                f"num_slots to {count * length} or more, or lower meta_batch_size"
            )
        order = stream.child("order").choice((count, rounds), ways, ways)
        classes = order.flatten(1)  # (B, L), as are all that follow
        by_episode = {
            "support_images": images.gather(2, order).flatten(1).unsqueeze(2),
            "labels": classes + ways * torch.arange(count, device=classes.device).unsqueeze(1),
            "kept": stream.child("dropout").uniform((count, length, self.network.num_features)) >= self.dropout,
        } | {name: drawn[name].gather(1, classes) for name in ("classes", "rotations") if name in drawn}
        noise = stream.child("ages").uniform((length, self.num_slots), -self.age_noise, self.age_noise)
        return {name: value.transpose(0, 1) for name, value in by_episode.items()} | {"age_noise": noise}

    def meta_update(self, objective: Objective, tasks: Tasks) -> dict[str, Tensor]:
        """Makes one update of theta for every time step, and writes the images of the step to the memory.

        Returns:
            The mean loss of all steps, and the mean accuracy of the query images.
        """
        first_label = torch.zeros((), dtype=torch.int64, device=self.stream.device)
        if self.clear:
            memory = self._empty(1, self.num_slots)
        else:
            memory = Memory(*(self.buffers[f"{_MEMORY}{name}"].unsqueeze(0) for name in Memory._fields))
            first_label += self.buffers[_NUM_LABELS]
        held = {f"{_MEMORY}{name}": value for name, value in memory._asdict().items()}
        losses, accuracies = [], []
        for step in range(num_tasks(tasks)):
            shown = take(tasks, step, step + 1)
            shown["labels"] = shown["labels"] + first_label
            metrics = self.outer.step(objective.on(shown | held), self.theta, self.outer_state)
            for name in self._statistics:
                self.buffers[name].copy_(metrics[name])
            memory.write(metrics[_QUERIES].unsqueeze(0), shown["labels"], shown["age_noise"])
            losses.append(metrics["loss"])
            accuracies.append(metrics["accuracy"])
        if not self.clear:
            self.buffers[_NUM_LABELS] += self.domain.out_dim * tasks["labels"].shape[1]
        num_support = self.domain.out_dim * self.domain.num_shots
        return {"loss": torch.stack(losses).mean(), "accuracy": torch.stack(accuracies[num_support:]).mean()}

    def task_losses(self, params: Params, tasks: Tasks) -> tuple[Tensor, Metrics]:
        """The mean loss of the images of a time step.

        Args:
            params: theta and the buffers, name -> ``(T, ...)``.
            tasks: T time steps, with the memory before them.

        Returns:
            The losses, ``(T,)``; the accuracy of the answers; the queries, ``(T, B, D)``; and the new running
            statistics.
        """
        seen: Params = {}
        x = self.domain.data(tasks, "support").x
        features = self.network.features(self.theta_of(params), x, seen=seen)
        queries = self.queries(params, features * tasks["kept"])
        memory = Memory(*(tasks[f"{_MEMORY}{name}"] for name in Memory._fields))
        losses, is_right = memory.losses(queries, tasks["labels"], self.num_neighbors, self.margin)
        metrics = {"accuracy": is_right.to(losses.dtype).mean(1), _QUERIES: queries}
        return losses.mean(1), metrics | new_statistics(params, seen)

    def queries(self, params: Params, features: Tensor) -> Tensor:
        """Returns the normalised projections of embeddings, ``(T, S, D)``."""
        projection = for_tasks(params[_PROJECTION], len(features))
        return F.normalize(matmul(features, projection.transpose(1, 2)), dim=2)

    def scores(self, params: Params, support: Tensor, query: Tensor) -> Tensor:
        """Returns the largest product of each query with a key of each class, so that the nearest key's class wins."""
        ways = support.shape[2]
        memory = self._empty(len(support), support.shape[1] * ways)
        self._show(memory, self.queries(params, support.flatten(1, 2)), ways)
        similarities = memory.similarities(self.queries(params, query))
        is_of_class = memory.values.unsqueeze(2) == torch.arange(ways, device=support.device)  # (T, M, N)
        return similarities.unsqueeze(3).masked_fill(~is_of_class.unsqueeze(1), -torch.inf).amax(2)

    def loss(self, params: Params, support: Tensor, query: Tensor, labels: Tensor) -> tuple[Tensor, Metrics]:
        """Returns the margin loss of query images, by which an embedding is fine-tuned; training has `task_losses`."""
        scores = self.scores(params, support, query)
        is_right = F.one_hot(labels, scores.shape[2]).bool()
        right, wrong = scores[is_right].view_as(labels), scores.masked_fill(is_right, -torch.inf).amax(2)
        return (F.relu(wrong - right + self.margin) - self.margin).mean(1), {}

    def pictures(self, params: Params, tasks: Tasks, num_steps: int) -> dict[str, Picture]:
        """Returns the accuracy over a stream of test classes: each image is answered, then written."""
        ways = tasks["classes"].shape[1]
        count = max(1, _NUM_IMAGES // (_NUM_SHOWINGS * ways))
        stream = Stream(0, self.stream.device).child("showings")
        try:
            drawn = self.domain.with_ways(ways).sample_tasks(count, stream, "test", _NUM_SHOWINGS - 1, 1)
        except MamlError:  # a class has fewer images than showings
            return {}
        params, queries = without_copies(params), []
        for start in range(count):  # the feature maps of all images at once would take too much memory
            task = take(drawn, start, start + 1)
            x = torch.cat([self.domain.data(task, "support").x, self.domain.data(task, "query").x], dim=1)
            queries.append(self.queries(params, self.network.features(params, x)))
        memory = self._empty(count, _NUM_SHOWINGS * ways)
        right = self._show(memory, torch.cat(queries), ways)
        by_showing = right.unflatten(1, (_NUM_SHOWINGS, ways)).to(memory.keys.dtype).mean((0, 2))
        lines = Lines(
            title=f"Accuracy over a stream of {ways} new classes",
            x_label="images of the class before",
            y_label="accuracy",
            lines={self.name: by_showing.tolist()},
        )
        return {"accuracy_by_showing": lines}

    def _show(self, memory: Memory, queries: Tensor, ways: int) -> Tensor:
        """Answers images one after the other and writes them to empty memories with a slot for each of them.

        Args:
            memory: T memories.
            queries: blocks of one image of each of N classes, ``(T, S, D)``.
            ways: N.

        Returns:
            Whether the value of the nearest key was right, ``(T, S)``.
        """
        right = []
        noise = torch.zeros_like(memory.ages)  # the oldest slots are empty ones, which are all alike
        for i, image in enumerate(queries.detach().split(1, dim=1)):
            label = torch.full_like(memory.values[:, :1], i % ways)
            is_empty = (memory.values < 0).unsqueeze(1)
            nearest = memory.similarities(image).masked_fill(is_empty, -torch.inf).argmax(2)
            right.append(memory.values_at(nearest) == label)
            memory.write(image, label, noise)
        return torch.cat(right, 1)

    def _empty(self, num_memories: int, num_slots: int) -> Memory:
        return Memory.empty(num_memories, num_slots, self.network.num_features, self.stream.device)
