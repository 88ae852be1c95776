"""Which images make a batch, in which order, and how several processes share them.

An entry is one use of one image in an epoch; entries have numbers. Nothing here knows what an image is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from lora_adapters.train.seeding import python_random


@dataclass(frozen=True)
class Group:
    """Entries that may share a batch: one dataset, one bucket."""

    batch_size: int
    entries: Sequence[int]


@dataclass(frozen=True)
class Share:
    """One process's part of a batch of `total` entries, from number `start` on, and the factor on the loss of each."""

    entries: tuple[int, ...]
    weights: tuple[float, ...]
    start: int
    total: int


@dataclass
class Batch:
    """One batch on the CPU, b samples of one size. Sizes and crops are (height, width) and (top, left) in pixels.

    loss_weights multiply each sample's loss before the mean over the batch. sample_seeds are one number a sample that
    depends on the run's seed, the epoch and the sample alone: noise drawn from them is the same for any number of
    processes and after a resume. The b samples are those from number `start` on of `total` in all processes.
    """

    images: torch.Tensor | None  # (b, 3, height, width) in [-1, 1]; None where latents are cached
    latents: torch.Tensor | None  # (b, 4, height/8, width/8), unscaled; None if they are not cached
    captions: list[str]
    text: dict[str, torch.Tensor] | None  # cached text-encoder outputs, (b, ...) each
    loss_weights: torch.Tensor  # (b,)
    masks: torch.Tensor | None  # (b, 1, height/8, width/8) in [0, 1]; None if no sample has one
    original_sizes: torch.Tensor  # (b, 2) int64
    crop_top_lefts: torch.Tensor  # (b, 2) int64
    target_sizes: torch.Tensor  # (b, 2) int64
    sample_seeds: torch.Tensor  # (b,) int64
    start: int
    total: int
    damaged: dict[str, str] = field(default_factory=dict)  # images that others stand in for: the reason, by name

    def pin_memory(self) -> "Batch":
        """The same in page-locked memory; the data loader calls it."""
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.pin_memory())
        if self.text is not None:
            self.text = {name: value.pin_memory() for name, value in self.text.items()}
        return self


def batch_count(groups: Sequence[Group], world_size: int) -> int:
    """Batches in an epoch, the same for every process."""
    return sum(math.ceil(len(group.entries) / (group.batch_size * world_size)) for group in groups)


def plan_epoch(groups: Sequence[Group], seed: int, epoch: int, world_size: int, *, shuffle: bool) -> list[list[int]]:
    """The batches of an epoch over all processes together, in order.

    Each group is shuffled and cut into batches of batch_size * world_size, of which the last may be smaller; then the
    batches are shuffled. So w processes with batch size b see the batches of one process with batch size w * b.

    Args:
        groups: Images that may share a batch: those of one dataset and bucket.
        seed: The seed of the run.
        epoch: The number of the epoch, from 0.
        world_size: The number of processes.
        shuffle: False keeps the order of the entries.

    Returns:
        Lists of entries.
    """
    batches = []
    for number, group in enumerate(groups):
        entries = list(group.entries)
        if shuffle:
            python_random(seed, "group", epoch, number).shuffle(entries)
        size = group.batch_size * world_size
        batches += [entries[start : start + size] for start in range(0, len(entries), size)]
    if shuffle:
        python_random(seed, "batches", epoch).shuffle(batches)
    return batches


def share(batch: Sequence[int], rank: int, world_size: int) -> Share:
    """The part of a batch that a process trains, with weights that make the gradients those of one process.

    A batch that does not divide evenly is distributed as evenly as possible. If it has fewer entries than there are
    processes, the others get its first entry with weight 0. With the weights the mean over processes of the mean over
    each part equals the mean over the whole batch.

    Args:
        batch: The entries of the batch of all processes.
        rank: The number of the process, from 0.
        world_size: The number of processes.

    Returns:
        Consecutive entries and their weights.
    """
    total = len(batch)
    size, rest = divmod(total, world_size)
    start = rank * size + min(rank, rest)
    mine = tuple(batch[start : start + size + (rank < rest)])
    if not mine:
        return Share((batch[0],), (0.0,), 0, total)
    return Share(mine, (len(mine) * world_size / total,) * len(mine), start, total)
