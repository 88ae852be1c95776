"""PEFT's folders: `unet/`, `text_encoder/`, `text_encoder_2/`, each what `PeftModel.from_pretrained` reads."""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from lora_adapters.convert.deltas.base import Delta
from lora_adapters.convert.deltas.casting import cast_pairs
from lora_adapters.convert.deltas.low_rank import LowRank
from lora_adapters.convert.errors import AdapterError, UnknownFormatError
from lora_adapters.convert.families.kohya_names import check_known
from lora_adapters.convert.families.names import COMPONENTS, TEXT_PROJECTION, Lookup, ModuleName, text_path
from lora_adapters.convert.families.registry import role_of
from lora_adapters.convert.families.spelling import denoiser_of
from lora_adapters.convert.parsing import json_value
from lora_adapters.convert.storage import atomic
from lora_adapters.convert.storage.files import all_or_none, read_tensors, replacing
from lora_adapters.convert.storage.peft_folder import CONFIG, WEIGHTS, WEIGHTS_PICKLED

from .contents import Contents, WriteOptions
from .diffusers import checked, lora_config
from .kinds import kind_of, unread, warn_of_embeddings
from .metadata import dylora_metadata, dylora_of, dylora_of_config, network_args, own_facts
from .peft_kinds import check_kind, read_change, split_key
from .projections import in_own_shapes
from .writing import apart

NAME = "peft"
PREFIX = "base_model.model."
_CHANGE_THE_BASE = ("pissa", "olora", "corda")  # values of init_lora_weights
_TEXT_LAYER = re.compile(r"\bencoder\.layers\.\d+\.(self_attn|mlp)\.")
_WIDTH_OF_TEXT_ENCODER_2 = 1280


def matches(keys: Collection[str]) -> bool:
    """Whether they are of the weights in a PEFT folder."""
    return bool(keys) and all(key.startswith(PREFIX) for key in keys)


def read(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], lookup: Lookup | None = None) -> Contents:
    """UnknownFormatError: without the config in their folder, nobody knows alphas and component. See `read_folder`."""
    found, said = kind_of(tensors), f"these are weights of PEFT's, without the {CONFIG} beside them"
    raise UnknownFormatError(said) if found is None or found[0].is_read else unread(tensors, said)


def write(path: Path, contents: Contents, options: WriteOptions) -> None:
    """Write a folder with a folder for each component."""
    pairs = cast_pairs(contents.pairs(), options.dtype)
    contents = replace(contents, modules=in_own_shapes(pairs, contents.metadata))
    warn_of_embeddings(contents.embeddings, "a PEFT folder")
    dylora = contents.dylora
    tuner = {"type": "DyLora", **asdict(dylora)} if dylora else {}
    write_folder(path, contents.pairs(), contents.full_metadata(), tuner)


def _live_path(module: ModuleName) -> str:
    """The path as the installed transformers names it: version 5 dropped `text_model.` from CLIPTextModel only."""
    try:
        flattened = int(version("transformers").split(".")[0]) >= 5
    except PackageNotFoundError:
        flattened = True
    return module.path.removeprefix("text_model.") if module.component == "text_encoder" and flattened else module.path


