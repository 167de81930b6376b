"""CIFAR-FS (Bertinetto et al. 2019): mini-ImageNet's counts with the small photos of CIFAR-100 (not in the paper)."""

from __future__ import annotations

from pathlib import Path

from maml.data.cifar_fs import load_cifar_fs
from maml.data.photos import class_splits
from maml.domain.classification import FewShotClassification
from maml.types import Count


class CifarFS(FewShotClassification):
    """N classes, K photos of each, 32x32 RGB in 0 to 1, as they are: neither turned nor augmented.

    Args:
        num_ways: N.
        num_shots: K.
        num_query: query photos per class in training; None is K.
        data_dir: where the original files are.
        cache_dir: where the tensor built from them is kept.

    Raises:
        MamlError: if files are missing or damaged, or a class has fewer photos than a task needs.
    """

    def __init__(
        self, num_ways: Count, num_shots: Count, data_dir: str, cache_dir: str, num_query: Count | None = None
    ) -> None:
        data = load_cifar_fs(Path(data_dir), Path(cache_dir))
        super().__init__(data, class_splits(data.classes), num_ways, num_shots, num_query, scale=255.0, rotate=False)
