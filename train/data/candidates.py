"""Images that a subset names, before they are opened: what folders, metadata files and Hugging Face datasets give."""

from dataclasses import dataclass
from pathlib import Path

from lora_adapters.train.data.buckets import Size
from lora_adapters.train.data.image_files import Source
from lora_adapters.train.data_error import DataError


@dataclass(frozen=True)
class Candidate:
    """An image that has not been opened yet; `caption` is None if it has none."""

    source: Source
    caption: str | None
    cache_stem: str | None
    size: Size | None = None  # from an info cache


def existing_folder(path: str) -> Path:
    """`path` as a folder, or DataError."""
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(f"image_dir {path} {'is not a folder' if folder.exists() else 'does not exist'}")
    return folder
