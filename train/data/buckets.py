"""Aspect-ratio buckets: the size at which each image is trained.

Sizes are (width, height) in pixels. Every image is scaled to cover its bucket's size, and then cropped to it.
"""

import math
from dataclasses import dataclass

from lora_adapters.train.data.config import VAE_FACTOR, DatasetConfig

Size = tuple[int, int]


@dataclass(frozen=True)
class Placement:
    """How an image gets its training size: it is scaled to `resized`, then cropped to `bucket`."""

    bucket: Size
    resized: Size


def cover(size: Size, target: Size) -> Size:
    """The smallest size with the aspect ratio of `size` that covers `target`."""
    scale = max(target[0] / size[0], target[1] / size[1])
    return max(target[0], int(size[0] * scale + 0.5)), max(target[1], int(size[1] * scale + 0.5))


def bucket_sizes(resolution: Size, smallest: int, largest: int, steps: int) -> list[Size]:
    """All bucket sizes whose sides are multiples of `steps` and whose area is at most the resolution's.

    For each length of one side, the other side is the longest that fits into the area.

    Args:
        resolution: (width, height) in pixels.
        smallest: The shortest side in pixels, rounded down to a multiple of `steps`.
        largest: The longest side in pixels, rounded up to a multiple of `steps`.
        steps: The step between side lengths in pixels.

    Returns:
        (width, height) of each bucket, sorted.
    """
    area = resolution[0] * resolution[1]
    smallest, largest = max(steps, smallest // steps * steps), math.ceil(largest / steps) * steps
    square = math.isqrt(area) // steps * steps
    sizes = {(square, square)}
    for side in range(smallest, largest + 1, steps):
        other = min(largest, area // side // steps * steps)
        if other >= smallest:
            sizes |= {(side, other), (other, side)}
    return sorted(sizes)


class Buckets:
    """The buckets of one dataset.

    Without `enable_bucket` the only size is the resolution. With it, an image gets the size with the nearest aspect
    ratio. With `bucket_no_upscale` images are never enlarged: larger images are scaled down to the resolution's area,
    and sides are cropped to multiples of the steps; min_bucket_reso and max_bucket_reso then have no effect.
    """

    def __init__(self, config: DatasetConfig) -> None:
        self.resolution, self.enabled = config.resolution, config.enable_bucket
        self.area = self.resolution[0] * self.resolution[1]
        self.steps, self.no_upscale = config.bucket_reso_steps, config.bucket_no_upscale
        # With 256, the usual value, models of small resolutions would only have square buckets.
        self.smallest = config.min_bucket_reso or min(256, max(VAE_FACTOR, min(self.resolution) // 2))
        self.largest = config.max_bucket_reso or max(1024, *self.resolution)
        self.sizes = [self.resolution]
        if self.enabled:
            self.sizes = bucket_sizes(self.resolution, self.smallest, self.largest, self.steps)
        self._placed: dict[Size, Placement] = {}  # a cache, since many images have the same size

    def place(self, size: Size) -> Placement:
        """The placement of an image of `size`."""
        if size not in self._placed:
            without = self.enabled and self.no_upscale
            self._placed[size] = self._place_without_enlarging(size) if without else self._place(size)
        return self._placed[size]

    def aspect_error(self, size: Size) -> float:
        """The difference between the aspect ratios (width / height) of the bucket and the image."""
        return abs(_aspect(self.place(size).bucket) - _aspect(size))

    def _place(self, size: Size) -> Placement:
        bucket = size if size in self.sizes else min(self.sizes, key=lambda other: abs(_aspect(other) - _aspect(size)))
        return Placement(bucket, cover(size, bucket))

    def _place_without_enlarging(self, size: Size) -> Placement:
        if size[0] * size[1] <= self.area:
            return self._cut(size)
        width, height = (math.sqrt(self.area * size[i] / size[1 - i]) for i in (0, 1))
        # Round one side to the steps, so that only the other is cropped: the side that changes the aspect less.
        by_height = self._cut(cover(size, (self.steps, self._floor(height + 0.5))))
        by_width = self._cut(cover(size, (self._floor(width + 0.5), self.steps)))
        within = [placed for placed in (by_height, by_width) if placed.bucket[0] * placed.bucket[1] <= self.area]
        if not within:  # rounding up exceeded the area, which happens with small steps
            bucket = self._cut((int(width), int(height))).bucket
            return Placement(bucket, cover(size, bucket))
        return min(within, key=lambda placed: abs(_aspect(placed.bucket) - _aspect(size)))

    def _cut(self, resized: Size) -> Placement:
        """Crop both sides to multiples of the steps. A side shorter than one step is enlarged to one step."""
        longest = self.area // self.steps  # limit for the other side of an enlarged side
        bucket = self._floor(min(resized[0], longest)), self._floor(min(resized[1], longest))
        fits = resized[0] >= bucket[0] and resized[1] >= bucket[1]
        return Placement(bucket, resized if fits else cover(resized, bucket))

    def _floor(self, side: float) -> int:
        return max(self.steps, int(side) // self.steps * self.steps)


def _aspect(size: Size) -> float:
    return size[0] / size[1]
