"""The options of the program that resizes training images."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lora_adapters.train.interpolation import RESIZING
from lora_adapters.train.options.option import option
from lora_adapters.train.options.parser import Parser
from lora_adapters.train.options.settings import Given, check_ranges, made
from lora_adapters.train.resizing.resize import Size

DEFAULT_RESOLUTIONS: tuple[Size, ...] = ((512, 512), (384, 384), (256, 256), (128, 128))


def _resolutions(text: str) -> list[Size]:
    matches = [re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", part.strip().lower()) for part in text.split(",")]
    pairs = [(int(match[1]), int(match[2])) for match in matches if match]
    if len(pairs) < len(matches):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 512x512,384x384")
    return pairs


@dataclass
class ResizeSettings(Given):
    """The options of the program, one attribute each."""

    title: ClassVar[str] = "sizes and files"
    max_resolution: Sequence[Size] | None = option(
        None,
        "resolutions to shrink to; an image keeps its aspect ratio and gets their area",
        parse=_resolutions,
        metavar="WxH,...",
        unset=",".join(f"{width}x{height}" for width, height in DEFAULT_RESOLUTIONS),
    )
    divisible_by: int = option(1, "centre-crop resized images so that N divides both sides", at_least=1)
    interpolation: str = option(
        "area",
        "interpolation; area is the exact mean, lanczos4 is Pillow's LANCZOS (a = 3), all but nearest antialias",
        choices=list(RESIZING),
    )
    save_as_png: bool = option(False, "save as PNG, with transparency, instead of JPEG")
    copy_associated_files: bool = option(
        False, "also copy files with the stem of an image, such as captions, for each resized image (not .npz caches)"
    )
    workers: int | None = option(None, "number of processes", unset="one per core", at_least=1)


def parser(defaults: bool = True) -> Parser:
    """Create the parser. Without `defaults`, parsed arguments contain only the options on the command line."""
    new = Parser(
        prog="resize_images_to_resolution.py",
        description="Make smaller copies of training images. Each image is copied unchanged, and shrunk to the area "
        "of each resolution, which is added to its name. Nothing is enlarged; a second run only adds what is missing.",
        examples=["photos smaller --max_resolution 512x512,384x384 --copy_associated_files"],
    )
    new.add_argument("src", help="folder of images")
    new.add_argument("dst", help="output folder, created if needed")
    new.add_options(ResizeSettings, defaults)
    return new


def parse(argv: Sequence[str] | None = None) -> tuple[str, str, ResizeSettings]:
    """Parse `argv` into (source folder, destination, options). OptionError for invalid options."""
    line = vars(parser(defaults=False).parse_args(argv))
    src, dst = line.pop("src"), line.pop("dst")
    settings = made(ResizeSettings, line)
    check_ranges(settings)
    return src, dst, settings
