"""The neural statistician (Edwards and Storkey 2017): sets have a context, and alike contexts are one class."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le, Lt
from torch import Tensor

from maml.algorithm.base import Parts
from maml.algorithm.classifier import new_statistics
from maml.algorithm.embedding import Embedding
from maml.domain.base import Metrics
from maml.errors import MamlError
from maml.model.statistician import DiagonalNormal, Statistician, per_image
from maml.pictures import Images, Picture
from maml.seeding import Stream
from maml.types import Params, Tasks

_NUM_PICTURED, _NUM_SAMPLES = 4, 5  # sets in a picture, and images that are drawn for each


class NeuralStatistician(Embedding):
    """Learns a generative model of sets of images: a context c for each set, a latent z for each image.

    The loss is minus the evidence lower bound of a set D,

        sum_x E log p(x | z, c) - KL(q(c | D) || N(0, 1)) - sum_x E KL(q(z | x, c) || p(z | c)),

    with one sample of c for each set and one of z for each image, and divided by the number of images. The support
    images of a class are a set; query images are not used in training.

    In meta-test, a query image is a set of one. The label is the class whose q(c | D) has the least divergence from
    the query's.

    All random draws of the loss are made in `sample_tasks`, so they follow from the run's stream alone.

    Departure: a public reimplementation weighs reconstructions more than divergences at first, and clips the gradient.
    Here the loss is the bound itself, as in the paper.

    Args:
        parts: the domain, model, optimizers and stream.
        kl: the divergence in meta-test. ``query_to_class`` is KL(q(c | x) || q(c | D)), the literal reading of the
            paper; ``class_to_query`` is KL(q(c | D) || q(c | x)).
        sample_dropout: probability that an image is left out of q(c | D) in training. The first image of a set never
            is.
        dilation: probability that the strokes of an image are made wider by a pixel on each side in training.
        reflections: whether half of the sets are mirrored in training.

    Raises:
        MamlError: if the domain has no classes with support images, or images with other than one channel, or if the
            model is not `Statistician`.
    """

    def __init__(
        self,
        parts: Parts,
        kl: Literal["query_to_class", "class_to_query"] = "query_to_class",
        sample_dropout: Annotated[float, Ge(0), Lt(1)] = 0.5,
        dilation: Annotated[float, Ge(0), Le(1)] = 0.5,
        reflections: bool = True,
    ) -> None:
        super().__init__(parts)
        if not isinstance(self.network, Statistician):
            raise MamlError(
                f"NeuralStatistician needs networks that {type(self.network).__name__} does not have, such as an "
                "encoder of sets and a decoder of images: choose model=statistician"
            )
        self.statistician = self.network
        if self.domain.in_shape[-1] != 1:
            raise MamlError(
                f"NeuralStatistician models black and white images, but those of {type(self.domain).__name__} have "
                f"{self.domain.in_shape[-1]} channels: choose domain=omniglot, or domain=image_folder with "
                "domain.pixels=drawing or grey"
            )
        self.kl = kl
        self.sample_dropout, self.dilation, self.reflections = sample_dropout, dilation, reflections

    def sample_tasks(self, count: int, stream: Stream) -> Tasks:
        """Draws tasks, and all that is random in their loss.

        Returns:
            The tasks of the domain, and ``sets``, the black and white images, ``(T, K * N, H, W, 1)``; ``is_pooled``,
            which images the context sees, ``(T, K, N)``; and the noise of the samples of c, ``(T, N, context_size)``,
            and of z, ``(T, K * N, latent_size)``.
        """
        tasks = super().sample_tasks(count, stream)
        support, stream = self.domain.data(tasks, "support"), stream.child("loss")
        shots, sets = support.num_shots, support.x.shape[1] // support.num_shots
        x = support.x.unflatten(1, (shots, sets))  # (T, K, N, H, W, 1)
        if self.reflections:
            is_mirrored = stream.child("reflections").uniform((count, 1, sets, 1, 1, 1)) < 0.5
            x = torch.where(is_mirrored, x.flip(4), x)
        # Departure: the paper does not say which images it dilates, how often and by how much. We draw it for each
        # image, and add the four neighbours of a pixel.
        if self.dilation:
            is_wide = stream.child("dilation").uniform((count, shots, sets, 1, 1, 1)) < self.dilation
            x = torch.where(is_wide, dilate(x), x)
        x = x > stream.child("binarization").uniform(x.shape)
        # Departure: the paper does not say how many images are left out. This is the rule of a public reimplementation.
        is_pooled = stream.child("sample_dropout").uniform((count, shots, sets)) >= self.sample_dropout
        is_pooled[:, 0] = True
        sizes = self.statistician.context_size, self.statistician.latent_size
        return tasks | {
            "sets": x.flatten(1, 2).to(support.x.dtype),
            "is_pooled": is_pooled,
            "context_noise": stream.child("context").normal((count, sets, sizes[0])),
            "latent_noise": stream.child("latent").normal((count, shots * sets, sizes[1])),
        }

    def task_losses(self, params: Params, tasks: Tasks) -> tuple[Tensor, Metrics]:
        """Minus the bound per image, in nats; its terms; and the new running statistics."""
        seen: Params = {}
        terms = self.terms(self.theta_of(params), tasks, seen)
        return torch.stack(list(terms.values())).sum(0), terms | new_statistics(params, seen)

    def terms(self, params: Params, tasks: Tasks, seen: Params | None = None) -> Metrics:
        """Returns the three terms of minus the bound, each per image and a mean over the sets of a task, ``(T,)``.

        Args:
            params: name -> ``(T, ...)``, with running statistics or without, as in `Model.features`.
            tasks: T tasks that `sample_tasks` has drawn.
            seen: as in `Model.features`.
        """
        network, x, is_pooled = self.statistician, tasks["sets"], tasks["is_pooled"].to(tasks["sets"].dtype)
        shots = is_pooled.shape[1]
        codes = network.encode(params, x, seen=seen)
        embedded = network.embed(params, codes, seen=seen).unflatten(1, (shots, -1))
        counts = is_pooled.sum(1)
        means = (embedded * is_pooled.unsqueeze(3)).sum(1) / counts.unsqueeze(2)
        contexts = network.context(params, means, counts, seen)
        c = contexts.sample(tasks["context_noise"])
        latents, priors = network.posterior(params, codes, c, seen), network.prior(params, c, seen)
        logits = network.decode(params, latents.sample(tasks["latent_noise"]), c, seen)
        priors = DiagonalNormal(*(per_image(value, x.shape[1]) for value in priors))
        pixels = F.binary_cross_entropy_with_logits(logits, x, reduction="none")
        return {
            "reconstruction": pixels.flatten(2).sum(2).mean(1),
            "kl_context": contexts.kl().mean(1) / shots,
            "kl_latent": latents.kl(priors).mean(1),
        }

    def scores(self, params: Params, support: Tensor, query: Tensor) -> Tensor:
        """Returns minus the divergence of q(c | x) of a query image and q(c | D) of each class."""
        counts = support.new_full((len(support), support.shape[2]), support.shape[1])
        classes = self.statistician.context(params, support.mean(1), counts)
        asked = self.statistician.context(params, query, torch.ones_like(query[..., 0]))
        # One class at a time, because the terms of the divergence are context_size times as many numbers.
        divergences = []
        for way in range(support.shape[2]):
            one = DiagonalNormal(*(value[:, way : way + 1] for value in classes))
            divergences.append(asked.kl(one) if self.kl == "query_to_class" else one.kl(asked))
        return -torch.stack(divergences, 2)

    def pictures(self, params: Params, tasks: Tasks, num_steps: int) -> dict[str, Picture]:
        """Returns images that are drawn from the model, given the support images of some classes of the first task.

        An image shows the probabilities of its pixels, for the mean of q(c | D) and a sample of z.
        """
        support = self.domain.data(tasks, "support")
        shots = support.num_shots
        images = support.x[:1].unflatten(1, (shots, -1))[:, :, :_NUM_PICTURED]  # (1, K, N, H, W, 1)
        sets, own = images.shape[2], {name: value[:1] for name, value in params.items()}
        embedded = self.statistician.features(own, images.flatten(1, 2)).unflatten(1, (shots, sets))
        c = self.statistician.context(own, embedded.mean(1), embedded.new_full((1, sets), shots)).mean
        # The noise is the same in every picture, so that pictures of two runs can be compared.
        noise = Stream(0, c.device).child("pictures").normal((1, _NUM_SAMPLES * sets, self.statistician.latent_size))
        prior = DiagonalNormal(*(per_image(value, _NUM_SAMPLES * sets) for value in self.statistician.prior(own, c)))
        drawn = self.statistician.decode(own, prior.sample(noise), c).sigmoid().unflatten(1, (_NUM_SAMPLES, sets))
        rows = {}
        for number in range(sets):
            rows[f"given {number + 1}"] = images[0, :, number, :, :, 0].cpu()
            rows[f"drawn {number + 1}"] = drawn[0, :, number, :, :, 0].cpu()
        plural = "s" * (shots > 1)
        return {"samples": Images(f"Samples, given {shots} image{plural} of a class", rows)}


def dilate(x: Tensor) -> Tensor:
    """Returns the largest value of each pixel and its four neighbours, of images ``(..., H, W, 1)``."""
    planes = x.flatten(0, -4).squeeze(-1)
    along_rows = F.max_pool2d(planes, (1, 3), stride=1, padding=(0, 1))
    along_columns = F.max_pool2d(planes, (3, 1), stride=1, padding=(1, 0))
    return torch.maximum(along_rows, along_columns).view_as(x)
