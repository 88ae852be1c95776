"""Sources of image data; reads the size of an image without decoding it, and checks that it is complete."""

import io
import os
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, ImageOps, UnidentifiedImageError

from lora_adapters.train.data.deep_grey import eight_bit_grey, is_deep
from lora_adapters.train.data.image_suffixes import TRAINED
from lora_adapters.train.data_error import DataError

ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)  # the EXIF tag, and its values that swap width and height
TAIL = 64
PNG_TEXT = (b"tEXt", b"zTXt", b"iTXt")  # chunks that some writers put EXIF or XMP into


@dataclass(frozen=True)
class FileSource:
    """An image in a file."""

    path: str

    @property
    def name(self) -> str:
        return self.path

    def stream(self) -> BinaryIO:
        """Open the file."""
        return open(self.path, "rb")

    def modified(self) -> int:
        """The file's modification time in nanoseconds."""
        return os.stat(self.path).st_mtime_ns

    def length(self) -> int:
        """The file's size in bytes."""
        return os.stat(self.path).st_size


@dataclass(frozen=True)
class RowSource:
    """An image in a row of a Hugging Face dataset whose image column is not decoded."""

    dataset: Any
    column: str
    row: int
    name: str

    def stream(self) -> BinaryIO:
        """Open the encoded image of the row."""
        value = self.dataset[self.row][self.column]
        if value is None:
            raise OSError("the row has no image")
        return io.BytesIO(value["bytes"]) if value["bytes"] is not None else open(value["path"], "rb")

    def modified(self) -> int:
        """Always 0, since the rows of a dataset do not change."""
        return 0

    def length(self) -> int:
        """Always 0, for the same reason."""
        return 0


Source = FileSource | RowSource


def find_images(folder: Path) -> list[Path]:
    """The image files in `folder`, not in its subfolders, sorted by name. Suffixes are case-insensitive."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in TRAINED and path.is_file())


def size_if_whole(source: Source) -> tuple[int, int] | str:
    """The size of an image, or the reason why it cannot be read.

    Only the header is decoded, unless the end of the file is not recognised or a channel has more than 8 bits.

    Args:
        source: The image.

    Returns:
        (width, height) in pixels after EXIF rotation; or the reason as a short text.
    """
    try:
        with source.stream() as stream:
            if not stream.read(1):
                return "empty file"
            stream.seek(0)
            with Image.open(stream) as image:
                width, height = image.size
                if image.format == "PNG":
                    whole, exif = _walk_png(stream)
                else:
                    whole, exif = _ends_properly(stream, image.format), True
                if not whole:
                    stream.seek(0)
                    Image.open(stream).load()
                if is_deep(image):  # rare, so it is decoded now: not every range of values is supported
                    stream.seek(0)
                    eight_bit_grey(Image.open(stream))
                # Pillow decodes a whole PNG to look for EXIF data, which few PNGs have.
                sideways = exif and image.getexif().get(ORIENTATION) in SIDEWAYS
    except UnidentifiedImageError:
        return "not an image"
    except Exception as error:  # Pillow raises almost any exception for damaged images
        return str(error) or type(error).__name__
    return (height, width) if sideways else (width, height)


def open_image(source: Source) -> Image.Image:
    """Decode an image and apply its EXIF orientation. DataError if that fails."""
    try:
        with source.stream() as stream:
            return read_upright(stream)
    except Exception as error:
        raise DataError(f"{source.name}: cannot be read as an image ({error}); remove or repair it") from None


def read_upright(file: BinaryIO | Path) -> Image.Image:
    """Decode the (first) image of a file and apply its EXIF orientation. Pillow may raise almost any exception."""
    with warnings.catch_warnings():
        # Pillow warns above its limit, where ordinary large photographs are; above twice the limit it raises an error.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image)


def _ends_properly(stream: BinaryIO, kind: str | None) -> bool:
    """Whether a JPEG or WebP is complete, judged by its end and length; False for other formats."""
    length = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, length - TAIL))
    tail = stream.read(TAIL)
    if kind == "JPEG":
        return b"\xff\xd9" in tail
    if kind == "WEBP":
        stream.seek(4)
        return int.from_bytes(stream.read(4), "little") + 8 <= length
    return False


def _walk_png(stream: BinaryIO) -> tuple[bool, bool]:
    """(whether the file is complete, whether it has EXIF data), from the chunks' headers."""
    length = stream.seek(0, os.SEEK_END)
    position, exif = 8, False
    while position + 12 <= length:  # a chunk: length, name, data, check sum
        stream.seek(position)
        size, name = struct.unpack(">I4s", stream.read(8))
        exif = (
            exif
            or name == b"eXIf"
            or (name in PNG_TEXT and stream.read(17) in (b"Raw profile type ", b"XML:com.adobe.xmp"))
        )
        position += size + 12
        if name == b"IEND":
            return position <= length, exif
    return False, exif
