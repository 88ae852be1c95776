"""A grid of images with a label for each row and each column."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from lora_adapters.train.errors import TrainingError

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
GAP, SMALLEST = 4, 128


def font_of(file: str | None, size: int) -> Font:
    """Load the font in `file`, or Pillow's built-in font (Latin letters only). TrainingError if it is not a font."""
    if file is None:
        return ImageFont.load_default(size)
    try:
        return ImageFont.truetype(file, size)
    except OSError as error:
        raise TrainingError(f"--sheet_font {file} is not a TrueType or OpenType font ({error})") from None


def draw_sheet(
    rows: Sequence[tuple[str, Sequence[Image.Image]]], titles: Sequence[str], font_file: str | None = None
) -> Image.Image:
    """Paste images into a labelled grid, whose cells have the size of the largest image.

    If all images are smaller than 128 pixels, they are enlarged by an integer factor to make room for the labels.

    Args:
        rows: (label, images) of each row, with one image for each title.
        titles: The labels of the columns.
        font_file: A TrueType or OpenType font; None uses Pillow's built-in font.

    Returns:
        The grid, in RGB.
    """
    images = [image for _, row in rows for image in row]
    factor = max(1, -(-SMALLEST // max(max(image.size) for image in images)))
    width, height = (factor * max(sides) for sides in zip(*(image.size for image in images), strict=True))
    font = font_of(font_file, max(14, min(width, height) // 16))
    margin = max(120, min(width, 420))
    labels = [wrapped(label, font, margin - 16) for label, _ in rows]
    heads = [wrapped(title, font, width - 4) for title in titles]
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    head = max(_extent(pen, text, font)[1] for text in heads) + 14
    heights = [max(height, _extent(pen, text, font)[1] + 8) for text in labels]
    sheet = Image.new("RGB", (margin + len(titles) * (width + GAP), head + sum(heights) + GAP * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, text in enumerate(heads):
        place = (margin + column * (width + GAP) + width / 2, head / 2)
        pen.multiline_text(place, text, "black", font, anchor="mm", align="center")
    top = head
    for (_, row), text, tall in zip(rows, labels, heights, strict=True):
        pen.multiline_text(
            (8, top + height / 2 if tall == height else top + tall / 2), text, "black", font, anchor="lm"
        )
        for column, image in enumerate(row):
            size = (image.width * factor, image.height * factor)
            shown = image if factor == 1 else image.resize(size, Image.Resampling.BICUBIC)
            sheet.paste(shown, (margin + column * (width + GAP), top))
        top += tall + GAP
    return sheet


def wrapped(text: str, font: Font, width: int, most: int = 8) -> str:
    """Wrap text at spaces into at most `most` lines of at most `width` pixels; longer words are not split."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > width:
                lines.append(line)
                line = word
            else:
                line = longer
        lines.append(line)
    if len(lines) > most:
        lines = [*lines[: most - 1], f"{lines[most - 1]} ..."]
    return "\n".join(lines)


def _extent(pen: ImageDraw.ImageDraw, text: str, font: Font) -> tuple[int, int]:
    left, top, right, bottom = pen.multiline_textbbox((0, 0), text, font)
    return round(right - left), round(bottom - top)
