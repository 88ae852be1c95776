"""All images of a run with their subset's options, their bucket and their repeats in an epoch."""

import logging
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

from lora_adapters.train.data.batches import Group
from lora_adapters.train.data.buckets import Buckets, Placement, Size
from lora_adapters.train.data.config import DataConfig, DatasetConfig, SubsetConfig
from lora_adapters.train.data.sources import SourceImage, SubsetImages, load_subset
from lora_adapters.train.data_error import DataError
from lora_adapters.train.seeding import python_random

logger = logging.getLogger(__name__)
# Options for validation images: without random variation of images and captions.
STEADY: dict[str, Any] = {
    "shuffle_caption": False, "caption_dropout_rate": 0.0, "caption_dropout_every_n_epochs": 0,
    "caption_tag_dropout_rate": 0.0, "token_warmup_step": 0.0, "flip_aug": False, "color_aug": False,
    "random_crop": False, "num_repeats": 1,
}  # fmt: skip


@dataclass(frozen=True)
class TrainingImage:
    """One image of one subset."""

    origin: SourceImage
    subset: SubsetConfig
    dataset: int
    placement: Placement


@dataclass
class LoadedSubset:
    """A subset with its images, either for training or held out, and the number of unusable images."""

    config: SubsetConfig
    dataset: int
    images: list[SourceImage]
    skipped: int = 0
    without_caption: int = 0


@dataclass
class ImageSet:
    """The images of a run. `entries` are the uses in an epoch, as indices of `images`; `groups` has them by bucket."""

    datasets: tuple[DatasetConfig, ...]
    subsets: list[LoadedSubset]
    shuffle: bool
    images: list[TrainingImage] = field(default_factory=list)
    entries: list[int] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    group_buckets: list[tuple[int, Size]] = field(default_factory=list)  # (dataset, bucket) of each group

    def __post_init__(self) -> None:
        for number, dataset in enumerate(self.datasets):
            self._add(number, dataset)

    def count(self, *, regularisation: bool) -> int:
        """The number of entries of an epoch that are, or are not, regularisation images."""
        return sum(self.images[number].subset.is_reg == regularisation for number in self.entries)

    def dataset_count(self, dataset: int, *, regularisation: bool) -> int:
        """The same for one dataset."""
        mine = (self.images[number] for number in self.entries)
        return sum(other.dataset == dataset and other.subset.is_reg == regularisation for other in mine)

    def _add(self, number: int, dataset: DatasetConfig) -> None:
        buckets = Buckets(dataset)
        training: list[tuple[int, int]] = []  # (image, repeats)
        regularisation: list[tuple[int, int]] = []
        for loaded in (loaded for loaded in self.subsets if loaded.dataset == number):
            for origin in loaded.images:
                image = len(self.images)
                self.images.append(TrainingImage(origin, loaded.config, number, buckets.place(origin.size)))
                kind = regularisation if loaded.config.is_reg else training
                kind.append((image, loaded.config.num_repeats))
        uses = training + matched(regularisation, sum(repeats for _, repeats in training))
        members: dict[Size, list[int]] = defaultdict(list)
        for image, repeats in uses:
            members[self.images[image].placement.bucket] += range(len(self.entries), len(self.entries) + repeats)
            self.entries += [image] * repeats
        for bucket in sorted(members):
            self.groups.append(Group(dataset.batch_size, members[bucket]))
            self.group_buckets.append((number, bucket))


def matched(regularisation: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """Choose regularisation images for a number of training images.

    Args:
        regularisation: (image, repeats) of each regularisation image.
        count: The number of training images, with repeats.

    Returns:
        (image, repeats) of the images to use. If there are too few, repeats are increased by one from the first image
        on until they add up to `count`; if there are too many, the last images are not used.
    """
    uses: dict[int, int] = {}
    total = 0
    while regularisation and total < count:
        first_round = not uses
        for image, repeats in regularisation:
            more = repeats if first_round else 1
            uses[image] = uses.get(image, 0) + more
            total += more
            if total >= count:
                break
    return list(uses.items())


def load_images(config: DataConfig, seed: int) -> tuple[ImageSet, ImageSet | None]:
    """Load (training images, held-out images or None). DataError if there is nothing to train on."""
    training: list[LoadedSubset] = []
    held_out: list[LoadedSubset] = []
    for number, dataset in enumerate(config.datasets):
        validation_seed = seed if dataset.validation_seed is None else dataset.validation_seed
        for subset in _distinct(dataset):
            loaded = load_subset(subset)
            keep, hold = loaded.images, list[SourceImage]()
            if dataset.validation_split > 0 and not subset.is_reg:
                keep, hold = split(loaded, dataset.validation_split, validation_seed)
            training.append(LoadedSubset(subset, number, keep, len(loaded.skipped), loaded.without_caption))
            if hold:
                held_out.append(LoadedSubset(replace(subset, **STEADY), number, hold))
    images = ImageSet(config.datasets, training, shuffle=True)
    if images.count(regularisation=False) == 0:
        only = "only regularisation images" if training else "every subset has num_repeats 0"
        raise DataError(f"nothing to train on: {only}")
    validated = [dataset for dataset in config.datasets if dataset.validation_split > 0]
    if validated and not held_out:
        raise DataError("validation_split leaves no image for validation: the subsets have one image each")
    return images, ImageSet(config.datasets, held_out, shuffle=False) if held_out else None


def split(loaded: SubsetImages, part: float, seed: int) -> tuple[list[SourceImage], list[SourceImage]]:
    """Split images into (kept, held out). The held-out `part`, at least one of two images, is drawn with `seed`."""
    count = len(loaded.images)
    hold = min(max(1, round(count * part)), count - 1)
    chosen = set(python_random(seed, "validation", count).sample(range(count), hold))
    kept = [image for index, image in enumerate(loaded.images) if index not in chosen]
    return kept, [loaded.images[index] for index in sorted(chosen)]


def _distinct(dataset: DatasetConfig) -> list[SubsetConfig]:
    """The subsets that are used: those with repeats, and only the first of several with the same images."""
    seen, used = set(), []
    for subset in dataset.subsets:
        place = (
            subset.metadata_file or subset.image_dir,
            subset.dataset_name,
            subset.dataset_config_name,
            subset.split,
        )
        if subset.num_repeats == 0:
            logger.warning("%s has num_repeats 0 and is left out", subset.name)
        elif place in seen:
            logger.warning("%s is given twice in a dataset; the first is used", subset.name)
        else:
            seen.add(place)
            used.append(subset)
    return used
