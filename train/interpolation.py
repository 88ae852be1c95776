"""Names of interpolation methods for resizing images, with Pillow's filters.

When Pillow shrinks an image it scales the filter with it, so that all filters except `nearest` antialias.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

FILTERS = {
    "lanczos": "LANCZOS",
    "nearest": "NEAREST",
    "bilinear": "BILINEAR",
    "linear": "BILINEAR",
    "bicubic": "BICUBIC",
    "cubic": "BICUBIC",
    "area": "BOX",
    "box": "BOX",
    "lanczos4": "LANCZOS",  # OpenCV's name; Pillow's kernel has a = 3
}
# Choices for training, in dataset files and on the command line.
TRAINING = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box")
# Choices for the resizing tool, whose `area` is the exact mean: BOX uses only whole source pixels.
RESIZING = ("area", "cubic", "lanczos4", "linear", "nearest", "box")


def resampling(name: str) -> "Image.Resampling":
    """The Pillow filter for a name in FILTERS."""
    from PIL import Image

    return Image.Resampling[FILTERS[name]]
