"""CIFAR-FS (Bertinetto et al. 2019): small photos of CIFAR-100, with mini-ImageNet's counts (not in the paper)."""

from __future__ import annotations

from pathlib import Path

from maml.data.cache import ImageSet
from maml.data.cifar_fs import load_cifar_fs
from maml.data.photos import class_splits
from maml.domain.classification import FewShotClassification, Splits


class CifarFS(FewShotClassification):
    """N classes with K photos each, 32x32 RGB from 0 to 1, neither turned nor augmented."""

    in_shape = (32, 32, 3)
    scale = 255.0
    num_train_classes = 64

    def load(self, data_dir: Path, cache_dir: Path) -> tuple[ImageSet, Splits]:
        data = load_cifar_fs(data_dir, cache_dir)
        return data, class_splits(data.classes)
