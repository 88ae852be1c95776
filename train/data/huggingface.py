"""Images and captions from a Hugging Face dataset: a Hub id, a local folder of images, or a saved dataset."""

import hashlib
from pathlib import Path
from typing import Any

import datasets

from lora_adapters.convert.parsing import one_line_end
from lora_adapters.convert.portable import file_name
from lora_adapters.train.data.candidates import Candidate
from lora_adapters.train.data.config import SubsetConfig
from lora_adapters.train.data.image_files import RowSource
from lora_adapters.train.data_error import DataError

SAVED = ("state.json", "dataset_dict.json")  # files that save_to_disk writes


def hub_candidates(subset: SubsetConfig) -> list[Candidate]:
    """Read the rows of a Hugging Face dataset's split.

    A caption may be a string, several strings (one line each), or a class label.

    Args:
        subset: The options. Without `caption_column` the column "text" is used if it exists.

    Returns:
        A candidate for each row.

    Raises:
        DataError: The dataset, the split or a column does not exist.
    """
    name, data = f"{subset.dataset_name}[{subset.split}]", _load(subset)
    if subset.image_column not in data.column_names:
        raise _no_column(name, "image_column", subset.image_column, data)
    column = subset.caption_column
    if column is not None and column not in data.column_names:
        raise _no_column(name, "caption_column", column, data)
    if column is None and "text" in data.column_names:
        column = "text"
    captions = (
        [_caption(value, data.features[column], name) for value in data[column]] if column else [None] * len(data)
    )
    # A changed dataset has another fingerprint, so that caches of its old rows are not used.
    split = file_name(subset.split)  # such as train[:10%]
    stem = Path(subset.cache_dir) / f"{split}-{data._fingerprint[:8]}" if subset.cache_dir else None
    images = data.select_columns([subset.image_column]).cast_column(subset.image_column, datasets.Image(decode=False))
    return [
        Candidate(
            RowSource(images, subset.image_column, row, f"{name} row {row}"),
            caption,
            f"{stem}-{row:08d}" if stem else None,
        )
        for row, caption in enumerate(captions)
    ]


def _load(subset: SubsetConfig) -> Any:
    name = subset.dataset_name or ""
    try:
        if any((Path(name) / file).is_file() for file in SAVED):
            data = datasets.load_from_disk(name)
            if isinstance(data, datasets.DatasetDict):
                data = data[subset.split]
            return data
        cache = _own_cache(Path(name)) if Path(name).is_dir() else None
        return datasets.load_dataset(name, subset.dataset_config_name, split=subset.split, cache_dir=cache)
    except KeyError:
        raise DataError(f"dataset_name {name} has no split {subset.split}") from None
    except Exception as error:  # the library raises many kinds, from HTTP errors to its own
        raise DataError(f"dataset_name {name}: {' '.join(str(error).split())}") from error


def _own_cache(folder: Path) -> str:
    """A cache folder for the `datasets` library that depends on the present content of `folder`.

    If a folder lists configurations, the library's default cache depends only on the last part of its path. Another
    folder of this name, or changed images, would give the old rows.
    """
    listing = hashlib.sha256(str(folder.resolve()).encode())
    for file in sorted(folder.rglob("*")):
        state = file.stat()
        listing.update(f"{file.relative_to(folder)}\0{state.st_size}\0{state.st_mtime_ns}\n".encode())
    return str(Path(datasets.config.HF_DATASETS_CACHE) / f"folder-{listing.hexdigest()[:16]}")


def _no_column(name: str, option: str, column: str, data: Any) -> DataError:
    return DataError(f"{name} has no {option} {column}; its columns are {', '.join(data.column_names)}")


def _caption(value: Any, feature: Any, name: str) -> str | None:
    if value is None or isinstance(value, str):
        return one_line_end(value) if value else value
    if isinstance(feature, datasets.ClassLabel):
        return feature.int2str(value)
    if isinstance(value, list) and value and all(isinstance(line, str) for line in value):
        return one_line_end("\n".join(value))
    raise DataError(f"{name}: a caption must be a string, a list of strings or a class label, not {value!r}")
