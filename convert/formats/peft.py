"""PEFT's folders: `unet/`, `text_encoder/`, `text_encoder_2/`, each of which `PeftModel.from_pretrained` can read."""

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
from lora_adapters.convert.deltas.reading import read_module
from lora_adapters.convert.errors import AdapterError, UnknownFormatError
from lora_adapters.convert.families.kohya_names import check_known
from lora_adapters.convert.families.names import COMPONENTS, TEXT_PROJECTION, Lookup, ModuleName, text_path
from lora_adapters.convert.families.registry import role_of
from lora_adapters.convert.families.spelling import denoiser_of
from lora_adapters.convert.parsing import json_value
from lora_adapters.convert.storage import atomic
from lora_adapters.convert.storage.files import all_or_none, read_tensors, replacing
from lora_adapters.convert.storage.peft_folder import CONFIG, WEIGHTS, WEIGHTS_PICKLED

from . import lycoris
from .contents import Contents, WriteOptions
from .diffusers import checked, config_of, lora_config
from .kinds import kind_of, unread, warn_of_embeddings
from .metadata import dylora_metadata, dylora_of, dylora_of_config, network_args, own_facts
from .peft_files import ROTATION_FACTS, SCALE_FACTS, open_rotation, open_scale, without_adapter_name
from .peft_kinds import check_kind, read_change, split_key
from .projections import in_own_shapes
from .writing import apart

NAME = "peft"
PREFIX = "base_model.model."
_TEXT_LAYER = re.compile(r"\bencoder\.layers\.\d+\.(self_attn|mlp)\.")
_SQUARE = (".self_attn.q_proj", ".self_attn.k_proj", ".self_attn.v_proj", ".self_attn.out_proj")
_WIDTH_OF_TEXT_ENCODER, _WIDTH_OF_TEXT_ENCODER_2 = 768, 1280


def matches(keys: Collection[str]) -> bool:
    """Whether these are the keys of the weights in a PEFT folder."""
    return bool(keys) and all(key.startswith(PREFIX) for key in keys)


def read(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], lookup: Lookup | None = None) -> Contents:
    """Read the weights file of a folder without its config, if the tensors and the metadata suffice.

    Args:
        tensors: The tensors; the component is recognised by their names and widths.
        metadata: The metadata of the file, which may contain the config.
        lookup: See `names.check_known`.

    Returns:
        The changes and the metadata.

    Raises:
        UnknownFormatError: The kind of adapter is not supported, or the config is needed.
    """
    said = f"these are PEFT weights without their {CONFIG}"
    found = kind_of(tensors)
    if found is not None and not found[0].is_read:
        raise unread(tensors, said)
    component = _component_of(tensors)
    if not config_of(metadata, component):
        missing = ROTATION_FACTS if open_rotation(tensors, metadata) else SCALE_FACTS if open_scale(tensors) else None
        if missing is not None:
            raise UnknownFormatError(f"{said}, which says {missing}: put it beside them, or use their folder")
    named = {f"{component}.{key.removeprefix(PREFIX)}": tensor for key, tensor in tensors.items()}
    return lycoris.read(named, metadata, lookup)


def write(path: Path, contents: Contents, options: WriteOptions) -> None:
    """Write a folder with a subfolder for each component."""
    pairs = cast_pairs(contents.pairs(), options.dtype)
    contents = replace(contents, modules=in_own_shapes(pairs, contents.metadata))
    warn_of_embeddings(contents.embeddings, "a PEFT folder")
    dylora = contents.dylora
    tuner = {"type": "DyLora", **asdict(dylora)} if dylora else {}
    write_folder(path, contents.pairs(), contents.full_metadata(), tuner)


def _live_path(module: ModuleName) -> str:
    """The path in the installed version of transformers: version 5 removed `text_model.` from CLIPTextModel only."""
    try:
        flattened = int(version("transformers").split(".")[0]) >= 5
    except PackageNotFoundError:
        flattened = True
    return module.path.removeprefix("text_model.") if module.component == "text_encoder" and flattened else module.path


def _config(folder: Path) -> dict[str, Any]:
    """The folder's adapter_config.json; AdapterError if it is not a JSON object."""
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
    modules: dict[ModuleName, Delta] = {}
    try:
        check_kind(config)
        for path, tensors in _by_module(_tensors(folder)).items():
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


def _component_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """Recognise the component of tensors by the names and widths of their modules."""
    groups = _by_module(tensors)
    if not any(_TEXT_LAYER.search(f"{path}.") for path in groups):
        return "text_encoder_2" if TEXT_PROJECTION in groups else denoiser_of(groups)
    for path, group in groups.items():
        if path.endswith(_SQUARE):
            change = read_module(group)
            width, other = _WIDTH_OF_TEXT_ENCODER_2, _WIDTH_OF_TEXT_ENCODER
            if change.fits((width, width)) and not change.fits((other, other)):
                return "text_encoder_2"
    return "text_encoder"


def _by_module(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Group the tensors by module and key suffix."""
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        path, end = split_key(without_adapter_name(key.removeprefix(PREFIX)))
        groups.setdefault(path, {})[end] = tensor
    return groups


def read_folder(folder: Path, lookup: Lookup | None = None) -> Contents:
    """Read a PEFT folder.

    Args:
        folder: A folder with a subfolder for each component, or the folder of one component. The component is then
            the name of the folder, or is recognised by the names and widths of its modules.
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
        parts = [(folder, name if name in COMPONENTS else _component_of(_tensors(folder)))]
    for path, component in parts:
        changes, config = _read_component(path, component, lookup)
        modules |= changes
        stored = own_facts(config).get("metadata")
        if isinstance(stored, dict) and all(isinstance(text, str) for text in stored.values()):
            metadata.update(stored)
        dylora = dylora_of_config(config)
        if dylora is not None and dylora_of(metadata) is None:  # the folder was saved by PEFT, without kohya's metadata
            metadata.update(dylora_metadata(dylora, network_args(metadata)))
    return Contents(modules, metadata)


def write_folder(
    folder: Path, modules: Mapping[ModuleName, LowRank], metadata: Mapping[str, str], tuner: Mapping
) -> None:
    """Write a PEFT folder with a subfolder for each component, all of them or none.

    Args:
        folder: The folder.
        modules: The pairs.
        metadata: kohya's metadata.
        tuner: Options that restore the adapter type, such as DyLoRA's. They are stored in `auto_mapping`, a free-form
            field of all PEFT configs, so that stock PEFT reads the folder as a plain LoRA.

    Raises:
        AdapterError: The folder cannot be written, or the files of an earlier adapter cannot be deleted.
    """
    with all_or_none(folder) as own:
        for component in {module.component for module in modules}:
            (own / component).mkdir()
            mine = {_live_path(module): pair for module, pair in modules.items() if module.component == component}
            _write_component(own / component, mine, metadata, tuner)
    for component in set(COMPONENTS) - {module.component for module in modules}:  # left over from an earlier adapter
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
