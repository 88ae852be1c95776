"""The files of a Diffusers folder that belong to its pipeline: those that its components need."""

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from lora_adapters.convert.families.names import COMPONENTS
from lora_adapters.convert.parsing import json_value

from .files import read_text
from .folder_weights import stem_of, variant, weights_of

INDEX = "model_index.json"
_USUAL = (  # the components of a folder without an index
    *COMPONENTS, "vae", "tokenizer", "tokenizer_2", "scheduler", "feature_extractor", "safety_checker", "image_encoder",
)  # fmt: skip
_NEEDED = {
    "config.json", "scheduler_config.json", "generation_config.json", "preprocessor_config.json",
    "processor_config.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "spiece.model", "sentencepiece.bpe.model",
}  # fmt: skip
_LEGAL = re.compile(r"(LICEN[SC]E|NOTICE)[^/]*", re.IGNORECASE)  # must be included in a copy of the model
_ANY_WEIGHTS = re.compile(
    r".+\.(safetensors|bin|ckpt|pt|pth|msgpack|onnx|onnx_data|pb|h5|xml|mlmodel|tflite)(\.index(\..+)?\.json)?"
)


def index_of(folder: Path) -> dict[str, Any]:
    """The contents of the folder's model_index.json; {} if it is missing or cannot be read."""
    try:
        index = json_value(read_text(folder / INDEX))
    except (OSError, ValueError):
        return {}
    return index if isinstance(index, dict) else {}


def _components(folder: Path) -> dict[str, str | None]:
    """The components of the pipeline and the Python module of each component's class."""
    index = index_of(folder)
    named = {
        name: value[0]
        for name, value in index.items()
        if not name.startswith("_") and isinstance(value, list) and value and isinstance(value[0], str)
    }
    return {**dict.fromkeys(COMPONENTS if named else _USUAL), **named}


def pipeline_files(folder: Path) -> Iterator[Path]:
    """The files that the pipeline of a Diffusers folder needs: its index, the files of its components, its licence.

    Other files in the folder and in the components' folders are not included, nor are weights that are not read (those
    of other frameworks, or .bin files if the same variant exists as .safetensors).

    Args:
        folder: The Diffusers folder; the components' folders may be links.

    Yields:
        Paths of files below `folder`.
    """
    index = folder / INDEX
    if index.is_file():
        yield index
    yield from (file for file in folder.glob("*") if _LEGAL.fullmatch(file.name) and file.is_file())
    own = index_of(folder).get("_class_name")
    if isinstance(own, list) and own:  # a pipeline with custom code
        yield from (file for file in folder.glob("*.py") if file.name == f"{own[0]}.py")
    for component, module in _components(folder).items():
        place = folder / component
        if not component or component != Path(component).name or component == ".." or not place.is_dir():
            continue
        weights = weights_of(place)
        for file in sorted(place.iterdir()):
            needed = file.name in _NEEDED or file.name == f"{module}.py" or file in weights or _is_index(file, weights)
            if needed and file.is_file():
                yield file


def _is_index(file: Path, weights: Collection[Path]) -> bool:
    """Whether a file is the index of the shards among these weights."""
    if not (".index." in file.name and file.name.endswith(".json")):
        return False
    ending = ".bin" if ".bin." in file.name else ".safetensors"
    kind = (stem_of(file), variant(file))
    return any(
        (stem_of(weights_file), variant(weights_file)) == kind and weights_file.name.endswith(ending)
        for weights_file in weights
    )


def other_entries(folder: Path) -> list[Path]:
    """Entries of a Diffusers folder that do not belong to the model: images, .git, checkpoints, notes.

    All weights in the folder of a component belong to the model, even those that no pipeline reads.

    Args:
        folder: The folder; it need not exist.

    Returns:
        Their paths, relative to `folder`.
    """
    if not folder.is_dir():
        return []
    components = [*_components(folder), *_USUAL]
    others = []
    for entry in folder.iterdir():
        if entry.name == INDEX:
            continue
        if entry.name not in components:
            others.append(entry)
        elif entry.is_dir() and not entry.is_symlink():  # the target of a link is outside of the folder
            others += [inner for inner in entry.iterdir() if inner.is_dir() or not _of_the_model(inner.name)]
    return [entry.relative_to(folder) for entry in others]


def _of_the_model(name: str) -> bool:
    return name in _NEEDED or _ANY_WEIGHTS.fullmatch(name) is not None
