"""Converts an image to a tensor for training: colours, mask, scaling, cropping, flipping."""

import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from lora_adapters.train.data.buckets import Placement, Size
from lora_adapters.train.data.config import VAE_FACTOR, SubsetConfig
from lora_adapters.train.data.deep_grey import eight_bit_grey, is_deep
from lora_adapters.train.data_error import DataError
from lora_adapters.train.interpolation import resampling

COLOR_SHARE, HUE_SHIFT, GAMMA = 0.33, 16.0, 0.05  # probability, maximum degrees of hue, maximum change of gamma


@dataclass(frozen=True)
class Variation:
    """The random variation of one use of an image.

    corner: (left, top) of the crop in the scaled image. flip: mirror the image. colour: (shift of hue in degrees,
    change of the gamma exponent), or None.
    """

    corner: tuple[int, int]
    flip: bool = False
    colour: tuple[float, float] | None = None


def centred(placement: Placement, *, flip: bool = False) -> Variation:
    """A centred crop without colour changes."""
    left, top = [room // 2 for room in _spare(placement)]
    return Variation((left, top), flip)


def vary(placement: Placement, subset: SubsetConfig, rng: random.Random) -> Variation:
    """Draw a variation with the options of `subset`. Random numbers are drawn in the order crop, flip, colour."""
    left, top = [rng.randint(0, room) if subset.random_crop else room // 2 for room in _spare(placement)]
    flip = subset.flip_aug and rng.random() < 0.5
    colour = None
    if subset.color_aug and rng.random() < COLOR_SHARE:
        colour = rng.uniform(-HUE_SHIFT, HUE_SHIFT), rng.uniform(-GAMMA, GAMMA)
    return Variation((left, top), flip, colour)


def crop_as_seen(placement: Placement, variation: Variation) -> tuple[int, int]:
    """(top, left) of the crop in the scaled image, after mirroring if the variation flips."""
    left, top = variation.corner
    return top, _spare(placement)[0] - left if variation.flip else left


def to_rgb(image: Image.Image, name: str, *, blend: bool = True) -> tuple[Image.Image, Image.Image | None]:
    """Convert an image of any mode to RGB. 16-bit and floating-point grey is scaled to 8 bits.

    Args:
        image: The image.
        name: Its name, for messages.
        blend: Whether to blend transparent images with white. False keeps the colours of transparent pixels, for use
            with the alpha channel as a mask.

    Returns:
        The RGB image, and its alpha channel (mode L) or None.

    Raises:
        DataError: The range of values is not supported; see `eight_bit_grey`.
    """
    if is_deep(image):
        try:
            return eight_bit_grey(image).convert("RGB"), None
        except ValueError as error:
            raise DataError(f"{name}: {error}") from None
    if not image.has_transparency_data:
        return image.convert("RGB"), None
    rgba = image.convert("RGBA")
    alpha = rgba.getchannel("A")
    if not blend:
        return rgba.convert("RGB"), alpha
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB"), alpha


def image_tensor(
    rgb: Image.Image, placement: Placement, variation: Variation, interpolation: str | None = None
) -> torch.Tensor:
    """Scale, crop, recolour and mirror an RGB image: (3, height, width) in [-1, 1]."""
    rgb = _resize(rgb, placement.resized, interpolation).crop(_box(placement, variation))
    if variation.colour:
        rgb = _recolour(rgb, *variation.colour)
    if variation.flip:
        rgb = rgb.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous().float() / 127.5 - 1


def mask_tensor(mask: Image.Image, placement: Placement, variation: Variation) -> torch.Tensor:
    """Scale, crop and mirror a grey mask of any size like its image: (height, width) in [0, 1]."""
    scaled = mask.resize(placement.resized, Image.Resampling.BOX).crop(_box(placement, variation))
    if variation.flip:
        scaled = scaled.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(scaled)).float() / 255


def latent_mask(mask: torch.Tensor) -> torch.Tensor:
    """Average a mask (height, width) over the pixels of each latent: (1, height/8, width/8)."""
    height, width = mask.shape
    return F.interpolate(mask[None, None], (height // VAE_FACTOR, width // VAE_FACTOR), mode="area")[0]


def _spare(placement: Placement) -> tuple[int, int]:
    """By how many pixels the scaled image is wider and higher than its bucket."""
    (width, height), (kept_width, kept_height) = placement.resized, placement.bucket
    return width - kept_width, height - kept_height


def _box(placement: Placement, variation: Variation) -> tuple[int, int, int, int]:
    left, top = variation.corner
    return left, top, left + placement.bucket[0], top + placement.bucket[1]


def _resize(image: Image.Image, size: Size, interpolation: str | None) -> Image.Image:
    if image.size == size:
        return image
    shrinks = image.width > size[0] and image.height > size[1]
    return image.resize(size, resampling(interpolation or ("area" if shrinks else "lanczos")))


def _recolour(image: Image.Image, hue: float, gamma: float) -> Image.Image:
    shift = round(hue * 256 / 360)
    bands = image.convert("HSV").split()
    turned = bands[0].point([(value + shift) % 256 for value in range(256)])
    curve = [round(255 * (value / 255) ** (1 + gamma)) for value in range(256)]
    return Image.merge("HSV", (turned, *bands[1:])).convert("RGB").point(curve * 3)
