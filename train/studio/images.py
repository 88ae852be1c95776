"""A folder's training images: reading and editing their captions, and thumbnails."""

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lora_adapters.convert.parsing import read_text
from lora_adapters.convert.storage.atomic import replacing
from lora_adapters.train.data.image_files import find_images, read_upright
from lora_adapters.train.data.sources import CAPTION_ENDINGS
from lora_adapters.train.studio.paths import StudioError

THUMBNAIL = 320  # pixels of the longer side


@dataclass(frozen=True)
class CaptionedImage:
    """An image and its caption, which is None if there is no caption file."""

    path: Path
    caption: str | None


def caption_ending(folder: Path) -> str:
    """The ending of the folder's caption files: the most frequent one, or .txt if there are none."""
    images = find_images(folder)
    counts = Counter(ending for path in images for ending in CAPTION_ENDINGS if path.with_suffix(ending).is_file())
    return counts.most_common(1)[0][0] if counts else CAPTION_ENDINGS[0]


def captioned_images(folder: Path) -> list[CaptionedImage]:
    """All images of the folder, sorted by name. StudioError if a caption cannot be read."""
    ending = caption_ending(folder)
    return [CaptionedImage(path, _caption(path.with_suffix(ending))) for path in find_images(folder)]


def _caption(file: Path) -> str | None:
    try:
        return read_text(file).strip("\n")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StudioError(f"{file} cannot be read ({getattr(error, 'strerror', None) or error})") from None


def save_caption(folder: Path, name: str, caption: str) -> Path:
    """Write the caption of an image, and return its file. StudioError if the folder has no such image."""
    known = {path.name: path for path in find_images(folder)}
    if name not in known:
        raise StudioError(f"{folder} has no image {name:.80}")
    file = known[name].with_suffix(caption_ending(folder))
    if file.is_symlink():
        raise StudioError(f"{file} is a symbolic link: edit its target instead")
    with replacing(file) as partial:
        partial.write_text(caption.strip("\n") + "\n", encoding="utf-8")
    return file


def thumbnail(path: Path, cache: Path) -> Path | None:
    """The path of a small copy in the cache, created if it is missing or outdated; None if the image is unreadable."""
    stamp = path.stat()
    key = hashlib.sha256(f"{path}\0{stamp.st_mtime_ns}\0{stamp.st_size}".encode()).hexdigest()[:24]
    copy = cache / f"{key}.jpg"
    if not copy.exists():
        try:
            image = read_upright(path)
            image.thumbnail((THUMBNAIL, THUMBNAIL))
            flat = Image.new("RGB", image.size, "white")
            flat.paste(image.convert("RGBA"), mask=image.convert("RGBA").getchannel("A"))
        except Exception:  # Pillow raises almost any exception for damaged images
            return None
        with replacing(copy) as partial:
            flat.save(partial, format="jpeg", quality=85)
    return copy
