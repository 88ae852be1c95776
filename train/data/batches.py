"""Which images form a batch, in which order, and how several processes share them.

An entry is one use of one image in an epoch. Entries are only numbers here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from lora_adapters.train.seeding import python_random


@dataclass(frozen=True)
class Group:
    """Entries of the same dataset and bucket, which may share a batch."""

    batch_size: int
    entries: Sequence[int]


@dataclass(frozen=True)
class Share:
    """One process's entries of a batch of `total` entries, from index `start` on, with a loss weight for each."""

    entries: tuple[int, ...]
    weights: tuple[float, ...]
    start: int
    total: int


@dataclass
class Batch:
    """A batch of b samples of the same size, on the CPU. Sizes are (height, width) and crops (top, left), in pixels.

    loss_weights multiply each sample's loss before the mean over the batch. sample_seeds depend only on the run's seed,
    the epoch and the sample, so that noise drawn from them is the same for any number of processes and after resuming.
    The b samples start at index `start` of the `total` samples of all processes.
    """

    images: torch.Tensor | None  # (b, 3, height, width) in [-1, 1]; None if latents are cached
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
    damaged: dict[str, str] = field(default_factory=dict)  # images that were replaced by others: name -> reason

    def pin_memory(self) -> "Batch":
        """Move the tensors to page-locked memory; the data loader calls it."""
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.pin_memory())
        if self.text is not None:
            self.text = {name: value.pin_memory() for name, value in self.text.items()}
        return self


def batch_count(groups: Sequence[Group], world_size: int) -> int:
    """The number of batches in an epoch, which is the same for every process."""
    return sum(math.ceil(len(group.entries) / (group.batch_size * world_size)) for group in groups)


def plan_epoch(groups: Sequence[Group], seed: int, epoch: int, world_size: int, *, shuffle: bool) -> list[list[int]]:
    """The batches of an epoch for all processes together, in order.

    Each group is shuffled and cut into batches of batch_size * world_size (the last may be smaller); then the batches
    are shuffled. So w processes with batch size b get the batches of one process with batch size w * b.

    Args:
        groups: Groups of entries that may share a batch.
        seed: The seed of the run.
        epoch: The number of the epoch, from 0.
        world_size: The number of processes.
        shuffle: False keeps the order of the entries.

    Returns:
        A list of entries for each batch.
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
    """One process's share of a batch, with loss weights that give the same gradients as a single process.

    A batch is distributed as evenly as possible. If it has fewer entries than there are processes, the remaining
    processes get its first entry with weight 0. With the weights, the mean over processes of the mean over each share
    equals the mean over the whole batch.

    Args:
        batch: The entries of the batch for all processes.
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
