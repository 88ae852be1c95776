"""Loads the images of a subset and their captions, from a folder, a metadata file or a Hugging Face dataset."""

import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lora_adapters.convert.parsing import json_value, read_text
from lora_adapters.convert.storage.atomic import replacing
from lora_adapters.convert.terminal import is_quiet
from lora_adapters.train.data.buckets import Size
from lora_adapters.train.data.candidates import Candidate, existing_folder
from lora_adapters.train.data.config import SubsetConfig
from lora_adapters.train.data.image_files import FileSource, Source, find_images, size_if_whole
from lora_adapters.train.data_error import DataError

logger = logging.getLogger(__name__)
INFO_CACHE = "metadata_cache.json"
NAMES_SHOWN = 5
CAPTION_ENDINGS = (".txt", ".caption", ".cap", ".tags")


@dataclass(frozen=True)
class SourceImage:
    """A readable image: size (width, height), unprocessed caption, and the paths of its caches and mask."""

    source: Source
    size: Size
    caption: str
    cache_stem: str | None = None  # path of its cache files without their endings
    mask: str | None = None


@dataclass
class SubsetImages:
    """The images of a subset, and the images that were left out."""

    images: list[SourceImage]
    skipped: list[tuple[str, str]] = field(default_factory=list)  # (name, reason)
    uncaptioned: list[str | None] = field(default_factory=list)  # cache stems of images without a caption

    @property
    def without_caption(self) -> int:
        """The number of images without a caption."""
        return len(self.uncaptioned)


def load_subset(subset: SubsetConfig) -> SubsetImages:
    """Find the images of a subset, and read their sizes and captions.

    Unreadable images are left out with a warning.

    Args:
        subset: The options.

    Returns:
        The images, and those that were left out.

    Raises:
        DataError: No image can be used, or a folder, a mask or a caption cannot be read.
    """
    if subset.dataset_name:
        from lora_adapters.train.data.huggingface import hub_candidates  # the datasets library takes seconds to import

        candidates = hub_candidates(subset)
    elif subset.metadata_file:
        from lora_adapters.train.data.metadata_file import metadata_candidates

        candidates = metadata_candidates(subset)
    else:
        candidates = _folder_candidates(subset)
    if not candidates:
        raise DataError(f"{subset.name}: no images found")
    sizes = _measure(candidates, subset.name)
    loaded = SubsetImages([])
    for candidate, size in zip(candidates, sizes, strict=True):
        if isinstance(size, str):
            loaded.skipped.append((candidate.source.name, size))
            continue
        if candidate.caption is None:
            loaded.uncaptioned.append(candidate.cache_stem)
        caption = candidate.caption if candidate.caption is not None else subset.class_tokens or ""
        loaded.images.append(SourceImage(candidate.source, size, caption, candidate.cache_stem))
    if not loaded.images:
        name, why = loaded.skipped[0]
        raise DataError(f"{subset.name}: none of its {len(candidates)} images can be read (the first: {name}: {why})")
    if subset.conditioning_data_dir:
        loaded.images = _with_masks(loaded.images, subset.conditioning_data_dir)
    if subset.cache_info and subset.image_dir and not subset.metadata_file:
        _write_info(Path(subset.image_dir), loaded.images, candidates)
    _warn(subset, loaded)
    return loaded


