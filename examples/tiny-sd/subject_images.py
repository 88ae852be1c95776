#!/usr/bin/env python3
"""Draw a subject that no model has seen: the zwib, a one-eyed creature, in many poses, places, sizes and colours.

usage: subject_images.py --out DIR [--train N] [--held-out N]

Writes DIR/train and DIR/held_out, 64x64 PNGs with their captions beside them (.txt): "a zwib on yellow". Needs no font.
"""

import argparse
import random
from pathlib import Path

from PIL import Image, ImageDraw

TOKEN = "zwib"  # no word of the base model's captions
SIDE, FINE = 64, 4  # pixels of the image; drawn at four times that and scaled down
BACKGROUNDS = {
    "white": (255, 255, 255), "yellow": (250, 220, 90), "red": (226, 80, 70), "blue": (90, 140, 230),
    "green": (120, 190, 100), "orange": (245, 160, 70), "purple": (160, 110, 200), "black": (40, 40, 46),
}  # fmt: skip
BODY, BELLY, LINE, HORN = (24, 160, 160), (150, 226, 214), (10, 60, 70), (236, 84, 150)


def zwib(draw: random.Random, size: int) -> Image.Image:
    """The creature on a transparent square of `size` pixels; the pose comes from `draw`."""
    image = Image.new("RGBA", (size, size))
    pen = ImageDraw.Draw(image)

    def box(left: float, top: float, right: float, bottom: float) -> tuple[float, ...]:
        return (left * size, top * size, right * size, bottom * size)

    width = max(size // 28, 1)
    lean = draw.uniform(-0.12, 0.12)
    for side in (-1, 1):  # horns, arms and feet, each with its own swing
        tip = 0.5 + side * 0.2 + lean, draw.uniform(0.03, 0.13)
        pen.line((*box(0.5 + side * 0.08, 0.3, *tip),), HORN, 2 * width)
        pen.ellipse(box(tip[0] - 0.06, tip[1] - 0.03, tip[0] + 0.06, tip[1] + 0.09), HORN, LINE, width)
        hand = 0.5 + side * 0.42, draw.uniform(0.3, 0.75)
        pen.line((*box(0.5 + side * 0.2, 0.55, *hand),), LINE, 3 * width)
        foot = 0.5 + side * draw.uniform(0.1, 0.22)
        pen.ellipse(box(foot - 0.11, 0.84, foot + 0.11, 0.97), HORN, LINE, width)
    pen.ellipse(box(0.22, 0.24, 0.78, 0.92), BODY, LINE, width)
    pen.ellipse(box(0.34, 0.58, 0.66, 0.88), BELLY)
    pen.ellipse(box(0.34, 0.3, 0.66, 0.6), (255, 255, 255), LINE, width)
    look = draw.uniform(-0.07, 0.07), draw.uniform(-0.05, 0.05)
    pen.ellipse(box(0.44 + look[0], 0.39 + look[1], 0.56 + look[0], 0.51 + look[1]), (20, 20, 30))
    return image.rotate(draw.uniform(-20, 20), Image.Resampling.BICUBIC)


def image_and_caption(number: int) -> tuple[Image.Image, str]:
    """The image of that number, the same on every machine, and its caption."""
    draw = random.Random(f"{TOKEN}/{number}")
    colour = draw.choice(sorted(BACKGROUNDS))
    scene = Image.new("RGB", (SIDE * FINE, SIDE * FINE), BACKGROUNDS[colour])
    size = draw.randint(34, 62) * FINE
    figure = zwib(draw, size)
    room = SIDE * FINE - size
    scene.paste(figure, (draw.randint(0, room), draw.randint(0, room)), figure)
    return scene.resize((SIDE, SIDE), Image.Resampling.LANCZOS), f"a {TOKEN} on {colour}"


def write(folder: Path, numbers: range) -> None:
    """The images of these numbers, each with a caption file."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        image, caption = image_and_caption(number)
        image.save(folder / f"{TOKEN}_{number:03}.png", optimize=True)
        (folder / f"{TOKEN}_{number:03}.txt").write_text(caption + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=int, default=32, help="number of images to train with")
    parser.add_argument("--held-out", type=int, default=16, help="number of images to measure with")
    args = parser.parse_args()
    write(args.out / "train", range(args.train))
    write(args.out / "held_out", range(1000, 1000 + args.held_out))


if __name__ == "__main__":
    main()
