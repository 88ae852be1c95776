"""Loads batches: from entry numbers to tensors.

A damaged image is replaced by another one of its bucket, whose choice depends only on the seed, the epoch and the
entry, and not on workers, processes or resuming.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from PIL import Image
from torch.utils.data import Dataset

from lora_adapters.convert.errors import first_line
from lora_adapters.train.data.batches import Batch, Share, batch_count, plan_epoch, share
from lora_adapters.train.data.cache_files import CachedLatents, read_latents, read_text
from lora_adapters.train.data.captions import Moment, draw_caption
from lora_adapters.train.data.config import VAE_FACTOR
from lora_adapters.train.data.image_files import FileSource, open_image
from lora_adapters.train.data.image_set import ImageSet, TrainingImage
from lora_adapters.train.data.transforms import (
    Variation,
    crop_as_seen,
    image_tensor,
    latent_mask,
    mask_tensor,
    to_rgb,
    vary,
)
from lora_adapters.train.data_error import DataError
from lora_adapters.train.seeding import derive, python_random


@dataclass(frozen=True)
class Order:
    """Everything that a worker process needs to load one batch."""

    epoch: int
    step: int
    share: Share


@dataclass(frozen=True)
class Sample:
    """A loaded entry. mask: (1, height/8, width/8); sizes are (height, width), crop is (top, left).

    text: cached text-encoder outputs. weight: the loss weight.
    """

    image: torch.Tensor | None
    latents: torch.Tensor | None
    mask: torch.Tensor | None
    crop: tuple[int, int]
    original: tuple[int, int]
    target: tuple[int, int]
    caption: str
    text: dict[str, torch.Tensor] | None
    weight: float


class BatchReader(Dataset):
    """Loads batches from orders. `latents` and `text` are caches with an entry for each image: tensors, or a path."""

    def __init__(self, images: ImageSet, seed: int, prior_loss_weight: float) -> None:
        self.images, self.seed, self.prior_loss_weight = images, seed, prior_loss_weight
        self.max_train_steps: int | None = None
        self.accumulation = 1
        self.latents: list[CachedLatents | str | DataError] | None = None
        self.text: list[dict[str, torch.Tensor] | str] | None = None

    def batch_count(self, world_size: int) -> int:
        return batch_count(self.images.groups, world_size)

    def orders(self, epoch: int, start: int, rank: int, world_size: int) -> list[Order]:
        """The orders of process `rank` for an epoch from batch `start` on. Unshuffled data always uses epoch 0."""
        plan = plan_epoch(self.images.groups, self.seed, epoch, world_size, shuffle=self.images.shuffle)
        epoch = epoch if self.images.shuffle else 0
        first_step = epoch * math.ceil(len(plan) / self.accumulation)
        return [
            Order(epoch, first_step + number // self.accumulation, share(plan[number], rank, world_size))
            for number in range(start, len(plan))
        ]

    def __getitem__(self, order: Order) -> Batch | DataError:
        """Load a batch. A DataError is returned, not raised, since the DataLoader would change its message."""
        try:
            return self._batch(order)
        except DataError as error:
            return error

    def _batch(self, order: Order) -> Batch:
        damaged: dict[str, str] = {}
        samples = [self._sample(entry, order, damaged) for entry in order.share.entries]
        weights = [weight * sample.weight for weight, sample in zip(order.share.weights, samples, strict=True)]
        seeds = [derive(self.seed, "sample", order.epoch, entry) for entry in order.share.entries]
        return Batch(
            images=_stack([sample.image for sample in samples]),
            latents=_stack([sample.latents for sample in samples]),
            captions=[sample.caption for sample in samples],
            text=_stack_text([sample.text for sample in samples]),
            loss_weights=torch.tensor(weights),
            masks=_stack_masks(samples),
            original_sizes=torch.tensor([sample.original for sample in samples]),
            crop_top_lefts=torch.tensor([sample.crop for sample in samples]),
            target_sizes=torch.tensor([sample.target for sample in samples]),
            sample_seeds=torch.tensor(seeds),
            start=order.share.start,
            total=order.share.total,
            damaged=damaged,
        )

    def _sample(self, entry: int, order: Order, damaged: dict[str, str]) -> Sample:
        """Load the entry's image, another one of its bucket if it is damaged, or else a blank image with weight 0.

        Damaged images are added to `damaged` (name -> reason). DataError if no image of the run can be read.
        """
        tried: set[int] = set()
        for number in self._choices(entry, order.epoch):
            if number not in tried:
                try:
                    return self._load(entry, number, order)
                except DataError as error:
                    damaged[self.images.images[number].origin.source.name] = str(error)
            tried.add(number)
        for number in range(len(self.images.images)):
            try:
                if number not in tried:
                    return _blank(self._load(entry, number, order), self.images.images[min(tried)])
            except DataError:
                continue
        raise DataError(f"none of the {len(self.images.images)} images can be read; {next(iter(damaged.values()))}")

    def _choices(self, entry: int, epoch: int) -> Iterator[int]:
        """The entry's image, then the others of its bucket in random order, those with the same is_reg first."""
        yield self.images.entries[entry]
        others = list(dict.fromkeys(self.images.entries[other] for other in self._members[entry]))
        python_random(self.seed, "in place of", epoch, entry).shuffle(others)
        regularisation = self.images.images[self.images.entries[entry]].subset.is_reg
        yield from sorted(others, key=lambda other: self.images.images[other].subset.is_reg != regularisation)

    @cached_property
    def _members(self) -> dict[int, Sequence[int]]:
        """The entries of each entry's group."""
        return {entry: group.entries for group in self.images.groups for entry in group.entries}

    def _load(self, entry: int, number: int, order: Order) -> Sample:
        """Load image `number` for `entry`."""
        image = self.images.images[number]
        # "picture" is part of the seed: another word would change the results of a run with the same seed.
        variation = vary(image.placement, image.subset, python_random(self.seed, "picture", order.epoch, entry))
        pixels = latents = None
        if self.latents is None:
            pixels, mask = load_pixels(image, variation)
        else:
            latents, mask = self._cached(number, image, variation)
        moment = Moment(order.epoch, order.step, self.max_train_steps or 0)
        rng = python_random(self.seed, "caption", order.epoch, entry)
        return Sample(
            pixels,
            latents,
            latent_mask(mask) if mask is not None else None,
            crop_as_seen(image.placement, variation),
            image.origin.size[::-1],
            image.placement.bucket[::-1],
            draw_caption(image.origin.caption, image.subset, rng, moment),
            self._text(number),
            self.prior_loss_weight if image.subset.is_reg else 1.0,
        )

    def _cached(
        self, number: int, image: TrainingImage, variation: Variation
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Cached (latents, mask (height, width) or None); masks from conditioning_data_dir are not cached."""
        assert self.latents is not None
        entry = self.latents[number]
        if isinstance(entry, DataError):
            raise entry
        cached = read_latents(entry, image.placement.bucket) if isinstance(entry, str) else entry
        latents = cached.flipped if variation.flip else cached.latents
        width, height = image.placement.bucket
        if latents is None or latents.shape[-2:] != (height // VAE_FACTOR, width // VAE_FACTOR):
            raise DataError(f"{entry}: not the latents of a {width}x{height} bucket; delete the file")
        mask = load_mask(image, variation)
        if image.subset.alpha_mask:
            mask = cached.mask if cached.mask is not None else torch.ones(height, width)
            mask = mask.flip(-1) if variation.flip else mask
        return latents, mask

    def _text(self, number: int) -> dict[str, torch.Tensor] | None:
        if self.text is None:
            return None
        entry = self.text[number]
        return read_text(entry) if isinstance(entry, str) else entry


def load_pixels(image: TrainingImage, variation: Variation) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Load (image (3, height, width) in [-1, 1], mask (height, width) or None). DataError if the image is damaged."""
    try:
        return _load_pixels(image, variation)
    except DataError:
        raise
    except Exception as error:  # converting damaged or rare kinds of images may raise almost any exception
        raise DataError(f"{image.origin.source.name}: cannot be used ({first_line(error)})") from None


def _load_pixels(image: TrainingImage, variation: Variation) -> tuple[torch.Tensor, torch.Tensor | None]:
    subset, placement, source = image.subset, image.placement, image.origin.source
    opened = open_image(source)
    if opened.size != image.origin.size:
        raise DataError(f"{source.name}: its size changed from {image.origin.size} to {opened.size} during training")
    rgb, alpha = to_rgb(opened, source.name, blend=not subset.alpha_mask)
    mask = load_mask(image, variation)
    if subset.alpha_mask:
        mask = mask_tensor(alpha or Image.new("L", rgb.size, 255), placement, variation)
    return image_tensor(rgb, placement, variation, subset.resize_interpolation), mask


def load_mask(image: TrainingImage, variation: Variation) -> torch.Tensor | None:
    """Load the mask (height, width) in [0, 1] from the image's mask file; None if there is none."""
    if image.origin.mask is None:
        return None
    mask = open_image(FileSource(image.origin.mask))
    grey = to_rgb(mask, image.origin.mask, blend=False)[0].convert("L")
    return mask_tensor(grey, image.placement, variation)


def _stack(tensors: list[torch.Tensor | None]) -> torch.Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(present) if present else None


def _stack_text(outputs: list[dict[str, torch.Tensor] | None]) -> dict[str, torch.Tensor] | None:
    present = [output for output in outputs if output is not None]
    return {name: torch.stack([output[name] for output in present]) for name in present[0]} if present else None


def _blank(like: Sample, image: TrainingImage) -> Sample:
    """A black image with loss weight 0 in the bucket of `image`; caption and text are copied from `like`."""
    height, width = size = image.placement.bucket[::-1]
    pixels = torch.zeros(3, height, width) if like.image is not None else None
    latents = None
    if like.latents is not None:
        latents = torch.zeros(len(like.latents), height // VAE_FACTOR, width // VAE_FACTOR)
    return Sample(pixels, latents, None, (0, 0), size, size, like.caption, like.text, 0.0)


def _stack_masks(samples: list[Sample]) -> torch.Tensor | None:
    """The masks of a batch, all ones for samples without a mask; None if no sample has one."""
    if all(sample.mask is None for sample in samples):
        return None
    height, width = samples[0].target
    full = torch.ones(1, height // VAE_FACTOR, width // VAE_FACTOR)
    return torch.stack([sample.mask if sample.mask is not None else full for sample in samples])
