"""One picture made smaller: read it upright and in 8 bits, shrink it to an area, crop it from the centre."""

import math
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from lora_adapters.train.data.deep_grey import eight_bit_grey, is_deep
from lora_adapters.train.data.image_files import read_upright
from lora_adapters.train.interpolation import resampling

Size = tuple[int, int]


class UnreadablePicture(ValueError):
    """A file with a picture's name that cannot be used as one; the message is the reason alone."""


def read_picture(path: Path) -> Image.Image:
    """The (first) picture in `path`, upright, in mode RGB, or RGBA if the file knows transparency.

    EXIF orientation is applied, 16-bit and floating-point greys are scaled to 8 bits, and an RGB colour profile stays
    in `info["icc_profile"]`, where nothing else is kept. Raises UnreadablePicture.
    """
    try:
        picture = _eight_bit(read_upright(path))
    except UnreadablePicture:
        raise
    except UnidentifiedImageError as error:
        raise UnreadablePicture("not in a picture format that Pillow reads") from error
    except OSError as error:
        raise UnreadablePicture(error.strerror or str(error)) from error
    except Exception as error:  # broken files make Pillow's decoders raise almost anything
        raise UnreadablePicture(f"{type(error).__name__}: {error}") from error
    profile = picture.info.get("icc_profile")
    # A grey or CMYK profile says nothing about the RGB values made from such a picture.
    picture.info = {"icc_profile": profile} if profile and profile[16:20] == b"RGB " else {}
    return picture


def _eight_bit(picture: Image.Image) -> Image.Image:
    if is_deep(picture):
        try:
            grey = eight_bit_grey(picture)
        except ValueError as error:
            raise UnreadablePicture(str(error)) from error
        grey.info = picture.info
        return grey.convert("RGB")
    return picture.convert("RGBA" if picture.has_transparency_data else "RGB")


def on_white(picture: Image.Image) -> Image.Image:
    """An RGBA picture laid on white, as RGB; any other unchanged."""
    if picture.mode != "RGBA":
        return picture
    white = Image.new("RGBA", picture.size, "white")
    flat = Image.alpha_composite(white, picture).convert("RGB")
    flat.info = dict(picture.info)
    return flat


def fitted_size(size: Size, resolution: Size) -> Size:
    """`size` (width, height) scaled to the area of `resolution`, both sides rounded down; never enlarged."""
    width, height = size
    area = resolution[0] * resolution[1]
    if width * height <= area:
        return size
    # width · √(area / (width · height)) = √(area · width / height), and an integer root is exact.
    return max(1, math.isqrt(area * width // height)), max(1, math.isqrt(area * height // width))


def divisible_size(size: Size, divisible_by: int) -> Size:
    """The largest size within `size` whose sides `divisible_by` divides; a side may be 0."""
    return size[0] - size[0] % divisible_by, size[1] - size[1] % divisible_by


def resize(picture: Image.Image, size: Size, interpolation: str) -> Image.Image:
    """`picture` (RGB or RGBA) at `size`, which no side may exceed. Colours count by their opacity.

    interpolation: a name in `interpolation.RESIZING`; "area" is the exact mean.
    """
    if picture.size == size:
        return picture
    if interpolation != "area":
        resized = picture.resize(size, resampling(interpolation))
    elif picture.mode == "RGBA":
        resized = _area(picture.convert("RGBa"), size).convert("RGBA")
    else:
        resized = _area(picture, size)
    resized.info = dict(picture.info)
    return resized


def centre_crop(picture: Image.Image, size: Size) -> Image.Image:
    """The middle of `picture`; where the margin is odd, the larger part of it goes at the right and at the bottom."""
    if picture.size == size:
        return picture
    left, top = (picture.width - size[0]) // 2, (picture.height - size[1]) // 2
    return picture.crop((left, top, left + size[0], top + size[1]))


def _area(picture: Image.Image, size: Size) -> Image.Image:
    rows = _area_rows(np.asarray(picture), size[1])
    pixels = _area_rows(np.ascontiguousarray(rows.swapaxes(0, 1)), size[0]).swapaxes(0, 1)
    return Image.frombytes(picture.mode, size, np.rint(pixels).astype(np.uint8).tobytes())


def _area_rows(pixels: np.ndarray, count: int) -> np.ndarray:
    """(n, m, channels) to (count, m, channels) with count ≤ n: row i is the mean over [i·n/count, (i+1)·n/count)."""
    n = pixels.shape[0]
    if n == count:
        return pixels
    flat = pixels.reshape(n, -1)
    out = np.empty((count, flat.shape[1]), np.float32)
    for i in range(count):
        start, stop = i * n // count, -(-(i + 1) * n // count)
        weights = np.ones((stop - start, 1), np.float32)
        weights[0] -= (i * n - start * count) / count
        weights[-1] -= (stop * count - (i + 1) * n) / count
        np.add.reduce(flat[start:stop] * (weights * np.float32(count / n)), axis=0, out=out[i])
    return out.reshape(count, *pixels.shape[1:])
