"""What in a Diffusers folder is part of its pipeline: the components that it names, and the files that these need."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .names import COMPONENTS
from .parsing import json_value

INDEX = "model_index.json"
_USUAL = (  # where there is no index to name them
    *COMPONENTS, "vae", "tokenizer", "tokenizer_2", "scheduler", "feature_extractor", "safety_checker", "image_encoder",
)  # fmt: skip
_NEEDED = {
    "config.json", "scheduler_config.json", "generation_config.json", "preprocessor_config.json",
    "processor_config.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "spiece.model", "sentencepiece.bpe.model",
}  # fmt: skip
_WEIGHTS = re.compile(r"(diffusion_pytorch_|pytorch_)?model([.-].+)?\.(safetensors|bin)(\.index(\..+)?\.json)?")
_ANY_WEIGHTS = re.compile(
    r".+\.(safetensors|bin|ckpt|pt|pth|msgpack|onnx|onnx_data|pb|h5|xml|mlmodel|tflite)(\.index(\..+)?\.json)?"
)


def is_weights(name: str) -> bool:
    """Whether diffusers or transformers would take a component's weights, or the index of their shards, from it."""
    return _WEIGHTS.fullmatch(name) is not None


def variant_of(file: Path) -> str:
    """The variant of a weights file or of the index of its shards ("fp16", "non_ema"); "" for the main one."""
    stem = re.sub(r"-[0-9]+-of-[0-9]+|\.index|\.json$|\.bin|\.safetensors", "", file.name)
    return stem.partition(".")[2]


def index_of(folder: Path) -> dict[str, Any]:
    """What the folder's model_index.json says; {} where there is none that can be read."""
    try:
        index = json_value((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return index if isinstance(index, dict) else {}


def _components(folder: Path) -> dict[str, str | None]:
    """The components of the pipeline, each with the module that its class is from."""
    index = index_of(folder)
    named = {
        name: value[0]
        for name, value in index.items()
        if not name.startswith("_") and isinstance(value, list) and value and isinstance(value[0], str)
    }
    return {**dict.fromkeys(COMPONENTS if named else _USUAL), **named}


def pipeline_files(folder: Path) -> Iterator[Path]:
    """The files that the folder's pipeline needs: its index, and those of its components (which may be links).

    Left out: whatever else is in the folder or in a component's, weights of other frameworks and .bin beside
    .safetensors of the same variant.
    """
    index = folder / INDEX
    if index.is_file():
        yield index
    own = index_of(folder).get("_class_name")
    if isinstance(own, list) and own:  # a pipeline with code of its own
        yield from (file for file in folder.glob("*.py") if file.name == f"{own[0]}.py")
    for component, module in _components(folder).items():
        place = folder / component
        if not component or component != Path(component).name or component == ".." or not place.is_dir():
            continue
        safe = {variant_of(file) for file in place.glob("*.safetensors") if is_weights(file.name)}
        for file in sorted(place.iterdir()):
            if not file.is_file() or not (_is_needed(file.name) or file.name == f"{module}.py"):
                continue
            pickled = is_weights(file.name) and ".bin" in file.name
            if not (pickled and variant_of(file) in safe):
                yield file


def _is_needed(name: str) -> bool:
    return name in _NEEDED or is_weights(name)


def other_entries(folder: Path) -> list[Path]:
    """What is in a Diffusers folder and no part of the model, relative to it: pictures, .git, checkpoints, notes.

    Weights in a component's folder belong to the model, even where no pipeline would read them.
    """
    if not folder.is_dir():
        return []
    components = [*_components(folder), *_USUAL]
    found = []
    for entry in folder.iterdir():
        if entry.name == INDEX:
            continue
        if entry.name not in components:
            found.append(entry)
        elif entry.is_dir() and not entry.is_symlink():  # what a link leads to is not the folder's
            found += [one for one in entry.iterdir() if one.is_dir() or not _of_the_model(one.name)]
    return [entry.relative_to(folder) for entry in found]


def _of_the_model(name: str) -> bool:
    return _is_needed(name) or _ANY_WEIGHTS.fullmatch(name) is not None
