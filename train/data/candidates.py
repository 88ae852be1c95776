"""Images that a subset lists, before they are opened: from folders, metadata files and Hugging Face datasets."""

from dataclasses import dataclass
from pathlib import Path

from lora_adapters.train.data.buckets import Size
from lora_adapters.train.data.image_files import Source
from lora_adapters.train.data_error import DataError


@dataclass(frozen=True)
class Candidate:
    """An image that has not been opened yet. `caption` is None if there is no caption."""

    source: Source
    caption: str | None
    cache_stem: str | None
    size: Size | None = None  # from an info cache


def existing_folder(path: str) -> Path:
    """Return `path` as a Path. DataError if it is not a folder."""
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(f"image_dir {path} {'is not a folder' if folder.exists() else 'does not exist'}")
    return folder