def _config(folder: Path) -> dict[str, Any]:
    """The folder's adapter_config.json; AdapterError if it is not a JSON table."""
    try:
        config = json_value((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"{folder / CONFIG} is not JSON ({error})") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{folder / CONFIG} is not a JSON object")
    checked(config, str(folder / CONFIG))
    return config


def _read_component(
    folder: Path, component: str, lookup: Lookup | None
) -> tuple[dict[ModuleName, Delta], dict[str, Any]]:
    config = _config(folder)
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(_CHANGE_THE_BASE):
        raise AdapterError(f"{folder}: an adapter that was begun with {start} changes the base weights too")
    groups: dict[str, dict[str, torch.Tensor]] = {}
    modules: dict[ModuleName, Delta] = {}
    try:
        check_kind(config)
        for key, tensor in _tensors(folder).items():
            path, end = split_key(key.removeprefix(PREFIX))
            groups.setdefault(path, {})[end] = tensor
        for path, tensors in groups.items():
            name = path if role_of(component) == "denoiser" else text_path(path)
            module = check_known(ModuleName(component, name), lookup)
            if module in modules:
                raise AdapterError(f"{path} and another name stand for the same module {module}")
            try:
                modules[module] = read_change(config, module.path, tensors)
            except AdapterError as error:
                raise AdapterError(f"{module}: {error}") from None
    except AdapterError as error:
        raise type(error)(f"{folder}: {error}") from None
    return modules, config


def _tensors(folder: Path) -> dict[str, Any]:
    weights = folder / WEIGHTS
    return read_tensors(weights if weights.exists() else folder / WEIGHTS_PICKLED)[0]


def _component_of(folder: Path) -> str:
    """Whose a folder without component folders is, by the names and widths of its tensors."""
    tensors = _tensors(folder)
    text = {key: tensor for key, tensor in tensors.items() if _TEXT_LAYER.search(key)}
    if not text:
        if any(f"{TEXT_PROJECTION}.lora_" in key for key in tensors):
            return "text_encoder_2"
        names = {key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in tensors}
        return denoiser_of(names)
    reads = re.compile(r"\.(self_attn\.[qkv]_proj|mlp\.fc1)\.lora_A\.weight$")  # what these have is the model's width
    wide = any(
        reads.search(key) and tuple(factor.shape[1:]) == (_WIDTH_OF_TEXT_ENCODER_2,) for key, factor in text.items()
    )
    return "text_encoder_2" if wide else "text_encoder"


def read_folder(folder: Path, lookup: Lookup | None = None) -> Contents:
    """Read a PEFT folder.

    Args:
        folder: A folder with a folder for each component, or with a config of one component. The component is then the
            name of the folder, or recognised by the names and widths of its modules.
        lookup: See `names.check_known`.

    Returns:
        The changes and the metadata.

    Raises:
        AdapterError: The config or the weights cannot be read.
    """
    modules: dict[ModuleName, Delta] = {}
    metadata: dict[str, str] = {}
    parts = [(folder / part, part) for part in COMPONENTS if (folder / part / CONFIG).is_file()]
    if not parts:
        name = folder.resolve().name
        parts = [(folder, name if name in COMPONENTS else _component_of(folder))]
    for path, component in parts:
        changes, config = _read_component(path, component, lookup)
        modules |= changes
        stored = own_facts(config).get("metadata")
        if isinstance(stored, dict) and all(isinstance(text, str) for text in stored.values()):
            metadata.update(stored)
        dylora = dylora_of_config(config)
        if dylora is not None and dylora_of(metadata) is None:  # written by PEFT itself, without kohya's metadata
            metadata.update(dylora_metadata(dylora, network_args(metadata)))
    return Contents(modules, metadata)


def write_folder(
    folder: Path, modules: Mapping[ModuleName, LowRank], metadata: Mapping[str, str], tuner: Mapping
) -> None:
    """Write a PEFT folder with a folder for each component, all of them or none.

    Args:
        folder: The folder.
        modules: The pairs.
        metadata: kohya's metadata.
        tuner: Options that restore the adapter type, such as DyLoRA's. They are in `auto_mapping`, a free-form field of
            all PEFT configs, so that stock PEFT reads a plain LoRA.

    Raises:
        AdapterError: The folder cannot be written, or the files of an earlier adapter cannot be deleted.
    """
    with all_or_none(folder) as own:
        for component in {module.component for module in modules}:
            (own / component).mkdir()
            mine = {_live_path(module): pair for module, pair in modules.items() if module.component == component}
            _write_component(own / component, mine, metadata, tuner)
    for component in set(COMPONENTS) - {module.component for module in modules}:  # of an adapter that was there before
        if (folder / component / CONFIG).is_file():
            for name in (CONFIG, WEIGHTS, WEIGHTS_PICKLED):
                if not atomic.delete(folder / component / name):
                    raise AdapterError(
                        f"{folder / component / name} belongs to the previous adapter and cannot be deleted"
                    )


def _write_component(folder: Path, mine: Mapping[str, LowRank], metadata: Mapping[str, str], tuner: Mapping) -> None:
    config = {
        **lora_config(mine),
        "peft_type": "LORA",
        "task_type": None,
        "inference_mode": True,
        "lora_dropout": 0.0,
        "bias": "none",
        "auto_mapping": {"lora_adapters": {**tuner, "metadata": dict(metadata)}},
    }
    tensors = {f"{PREFIX}{path}.lora_A.weight": pair.down for path, pair in mine.items()}
    tensors |= {f"{PREFIX}{path}.lora_B.weight": pair.up for path, pair in mine.items()}
    with replacing(folder / WEIGHTS, durable=True) as partial:
        safetensors.torch.save_file(apart(tensors), partial, {"format": "pt"})
    with replacing(folder / CONFIG) as partial:
        partial.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
