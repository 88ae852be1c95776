"""Finding the weights files of a component of a Diffusers folder: those that diffusers and transformers would load."""

import re
from pathlib import Path

from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.parsing import json_value

from .files import read_text

# The names that diffusers and transformers look for, by priority; other names are used only if none of these exists.
_NAMES = ("diffusion_pytorch_model", "model", "pytorch_model")
_SHARD = re.compile(r"-([0-9]+)-of-([0-9]+)")


def variant(file: Path) -> str:
    """The variant of a weights file or of an index of shards ("fp16", "non_ema"); "" for the main variant."""
    name = _SHARD.sub("", file.name)
    parts = name.split(".")[1:]
    return ".".join(part for part in parts if part not in ("safetensors", "bin", "index", "json"))


def weights_of(folder: Path) -> list[Path]:
    """The weights files of a component, the main variant first.

    For each variant, these are the shards listed in its index, or a single file; .safetensors is preferred to .bin.
    Files that no library would load are left out (shards that are in no index, copies under other names).

    Args:
        folder: The folder of the component; it need not exist.

    Returns:
        The files, one variant after the other.

    Raises:
        AdapterError: The index is damaged or lists a missing file, or there are shards without an index.
    """
    if not folder.is_dir():
        return []
    files = [file for file in sorted(folder.iterdir()) if "model" in file.name and file.is_file()]
    weights = [file for file in files if file.name.endswith((".safetensors", ".bin"))]
    indices = [file for file in files if file.name.endswith(".json") and ".index." in file.name]
    chosen: list[Path] = []
    for name in sorted({variant(file) for file in weights + indices}, key=lambda name: (name != "", name)):
        for ending in (".safetensors", ".bin"):
            of_variant = [file for file in weights if variant(file) == name and file.name.endswith(ending)]
            tables = [file for file in indices if variant(file) == name and f"{ending}." in file.name]
            listed = _of_one_variant(folder, of_variant, tables)
            if listed:
                chosen += listed
                break
    if weights and not chosen:
        raise AdapterError(f"{folder} contains only some shards of a model ({weights[0].name}) and no index")
    return chosen


def stem_of(file: Path) -> str:
    """The name of a weights file or of an index of shards, without shard numbers, variant and extension."""
    return _SHARD.sub("", file.name).partition(".")[0]


def _of_one_variant(folder: Path, files: list[Path], indices: list[Path]) -> list[Path]:
    """The file or the shards of one variant in one format; [] if it has none."""
    stems = sorted({stem_of(file) for file in files + indices}, key=lambda stem: (stem not in _NAMES, stem))
    for stem in sorted(stems, key=lambda stem: _NAMES.index(stem) if stem in _NAMES else len(_NAMES)):
        whole = [file for file in files if stem_of(file) == stem and not _SHARD.search(file.name)]
        shards = [file for file in files if stem_of(file) == stem and _SHARD.search(file.name)]
        index = next((file for file in indices if stem_of(file) == stem), None)
        # diffusers prefers the index, transformers prefers a single file.
        if index is not None and (not whole or stem == "diffusion_pytorch_model"):
            return _named_by(index, folder)
        if whole:
            return whole
        if shards and _complete(shards):
            return shards
    return []


def _named_by(index: Path, folder: Path) -> list[Path]:
    try:
        table = json_value(read_text(index))
        names = sorted(set(table["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise AdapterError(f"{index} is not an index of shards: it has no weight_map with file names") from None
    if not names:
        raise AdapterError(f"{index} lists no files")
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise AdapterError(f"{index} lists {name}, which is not in its folder")
    return [folder / name for name in names]


def _complete(shards: list[Path]) -> bool:
    """Whether shards without an index are complete."""
    places = [tuple(map(int, _SHARD.search(file.name).groups())) for file in shards]  # type: ignore[union-attr]
    count = places[0][1]
    return sorted(places) == [(number, count) for number in range(1, count + 1)]
