"""All pictures of a run, each with its subset's options and its bucket, and how often an epoch uses each."""

import logging
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

from lora_adapters.train.data.batches import Group
from lora_adapters.train.data.buckets import Buckets, Placement, Size
from lora_adapters.train.data.config import DataConfig, DatasetConfig, SubsetConfig
from lora_adapters.train.data.sources import Found, SubsetPictures, load_subset
from lora_adapters.train.data_error import DataError
from lora_adapters.train.seeding import python_random

logger = logging.getLogger(__name__)
# What varies a picture or a caption from one time to the next has no place in a measurement.
STEADY: dict[str, Any] = {
    "shuffle_caption": False, "caption_dropout_rate": 0.0, "caption_dropout_every_n_epochs": 0,
    "caption_tag_dropout_rate": 0.0, "token_warmup_step": 0.0, "flip_aug": False, "color_aug": False,
    "random_crop": False, "num_repeats": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """One picture of one subset."""

    found: Found
    subset: SubsetConfig
    dataset: int
    placement: Placement


@dataclass
class LoadedSubset:
    """A subset with its pictures, of one side of the validation split, and what could not be used."""

    config: SubsetConfig
    dataset: int
    pictures: list[Found]
    skipped: int = 0
    without_caption: int = 0


@dataclass
class PictureSet:
    """`entries` are the uses of an epoch: each is a number in `pictures`. `groups` cut the entries by bucket."""

    datasets: tuple[DatasetConfig, ...]
    subsets: list[LoadedSubset]
    shuffle: bool
    pictures: list[Picture] = field(default_factory=list)
    entries: list[int] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    group_buckets: list[tuple[int, Size]] = field(default_factory=list)  # (dataset, bucket) of each group

    def __post_init__(self) -> None:
        for number, dataset in enumerate(self.datasets):
            self._add(number, dataset)

    def count(self, *, regularisation: bool) -> int:
        """Entries of an epoch that are, or are not, regularisation pictures."""
        return sum(self.pictures[number].subset.is_reg == regularisation for number in self.entries)

    def dataset_count(self, dataset: int, *, regularisation: bool) -> int:
        """The same of one dataset."""
        mine = (self.pictures[number] for number in self.entries)
        return sum(other.dataset == dataset and other.subset.is_reg == regularisation for other in mine)

    def _add(self, number: int, dataset: DatasetConfig) -> None:
        buckets = Buckets(dataset)
        training: list[tuple[int, int]] = []  # (picture, repeats)
        regularisation: list[tuple[int, int]] = []
        for loaded in (loaded for loaded in self.subsets if loaded.dataset == number):
            for found in loaded.pictures:
                picture = len(self.pictures)
                self.pictures.append(Picture(found, loaded.config, number, buckets.place(found.size)))
                kind = regularisation if loaded.config.is_reg else training
                kind.append((picture, loaded.config.num_repeats))
        uses = training + matched(regularisation, sum(repeats for _, repeats in training))
        members: dict[Size, list[int]] = defaultdict(list)
        for picture, repeats in uses:
            members[self.pictures[picture].placement.bucket] += range(len(self.entries), len(self.entries) + repeats)
            self.entries += [picture] * repeats
        for bucket in sorted(members):
            self.groups.append(Group(dataset.batch_size, members[bucket]))
            self.group_buckets.append((number, bucket))


def matched(regularisation: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """Regularisation pictures with their repeats raised, one by one from the first, until they number `count`.

    Their own repeats come first; pictures beyond `count` are not used.
    """
    uses: dict[int, int] = {}
    total = 0
    while regularisation and total < count:
        first_round = not uses
        for picture, repeats in regularisation:
            more = repeats if first_round else 1
            uses[picture] = uses.get(picture, 0) + more
            total += more
            if total >= count:
                break
    return list(uses.items())


def load_pictures(config: DataConfig, seed: int) -> tuple[PictureSet, PictureSet | None]:
    """(training pictures, held-out pictures or None). Raises DataError where nothing is left to train on."""
    training: list[LoadedSubset] = []
    held_out: list[LoadedSubset] = []
    for number, dataset in enumerate(config.datasets):
        validation_seed = seed if dataset.validation_seed is None else dataset.validation_seed
        for subset in _distinct(dataset):
            loaded = load_subset(subset)
            keep, hold = loaded.pictures, list[Found]()
            if dataset.validation_split > 0 and not subset.is_reg:
                keep, hold = split(loaded, dataset.validation_split, validation_seed)
            training.append(LoadedSubset(subset, number, keep, len(loaded.skipped), loaded.without_caption))
            if hold:
                held_out.append(LoadedSubset(replace(subset, **STEADY), number, hold))
    pictures = PictureSet(config.datasets, training, shuffle=True)
    if pictures.count(regularisation=False) == 0:
        only = "only regularisation pictures" if training else "every subset has num_repeats 0"
        raise DataError(f"nothing to train on: {only}")
    wanted = [dataset for dataset in config.datasets if dataset.validation_split > 0]
    if wanted and not held_out:
        raise DataError("validation_split leaves no picture for validation: the subsets have one picture each")
    return pictures, PictureSet(config.datasets, held_out, shuffle=False) if held_out else None


def split(loaded: SubsetPictures, part: float, seed: int) -> tuple[list[Found], list[Found]]:
    """(kept, held out): `part` of the pictures, at least one where there are two, drawn by `seed` and kept in order."""
    count = len(loaded.pictures)
    hold = min(max(1, round(count * part)), count - 1)
    chosen = set(python_random(seed, "validation", count).sample(range(count), hold))
    kept = [found for index, found in enumerate(loaded.pictures) if index not in chosen]
    return kept, [loaded.pictures[index] for index in sorted(chosen)]


def _distinct(dataset: DatasetConfig) -> list[SubsetConfig]:
    """The subsets that are used: those with repeats, and of several on the same pictures the first."""
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
