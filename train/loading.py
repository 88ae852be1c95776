"""Loading batches: from entry numbers to tensors, in this process or in others."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from lora_adapters.train.batches import Batch, Share, batch_count, plan_epoch, share
from lora_adapters.train.caches import CachedLatents, read_latents, read_text
from lora_adapters.train.captions import Moment, draw_caption
from lora_adapters.train.data_error import DataError
from lora_adapters.train.dataset_config import VAE_FACTOR
from lora_adapters.train.picture_files import FileSource, open_picture
from lora_adapters.train.picture_set import Picture, PictureSet
from lora_adapters.train.pictures import (
    Variation,
    crop_as_seen,
    latent_mask,
    mask_tensor,
    picture_tensor,
    to_rgb,
    vary,
)
from lora_adapters.train.seeding import derive, python_random


@dataclass(frozen=True)
class Order:
    """All that a loading process must be told to make one batch."""

    epoch: int
    step: int
    share: Share


@dataclass(frozen=True)
class Sample:
    """One entry, loaded. mask: (1, height/8, width/8); sizes are (height, width), crop is (top, left)."""

    image: torch.Tensor | None
    latents: torch.Tensor | None
    mask: torch.Tensor | None
    crop: tuple[int, int]
    original: tuple[int, int]
    target: tuple[int, int]


class BatchReader(Dataset):
    """Makes batches from orders. Caches, once filled, are by picture: tensors, or the path of a file."""

    def __init__(self, pictures: PictureSet, seed: int, prior_loss_weight: float) -> None:
        self.pictures, self.seed, self.prior_loss_weight = pictures, seed, prior_loss_weight
        self.max_train_steps: int | None = None
        self.accumulation = 1
        self.latents: list[CachedLatents | str] | None = None
        self.text: list[dict[str, torch.Tensor] | str] | None = None

    def batch_count(self, world_size: int) -> int:
        return batch_count(self.pictures.groups, world_size)

    def orders(self, epoch: int, start: int, rank: int, world_size: int) -> list[Order]:
        """Process `rank`'s orders of an epoch from batch `start` on; data that is not shuffled has one epoch only."""
        plan = plan_epoch(self.pictures.groups, self.seed, epoch, world_size, shuffle=self.pictures.shuffle)
        epoch = epoch if self.pictures.shuffle else 0
        first_step = epoch * math.ceil(len(plan) / self.accumulation)
        return [
            Order(epoch, first_step + number // self.accumulation, share(plan[number], rank, world_size))
            for number in range(start, len(plan))
        ]

    def __getitem__(self, order: Order) -> Batch | DataError:
        """The batch; an error comes back as a value, since raised in another process it would lose its form."""
        try:
            return self._batch(order)
        except DataError as error:
            return error

    def _batch(self, order: Order) -> Batch:
        numbers = [self.pictures.entries[entry] for entry in order.share.entries]
        pictures = [self.pictures.pictures[number] for number in numbers]
        samples, captions = [], []
        for entry, number, picture in zip(order.share.entries, numbers, pictures, strict=True):
            samples.append(self._sample(entry, number, picture, order.epoch))
            moment = Moment(order.epoch, order.step, self.max_train_steps or 0)
            rng = python_random(self.seed, "caption", order.epoch, entry)
            captions.append(draw_caption(picture.found.caption, picture.subset, rng, moment))
        weights = [
            weight * (self.prior_loss_weight if picture.subset.is_reg else 1.0)
            for weight, picture in zip(order.share.weights, pictures, strict=True)
        ]
        seeds = [derive(self.seed, "sample", order.epoch, entry) for entry in order.share.entries]
        return Batch(
            images=_stack([sample.image for sample in samples]),
            latents=_stack([sample.latents for sample in samples]),
            captions=captions,
            text=self._text(numbers),
            loss_weights=torch.tensor(weights),
            masks=_stack_masks(samples),
            original_sizes=torch.tensor([sample.original for sample in samples]),
            crop_top_lefts=torch.tensor([sample.crop for sample in samples]),
            target_sizes=torch.tensor([sample.target for sample in samples]),
            sample_seeds=torch.tensor(seeds),
            start=order.share.start,
            total=order.share.total,
        )

    def _sample(self, entry: int, number: int, picture: Picture, epoch: int) -> Sample:
        rng = python_random(self.seed, "picture", epoch, entry)
        variation = vary(picture.placement, picture.subset, rng)
        image = latents = None
        if self.latents is None:
            image, mask = load_pixels(picture, variation)
        else:
            latents, mask = self._cached(number, picture, variation)
        return Sample(
            image,
            latents,
            latent_mask(mask) if mask is not None else None,
            crop_as_seen(picture.placement, variation),
            picture.found.size[::-1],
            picture.placement.bucket[::-1],
        )

    def _cached(self, number: int, picture: Picture, variation: Variation) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(latents, mask (height, width) or None); a mask of its own file is not part of the cache."""
        assert self.latents is not None
        entry = self.latents[number]
        cached = read_latents(entry, picture.placement.bucket) if isinstance(entry, str) else entry
        latents = cached.flipped if variation.flip else cached.latents
        width, height = picture.placement.bucket
        if latents is None or latents.shape[-2:] != (height // VAE_FACTOR, width // VAE_FACTOR):
            raise DataError(f"{entry}: not the latents of a {width}x{height} bucket; delete it, or check the caches")
        mask = load_mask(picture, variation)
        if picture.subset.alpha_mask:
            mask = cached.mask if cached.mask is not None else torch.ones(height, width)
            mask = mask.flip(-1) if variation.flip else mask
        return latents, mask

    def _text(self, numbers: list[int]) -> dict[str, torch.Tensor] | None:
        if self.text is None:
            return None
        found = [self.text[number] for number in numbers]
        outputs = [read_text(entry) if isinstance(entry, str) else entry for entry in found]
        return {name: torch.stack([output[name] for output in outputs]) for name in outputs[0]}


def load_pixels(picture: Picture, variation: Variation) -> tuple[torch.Tensor, torch.Tensor | None]:
    """((3, height, width) in [-1, 1], mask (height, width) or None) of one use of a picture."""
    subset, placement, source = picture.subset, picture.placement, picture.found.source
    opened = open_picture(source)
    if opened.size != picture.found.size:
        raise DataError(f"{source.name}: is {opened.size} and was {picture.found.size}; was it changed while training?")
    rgb, alpha = to_rgb(opened, source.name, blend=not subset.alpha_mask)
    mask = load_mask(picture, variation)
    if subset.alpha_mask:
        mask = mask_tensor(alpha or Image.new("L", rgb.size, 255), placement, variation)
    return picture_tensor(rgb, placement, variation, subset.resize_interpolation), mask


def load_mask(picture: Picture, variation: Variation) -> torch.Tensor | None:
    """(height, width) in [0, 1] from the picture's mask file, None where it has none."""
    if picture.found.mask is None:
        return None
    mask = open_picture(FileSource(picture.found.mask))
    grey = to_rgb(mask, picture.found.mask, blend=False)[0].convert("L")
    return mask_tensor(grey, picture.placement, variation)


def _stack(tensors: list[torch.Tensor | None]) -> torch.Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(present) if present else None


def _stack_masks(samples: list[Sample]) -> torch.Tensor | None:
    """Masks of a batch, all ones for samples without; None where no sample has one."""
    if all(sample.mask is None for sample in samples):
        return None
    height, width = samples[0].target
    ones = torch.ones(1, height // VAE_FACTOR, width // VAE_FACTOR)
    return torch.stack([sample.mask if sample.mask is not None else ones for sample in samples])


class _Orders(Sampler):
    """The orders of the current epoch; the data loader, which may live for many epochs, reads them anew each time."""

    def __init__(self) -> None:
        self.orders: list[Order] = []

    def __iter__(self) -> Iterator[Order]:
        return iter(self.orders)

    def __len__(self) -> int:
        return len(self.orders)


def _itself(batch: Batch | DataError) -> Batch | DataError:
    return batch


class EpochLoader:
    """Runs a BatchReader in torch's DataLoader. Persistent workers stay alive between epochs."""

    def __init__(self, reader: BatchReader, persistent: bool, pin_memory: bool) -> None:
        self.reader, self.persistent, self.pin_memory = reader, persistent, pin_memory
        self.orders = _Orders()
        self.loader: DataLoader | None = None

    def restart(self) -> None:
        """Forget workers that hold an older state of the reader."""
        self.loader = None

    def batches(self, epoch: int, start: int, rank: int, world_size: int, workers: int) -> Iterator[Batch]:
        self.orders.orders = self.reader.orders(epoch, start, rank, world_size)
        if self.loader is None or self.loader.num_workers != workers:
            self.loader = DataLoader(
                self.reader,
                batch_size=None,
                sampler=self.orders,
                num_workers=workers,
                collate_fn=_itself,
                persistent_workers=self.persistent and workers > 0,
                pin_memory=self.pin_memory,
                generator=torch.Generator(),  # else each epoch takes a number from torch's global generator
            )
        for batch in self.loader:
            if isinstance(batch, DataError):
                raise batch
            yield batch
