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
    """The program's options: an attribute each."""

    title: ClassVar[str] = "sizes and files"
    max_resolution: Sequence[Size] | None = option(
        None,
        "areas to shrink to, as width x height",
        parse=_resolutions,
        metavar="WxH,...",
        unset=",".join(f"{width}x{height}" for width, height in DEFAULT_RESOLUTIONS),
    )
    divisible_by: int = option(1, "crop resized images from the centre until N divides both sides", at_least=1)
    interpolation: str = option(
        "area",
        "area is the exact mean; lanczos4 is Pillow's LANCZOS (a = 3); all but nearest antialias",
        choices=list(RESIZING),
    )
    save_as_png: bool = option(False, "save PNG, with transparency, instead of JPEG")
    copy_associated_files: bool = option(
        False, "copy files with an image's stem, like captions, under each resized image's name (not .npz caches)"
    )
    workers: int | None = option(None, "processes", unset="one per core", at_least=1)


def parser(defaults: bool = True) -> Parser:
    """A parser of all options; without `defaults` its result has only what is on the command line."""
    new = Parser(
        prog="resize_images_to_resolution.py",
        description="Add smaller copies of training images: each as it is, and at the area of each resolution, under "
        "the name that says which. Nothing is enlarged; a second run does only what is missing.",
        examples=["photos smaller --max_resolution 512x512,384x384 --copy_associated_files"],
    )
    new.add_argument("src", help="folder of images")
    new.add_argument("dst", help="folder to write to, made if need be")
    new.add_options(ResizeSettings, defaults)
    return new


def parse(argv: Sequence[str] | None = None) -> tuple[str, str, ResizeSettings]:
    """(source folder, destination, options) from `argv`. OptionError for what cannot be right."""
    line = vars(parser(defaults=False).parse_args(argv))
    src, dst = line.pop("src"), line.pop("dst")
    settings = made(ResizeSettings, line)
    check_ranges(settings)
    return src, dst, settings
