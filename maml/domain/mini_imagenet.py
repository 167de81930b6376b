"""Mini-ImageNet (Vinyals et al. 2016, split by Ravi and Larochelle 2017): 100 classes of 600 photos (section 5.2)."""

from __future__ import annotations

from pathlib import Path

from maml.data.cache import ImageSet
from maml.data.mini_imagenet import check_provided, load_mini_imagenet
from maml.data.photos import class_splits
from maml.domain.classification import FewShotClassification, Splits


class MiniImagenet(FewShotClassification):
    """N classes with K photos each, 84x84 RGB from 0 to 1, neither turned nor augmented.

    The user provides the files. They may not be redistributed, so nothing is downloaded.
    """

    in_shape = (84, 84, 3)
    scale = 255.0
    num_train_classes = 64

    def load(self, data_dir: Path, cache_dir: Path) -> tuple[ImageSet, Splits]:
        data = load_mini_imagenet(data_dir, cache_dir)
        return data, class_splits(data.classes)

    def check_available(self) -> None:
        check_provided(self.data_dir, self.cache_dir)
