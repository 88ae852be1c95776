"""Converts greyscale images with more than 8 bits per pixel to 8 bits."""

import numpy as np
from PIL import Image

_OVERSHOOT = 0.5  # how far floating-point values may be outside of 0 to 1, as resampling overshoots


def is_deep(image: Image.Image) -> bool:
    """Whether an image is 16-bit, 32-bit or floating-point grey, whose values Pillow's own conversion would clip."""
    return image.mode == "F" or image.mode.startswith("I")


def eight_bit_grey(image: Image.Image) -> Image.Image:
    """Convert a grey image of 16 bits or floating point to 8 bits.

    White is 65535 for integers and 1 for floating point, as other programs write it. Small overshoots beyond black and
    white are clipped.

    Args:
        image: An image of one channel, mode I, I;16 or F.

    Returns:
        The image in mode L.

    Raises:
        ValueError: Values are NaN or infinite, or have another scale, whose white is unknown.
    """
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it holds NaN or infinite values")
    low, high = values.min(), values.max()
    if image.mode == "F":
        if low < -_OVERSHOOT or high > 1 + _OVERSHOOT:
            raise ValueError(
                f"its floating-point values are {low:g} to {high:g}, not 0 (black) to 1 (white); "
                "save it with 8 or 16 bits"
            )
        values = values.clip(0, 1) * 255
    elif low < 0 or high > 65535:
        raise ValueError(f"its values are {low:g} to {high:g}, more than 16 bits; save it with 8 or 16 bits")
    else:
        values = values / 257
    return Image.fromarray((values + 0.5).astype(np.uint8))