def read_caption(path: Path, *, all_lines: bool) -> str | None:
    """Read a caption file: its first line, or all lines that are not blank. None if the file does not exist."""
    try:
        text = read_text(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
    lines = [line.strip() for line in text.split("\n")]
    return "\n".join(line for line in lines if line) if all_lines else lines[0]


def _folder_candidates(subset: SubsetConfig) -> list[Candidate]:
    folder = existing_folder(subset.image_dir or "")
    cached = _read_info(folder) if subset.cache_info else {}
    candidates = []
    for path in find_images(folder):
        known = cached.get(path.name)
        fresh = known is not None and known["modified"] in (None, path.stat().st_mtime_ns)
        size = known["size"] if known and fresh else None
        caption = read_caption(path.with_suffix(subset.caption_extension), all_lines=subset.enable_wildcard)
        candidates.append(Candidate(FileSource(str(path)), caption, str(path.with_suffix("")), size))
    return candidates


def _read_info(folder: Path) -> dict[str, dict[str, Any]]:
    """Read sizes by file name from an earlier run's cache; in files of other tools the keys may be full paths."""
    file = folder / INFO_CACHE
    if not file.exists():
        return {}
    try:
        table = json_value(read_text(file))
        return {
            os.path.basename(key): {"size": tuple(map(int, entry["resolution"])), "modified": entry.get("modified")}
            for key, entry in table.items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError):
        logger.warning("%s is damaged; image sizes are read from the images", file)
        return {}


def _write_info(folder: Path, images: list[SourceImage], candidates: list[Candidate]) -> None:
    if all(candidate.size is not None for candidate in candidates):
        return
    table = {
        image.source.name: {
            "caption": image.caption,
            "resolution": list(image.size),
            "modified": image.source.modified(),
        }
        for image in images
    }
    try:
        with replacing(folder / INFO_CACHE) as partial:
            partial.write_text(json.dumps(table, ensure_ascii=False, indent=2), encoding="utf-8")
    except OSError as error:
        raise DataError(f"{folder / INFO_CACHE}: cannot be written for cache_info ({error.strerror})") from None


def _measure(candidates: list[Candidate], name: str) -> list[Size | str]:
    unknown = [candidate.source for candidate in candidates if candidate.size is None]
    with ThreadPoolExecutor() as pool:
        bar = tqdm(
            pool.map(size_if_whole, unknown),
            total=len(unknown),
            desc=f"reading {name}",
            delay=2,
            leave=False,
            disable=is_quiet(),
        )
        measured = iter(list(bar))
    return [candidate.size if candidate.size is not None else next(measured) for candidate in candidates]


def _with_masks(images: list[SourceImage], mask_dir: str) -> list[SourceImage]:
    folder = Path(mask_dir)
    if not folder.is_dir():
        raise DataError(f"conditioning_data_dir {mask_dir} is not a folder")
    masks = {path.stem: str(path) for path in find_images(folder)}
    missing = [image.source.name for image in images if Path(image.source.name).stem not in masks]
    if missing:
        raise DataError(f"conditioning_data_dir {mask_dir} has no mask for {_some(missing)}")
    return [
        SourceImage(image.source, image.size, image.caption, image.cache_stem, masks[Path(image.source.name).stem])
        for image in images
    ]


def _warn(subset: SubsetConfig, loaded: SubsetImages) -> None:
    if loaded.skipped:
        names = _some([f"{name} ({why})" for name, why in loaded.skipped])
        logger.warning("%s: %d images cannot be read and are left out: %s", subset.name, len(loaded.skipped), names)
    if loaded.without_caption:
        instead = f'the class "{subset.class_tokens}"' if subset.class_tokens else "an empty caption"
        count, beside = loaded.without_caption, "" if subset.metadata_file else _other_captions(subset, loaded)
        logger.warning("%s: %d images have no caption; %s is used%s", subset.name, count, instead, beside)


def _other_captions(subset: SubsetConfig, loaded: SubsetImages) -> str:
    """A hint for the warning if images without a caption have caption files with another ending."""
    stems = [stem for stem in loaded.uncaptioned if stem is not None and subset.image_dir]
    counts = {ending: sum(os.path.isfile(stem + ending) for stem in stems) for ending in CAPTION_ENDINGS}
    ending, count = max(counts.items(), key=lambda item: item[1])
    if not count:
        return ""
    return (
        f'; {count} of them have a {ending} file beside them: did you mean caption_extension = "{ending}" '
        f'instead of "{subset.caption_extension}"?'
    )


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + rest
