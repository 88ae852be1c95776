"""How images are resized: the names of the options, each with Pillow's filter.

Pillow stretches a filter over the source pixels that a new one covers, so that none but `nearest` aliases.
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
    "lanczos4": "LANCZOS",  # as OpenCV calls it; the kernel of Pillow's has a = 3
}
# What training takes, in dataset files and on the command line alike.
TRAINING = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box")
# What the resizing tool takes. Its `area` is the exact mean and no filter: BOX takes a source pixel wholly or not.
RESIZING = ("area", "cubic", "lanczos4", "linear", "nearest", "box")


def resampling(name: str) -> "Image.Resampling":
    """Pillow's filter for a name in FILTERS."""
    from PIL import Image

    return Image.Resampling[FILTERS[name]]
