"""Inspects a folder of images: what training will read, and which files have errors."""

import itertools
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from lora_adapters.convert.errors import first_line
from lora_adapters.convert.parsing import read_text
from lora_adapters.convert.progress import progress
from lora_adapters.train.data.candidates import existing_folder
from lora_adapters.train.data.class_folders import NAME
from lora_adapters.train.data.image_files import ORIENTATION, FileSource, find_images, open_image
from lora_adapters.train.data.sources import CAPTION_ENDINGS
from lora_adapters.train.data_error import DataError

_THUMBNAIL, _LEVELS = 16, 16
_MOST_REPEATS = 200


@dataclass(frozen=True)
class ImageFile:
    """An image file.

    size: after EXIF rotation. turned: whether EXIF rotates or flips it. looks: equal for images that look the same.
    wrong: why it cannot be read, or None.
    """

    path: Path
    size: tuple[int, int] = (0, 0)
    turned: bool = False
    looks: str = ""
    wrong: str | None = None


@dataclass
class Folder:
    """The images of one folder, with their captions.

    repeats and class_tokens come from a folder name such as `10_sks dog`. wrong_captions: (file, reason). others: files
    that training does not read, such as .HEIC photos, broken links, or captions with the ending in another case.
    """

    path: Path
    images: list[ImageFile]
    endings: Counter[str] = field(default_factory=Counter)
    captions: dict[str, str] = field(default_factory=dict)
    wrong_captions: list[tuple[Path, str]] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    repeats: int = 1
    class_tokens: str | None = None

    @property
    def readable(self) -> list[ImageFile]:
        return [image for image in self.images if image.wrong is None]

    @property
    def unreadable(self) -> list[ImageFile]:
        return [image for image in self.images if image.wrong is not None]

    @property
    def ending(self) -> str | None:
        """The most frequent ending of caption files; None without captions."""
        return self.endings.most_common(1)[0][0] if self.endings else None

    def uncaptioned(self, ending: str) -> list[Path]:
        """Images without a caption file with this ending."""
        return [image.path for image in self.readable if not image.path.with_suffix(ending).is_file()]


def look(path: str) -> list[Folder]:
    """Inspect a folder and its direct subfolders that contain images. DataError if no image can be read."""
    top = existing_folder(path)
    places = [top, *sorted(entry for entry in top.iterdir() if entry.is_dir() and not entry.name.startswith("."))]
    folders = [_folder(place) for place in places if find_images(place)]
    if not folders:
        raise DataError(f"{top} has no images{_deeper(top)}")
    if not any(folder.readable for folder in folders):
        first = folders[0].images[0]
        raise DataError(f"{top}: none of its images can be read; the first, {first.path.name}: {first.wrong}")
    return [folder for folder in folders if folder.readable]


def _deeper(top: Path) -> str:
    """A hint for the error message that names deeper folders with images; an empty string if there are none."""
    folders = (entry for entry in sorted(top.glob("*/*")) if entry.is_dir() and find_images(entry))
    names = [str(folder) for folder in itertools.islice(folders, 3)]
    return f" in it or in its folders, but further down: name one of {', '.join(names)}" if names else ""


def alike(images: Sequence[ImageFile]) -> list[list[ImageFile]]:
    """Groups of images that look the same: equal aspect ratios, and equal thumbnails in 16 levels of grey."""
    groups: dict[str, list[ImageFile]] = {}
    for image in images:
        groups.setdefault(image.looks, []).append(image)
    return [group for group in groups.values() if len(group) > 1]


def _folder(path: Path) -> Folder:
    files = find_images(path)
    with ThreadPoolExecutor() as pool:
        images = list(progress(pool.map(_image_file, files), f"looking at {path.name}", len(files)))
    named = NAME.fullmatch(path.name)
    repeats = int(named[1]) if named and named[2] and int(named[1]) <= _MOST_REPEATS else 0  # 2024_x: a year
    folder = Folder(path, images, repeats=repeats or 1, class_tokens=named[2] if named and repeats else None)
    for image in images:
        for ending in CAPTION_ENDINGS:
            caption = image.path.with_suffix(ending)
            if caption.is_file():
                folder.endings[ending] += 1
                try:
                    folder.captions.setdefault(image.path.name, read_text(caption).strip())
                except (OSError, ValueError) as error:
                    folder.wrong_captions.append((caption, str(error)))
    read = {*files, *(file.with_suffix(ending) for file in files for ending in CAPTION_ENDINGS)}
    hidden = (".", "Thumbs.db", "desktop.ini", "metadata.jsonl")
    left = (file for file in sorted(path.iterdir()) if file not in read and not file.is_dir())
    folder.others = [file for file in left if not file.name.startswith(hidden) and file.suffix != ".npz"]
    return folder


def _image_file(path: Path) -> ImageFile:
    """Decode an image completely, which is the only way to detect damage."""
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(ORIENTATION, 1) not in (0, 1)
        upright = open_image(FileSource(str(path)))
    except UnidentifiedImageError:
        return ImageFile(path, wrong="not an image" if path.stat().st_size else "empty file")
    except DataError as error:
        return ImageFile(path, wrong=first_line(error.__cause__ or error.__context__ or error))
    except Exception as error:  # Pillow raises almost any exception for damaged images
        return ImageFile(path, wrong=first_line(error))
    small = upright.convert("L").resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX)
    levels = bytes(value * _LEVELS // 256 for value in small.tobytes())
    shape = f"{upright.width / upright.height:.2f}"
    return ImageFile(path, upright.size, turned, f"{shape} {levels.hex()}")
