"""Captions of many images in one file: json {path: {caption, tags}}, or jsonl with image_path in each line."""

import glob
from pathlib import Path
from typing import Any

from lora_adapters.convert.parsing import json_value, one_line_end, read_text
from lora_adapters.train.data.candidates import Candidate, existing_folder
from lora_adapters.train.data.config import SubsetConfig
from lora_adapters.train.data.image_files import FileSource
from lora_adapters.train.data.image_suffixes import TRAINED
from lora_adapters.train.data_error import DataError


def metadata_candidates(subset: SubsetConfig) -> list[Candidate]:
    """The images of a metadata file, in its order. Image sizes in the file are ignored.

    Args:
        subset: The options, with `metadata_file`. A path in the file is absolute, relative to image_dir, or the name of
            an image in image_dir without its suffix. If there is no such image, or no image_dir, it is relative to the
            working directory.

    Returns:
        A candidate for each entry.

    Raises:
        DataError: The file cannot be read, or image_dir does not exist.
    """
    file = Path(subset.metadata_file or "")
    folder = existing_folder(subset.image_dir) if subset.image_dir else Path()
    return [_candidate(file, folder, key, entry, subset) for key, entry in read_metadata(file)]


def read_metadata(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """Read (path, entry) of every image of a json or jsonl metadata file."""
    try:
        text = read_text(file)
    except OSError as error:
        raise DataError(f"metadata_file {file}: {error.strerror or error}") from None
    except ValueError as error:
        raise DataError(f"metadata_file {file}: {error}") from None
    if file.suffix.lower() == ".jsonl":
        entries = []
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                entry = _parse(line, f"{file}: line {number}")
                if not isinstance(entry, dict) or not isinstance(entry.get("image_path"), str):
                    raise DataError(f"metadata_file {file}: line {number} must be a table with image_path")
                entries.append((entry["image_path"], entry))
        return entries
    if file.suffix.lower() != ".json":
        raise DataError(f"metadata_file {file} must end in .json or .jsonl")
    table = _parse(text, str(file))
    if not isinstance(table, dict) or not all(isinstance(entry, dict) for entry in table.values()):
        raise DataError(f"metadata_file {file} must be an object with an object for each image path")
    return list(table.items())


def _parse(text: str, where: str) -> Any:
    try:
        return json_value(text)
    except ValueError as error:
        raise DataError(f"metadata_file {where}: {error}") from None


def _candidate(file: Path, folder: Path, key: str, entry: dict[str, Any], subset: SubsetConfig) -> Candidate:
    for name in ("caption", "tags"):
        if not isinstance(entry.get(name), str | None):
            raise DataError(f"metadata_file {file}: {key}: {name} must be a string")
    try:
        path = _find(folder, key)
    except OSError as error:
        raise DataError(f"metadata_file {file}: {key[:60]}: {error.strerror}") from None
    caption, tags = (one_line_end(text) if text else text for text in (entry.get("caption"), entry.get("tags")))
    separator = subset.caption_separator
    tags = tags and tags.replace("\n", separator)
    if caption and tags:
        # Each line of a caption is an alternative caption, so each gets the tags.
        caption = "\n".join(f"{line}{separator}{tags}" for line in caption.split("\n") if line)
    caption = caption or tags if tags else caption
    return Candidate(FileSource(str(path)), caption, str(path.with_suffix("")))


def _find(folder: Path, key: str) -> Path:
    path = folder / key
    if path.is_file():
        return path
    beside = (Path(name) for name in sorted(glob.glob(glob.escape(str(path)) + ".*")))
    image = next((other for other in beside if other.suffix.lower() in TRAINED and other.stem == path.name), None)
    if image is None and Path(key).is_file():
        return Path(key)  # kohya's tools write such paths if the folder was a relative path
    return image or path
