"""Resizes one image: reads it with EXIF orientation in 8 bits, shrinks it to an area, and crops its centre."""

import math
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from lora_adapters.train.data.deep_grey import eight_bit_grey, is_deep
from lora_adapters.train.data.image_files import read_upright
from lora_adapters.train.interpolation import resampling

Size = tuple[int, int]


class UnreadableImage(ValueError):
    """An image file that cannot be read; the message is only the reason, without the path."""


def read_image(path: Path) -> Image.Image:
    """Read the (first) image of a file.

    EXIF orientation is applied. 16-bit and floating-point grey is scaled to 8 bits.

    Args:
        path: The file.

    Returns:
        An image in mode RGB, or RGBA if the file has transparency. `info` contains only an RGB colour profile
        ("icc_profile"), if there is one.

    Raises:
        UnreadableImage: The file is not an image, or is damaged; the message says why.
    """
    try:
        image = _eight_bit(read_upright(path))
    except UnreadableImage:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImage("not in an image format that Pillow reads") from error
    except OSError as error:
        raise UnreadableImage(error.strerror or str(error)) from error
    except Exception as error:  # Pillow raises almost any exception for damaged files
        raise UnreadableImage(f"{type(error).__name__}: {error}") from error
    profile = image.info.get("icc_profile")
    # A grey or CMYK profile does not apply to the converted RGB values.
    image.info = {"icc_profile": profile} if profile and profile[16:20] == b"RGB " else {}
    return image


def _eight_bit(image: Image.Image) -> Image.Image:
    if is_deep(image):
        try:
            grey = eight_bit_grey(image)
        except ValueError as error:
            raise UnreadableImage(str(error)) from error
        grey.info = image.info
        return grey.convert("RGB")
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def on_white(image: Image.Image) -> Image.Image:
    """Blend an RGBA image with white and return it as RGB; other images are returned unchanged."""
    if image.mode != "RGBA":
        return image
    white = Image.new("RGBA", image.size, "white")
    flat = Image.alpha_composite(white, image).convert("RGB")
    flat.info = dict(image.info)
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
    """The largest size within `size` whose sides are multiples of `divisible_by`; a side may be 0."""
    return size[0] - size[0] % divisible_by, size[1] - size[1] % divisible_by


def resize(image: Image.Image, size: Size, interpolation: str) -> Image.Image:
    """Resize an image. With transparency, colours are weighted by their opacity.

    Args:
        image: RGB or RGBA.
        size: (width, height) in pixels; no side may be larger than that of the image.
        interpolation: A name in `interpolation.RESIZING`; "area" is the exact mean.

    Returns:
        An image in the same mode, or `image` itself if it has this size.
    """
    if image.size == size:
        return image
    if interpolation != "area":
        resized = image.resize(size, resampling(interpolation))
    elif image.mode == "RGBA":
        resized = _area(image.convert("RGBa"), size).convert("RGBA")
    else:
        resized = _area(image, size)
    resized.info = dict(image.info)
    return resized


def centre_crop(image: Image.Image, size: Size) -> Image.Image:
    """Crop the centre of `image`. If a margin is odd, one pixel more is removed at the right or the bottom."""
    if image.size == size:
        return image
    left, top = (image.width - size[0]) // 2, (image.height - size[1]) // 2
    return image.crop((left, top, left + size[0], top + size[1]))


def _area(image: Image.Image, size: Size) -> Image.Image:
    rows = _area_rows(np.asarray(image), size[1])
    pixels = _area_rows(np.ascontiguousarray(rows.swapaxes(0, 1)), size[0]).swapaxes(0, 1)
    return Image.frombytes(image.mode, size, np.rint(pixels).astype(np.uint8).tobytes())


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
