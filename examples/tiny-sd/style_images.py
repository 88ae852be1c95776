#!/usr/bin/env python3
"""Draw the quickstart's images: emoji painted blue on white, as on Delft tiles, which the base model has never seen.

usage: style_images.py [--out DIR] [--font FILE]

Writes DIR/train and DIR/held_out, 64x64 PNGs with their captions beside them (.txt).
"""

import argparse
from pathlib import Path

from emoji import Emoji, all_emoji, draw, load_font
from PIL import Image, ImageFilter, ImageFont, ImageOps

INK, WASH, PAPER = (8, 24, 92), (86, 124, 204), (255, 255, 255)
TRAIN = (
    "dog face", "elephant", "tropical fish", "butterfly", "snail", "owl", "frog face", "horse", "banana", "carrot",
    "hamburger", "birthday cake", "teapot", "house building", "european castle", "bicycle", "automobile", "airplane",
    "bell", "key", "umbrella", "anchor", "hot beverage", "tulip",
)  # fmt: skip
HELD_OUT = (
    "red apple", "closed umbrella", "cat face", "penguin", "octopus", "sailboat", "rocket", "guitar", "sunflower",
    "mushroom", "snowman", "crown", "bird", "pear", "lion face", "cactus",
)  # fmt: skip


def delft(image: Image.Image) -> Image.Image:
    """An image in three tones of blue: dark ink along the edges and in the shadows, a wash, white paper."""
    grey = ImageOps.grayscale(image)
    tones = ImageOps.autocontrast(grey, cutoff=(2, 0))
    edges = grey.filter(ImageFilter.GaussianBlur(1)).filter(ImageFilter.FIND_EDGES).filter(ImageFilter.MaxFilter(3))
    ink = ImageOps.autocontrast(edges.crop((2, 2, *(side - 2 for side in edges.size)))).resize(image.size)
    coloured = ImageOps.colorize(tones, INK, PAPER, mid=WASH)
    return Image.composite(Image.new("RGB", image.size, INK), coloured, ink.point(lambda value: min(255, 2 * value)))


def write(emoji: list[Emoji], names: tuple[str, ...], folder: Path, font: ImageFont.FreeTypeFont) -> None:
    """The named emoji in the style, each with a caption file; KeyError where the font has no such emoji."""
    folder.mkdir(parents=True, exist_ok=True)
    by_name = {one.name: one for one in emoji}
    for name in names:
        one = by_name[name]
        image = delft(draw(one, font, 136)).resize((64, 64), Image.Resampling.LANCZOS)
        stem = name.replace(" ", "_")
        image.save(folder / f"{stem}.png", optimize=True)
        (folder / f"{stem}.txt").write_text(one.caption + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "images" / "delft")
    parser.add_argument("--font", type=Path, help="NotoColorEmoji.ttf")
    args = parser.parse_args()
    font = load_font(args.font) if args.font else load_font()
    emoji = all_emoji(font)
    write(emoji, TRAIN, args.out / "train", font)
    write(emoji, HELD_OUT, args.out / "held_out", font)


if __name__ == "__main__":
    main()
