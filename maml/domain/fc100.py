"""FC100 (Oreshkin et al. 2018): the photos of CIFAR-100, split by kinds of things (not in the paper)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from maml.data.cache import ImageSet
from maml.data.cifar_fs import load_cifar_fs
from maml.data.photos import class_splits
from maml.domain.classification import FewShotClassification, Splits
from maml.types import Split

# CIFAR-100's table of kinds ("superclasses"), by the split of FC100.
_KINDS: dict[Split, dict[str, str]] = {
    "train": {
        "fish": "aquarium_fish flatfish ray shark trout",
        "flowers": "orchid poppy rose sunflower tulip",
        "food_containers": "bottle bowl can cup plate",
        "fruit_and_vegetables": "apple mushroom orange pear sweet_pepper",
        "household_electrical_devices": "clock keyboard lamp telephone television",
        "household_furniture": "bed chair couch table wardrobe",
        "large_man-made_outdoor_things": "bridge castle house road skyscraper",
        "large_natural_outdoor_scenes": "cloud forest mountain plain sea",
        "reptiles": "crocodile dinosaur lizard snake turtle",
        "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
        "vehicles_1": "bicycle bus motorcycle pickup_truck train",
        "vehicles_2": "lawn_mower rocket streetcar tank tractor",
    },
    "val": {
        "large_carnivores": "bear leopard lion tiger wolf",
        "large_omnivores_and_herbivores": "camel cattle chimpanzee elephant kangaroo",
        "non-insect_invertebrates": "crab lobster snail spider worm",
        "small_mammals": "hamster mouse rabbit shrew squirrel",
    },
    "test": {
        "aquatic_mammals": "beaver dolphin otter seal whale",
        "insects": "bee beetle butterfly caterpillar cockroach",
        "medium_mammals": "fox porcupine possum raccoon skunk",
        "people": "baby boy girl man woman",
    },
}
KINDS: dict[Split, dict[str, list[str]]] = {
    split: {kind: labels.split() for kind, labels in kinds.items()} for split, kinds in _KINDS.items()
}


class FC100(FewShotClassification):
    """N classes with K photos each, 32x32 RGB from 0 to 1, neither turned nor augmented.

    The files are those of CIFAR-FS. No kind of things is in two splits, so FC100 is harder.
    """

    in_shape = (32, 32, 3)
    scale = 255.0
    num_train_classes = 60

    def load(self, data_dir: Path, cache_dir: Path) -> tuple[ImageSet, Splits]:
        data = load_cifar_fs(data_dir, cache_dir)
        labels = [name.partition("/")[2] for name in data.classes]  # their split is that of CIFAR-FS
        names = {
            label: f"{split}/{kind}/{label}"
            for split, kinds in KINDS.items()
            for kind, members in kinds.items()
            for label in members
        }
        classes = [names[label] for label in labels]
        return replace(data, classes=classes), class_splits(classes)
