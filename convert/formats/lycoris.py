"""LyCORIS' file format, for changes of any kind: a key consists of the module's name and a suffix for the tensor.

Module names are read in several spellings: kohya's flat names, ComfyUI's and diffusers' dotted names.
"""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lora_adapters.convert.deltas.base import Delta
from lora_adapters.convert.deltas.casting import cast_changes
from lora_adapters.convert.deltas.reading import read_module, split_suffix
from lora_adapters.convert.errors import AdapterError, UnknownFormatError, UnknownModuleError
from lora_adapters.convert.families.kohya_names import DOTTED, PREFIXES, component_of, paths_by_flat_name
from lora_adapters.convert.families.names import COMPONENTS, Lookup, ModuleName, nearest
from lora_adapters.convert.families.registry import DENOISER

from .contents import Contents, Stored, WriteOptions
from .diffusers import alpha_from_config, config_of, kohya_metadata
from .fused import named_changes
from .kinds import kind_of
from .kohya import with_family
from .metadata import network_args
from .peft_files import ROTATION_FACTS, open_rotation, without_adapter_name
from .peft_kinds import read_change
from .writing import bundled, tensors_of, write_hashed

NAME = "lycoris"
_RS_LORA = "rs_lora"  # one of LyCORIS' network arguments
_PEFTS = ("lora_A.", "lora_B.", "lora_magnitude_vector")  # PEFT's suffixes, which this format does not write

_RAW_LEVEL = "base_model.model."  # a prefix in PEFT's raw state dicts
_SCALED = ("LOHA", "LOKR")  # PEFT types whose scale is in the config
_FLAT = tuple(PREFIXES)
_DOTTED_TEXT_ENCODER = re.compile(r"^(lora_te[12])\.")


def split_key(key: str) -> tuple[str, str]:
    """Split a key into the name of the module, flat or dotted, and the suffix.

    Args:
        key: The key of a tensor.

    Returns:
        The name and the suffix.

    Raises:
        AdapterError: No known kind of adapter uses this suffix.

    >>> split_key("lora_unet_mid_block_attentions_0_proj_in.lora_up.weight")
    ('lora_unet_mid_block_attentions_0_proj_in', 'lora_up.weight')
    >>> split_key("diffusion_model.middle_block.1.proj_in.diff_b")
    ('diffusion_model.middle_block.1.proj_in', 'diff_b')
    """
    key = without_adapter_name(key.replace(_RAW_LEVEL, "", 1))
    flat, split = key.startswith(_FLAT), split_suffix(key)
    if split is not None:
        parts, suffix = split
        # diffusers' conversion to kohya's names leaves dots in the names of magnitudes.
        return ("_" if flat else ".").join(parts), suffix
    if flat:
        name, _, suffix = key.partition(".")
        return name, suffix  # `read_module` raises the error for the unknown suffix
    raise AdapterError(f"{key:.200} does not end like a key of a known kind of adapter")


def group_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Group a file's tensors by module name and key suffix; see `split_key`."""
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, suffix = split_key(key)
        group = groups.setdefault(name, {})
        if suffix in group:
            raise AdapterError(f"{key:.200} and another key stand for the same tensor")
        group[suffix] = tensor
    return groups


def resolve(name: str, lookup: Lookup | None = None) -> ModuleName:
    """Find the module for a name in a file, flat or dotted, in the spelling of diffusers or of the original code.

    Args:
        name: The name, as returned by `split_key`.
        lookup: Called with the component and the rest of the name if no known family has the module; returns its path
            or None.

    Returns:
        The module.

    Raises:
        UnknownModuleError: The module is unknown; the message suggests the nearest known name.
    """
    prefixes = PREFIXES | DOTTED | {"": DENOISER}  # state dicts of a single model have no prefix
    prefix = next(prefix for prefix in prefixes if name.startswith(prefix))
    rest = name.removeprefix(prefix)
    component = component_of(prefix, rest, prefixes)
    flat, table = rest.replace(".", "_"), paths_by_flat_name(component, norms=True)
    path = table.get(flat) or (lookup(component, rest) if lookup is not None else None)
    if path is None:
        near = nearest(flat, table)
        if not near and not prefix:
            near = f": names begin with {', '.join(PREFIXES | DOTTED)}"
        raise UnknownModuleError(f"unknown module {name:.100}{near}")
    return ModuleName(component, path)


def matches(keys: Collection[str]) -> bool:
    """Whether a key belongs to a kind of change that only this format can store."""
    match = kind_of(keys)
    return match is not None and match[0].is_read


def read(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], lookup: Lookup | None = None) -> Contents:
    """Read a file with changes of any kind.

    Args:
        tensors: The tensors of the file; they are not copied.
        metadata: The metadata of the file, which say whether LyCORIS trained it with `rs_lora`, and which contain the
            alphas of diffusers' files.
        lookup: See `resolve`.

    Returns:
        The changes and the metadata.

    Raises:
        UnknownFormatError: A module or tensor is unknown, or shapes do not match; the message names the kind and the
            module.
    """
    try:
        stored = _stored(tensors, metadata, lookup)
    except AdapterError as error:
        kind, key = kind_of(tensors) or (None, "")
        raise UnknownFormatError(f"it is {kind.name if kind else NAME} ({key:.100}), but {error}") from error
    modules = {module: entry.change for module, entry in stored.items()}
    own = {
        module: entry for module, entry in stored.items() if not any(end.startswith(_PEFTS) for end in entry.tensors)
    }
    flat = [_DOTTED_TEXT_ENCODER.sub(r"\1_", key) if key.startswith("lora_te") else key for key in tensors]
    return Contents(modules, with_family(kohya_metadata(metadata), flat, modules), stored=own)


def read_modules(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None, lookup: Lookup | None = None
) -> dict[ModuleName, Delta]:
    """Read the changes of modules from a file's tensors; see `read`. AdapterError if they cannot be read."""
    return {module: entry.change for module, entry in _stored(tensors, metadata or {}, lookup).items()}


def _stored(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], lookup: Lookup | None
) -> dict[ModuleName, Stored]:
    rs_lora, configs = _is_rank_stabilised(metadata), _configs(metadata)
    unknown = open_rotation(tensors, metadata)
    modules: dict[ModuleName, Stored] = {}
    for name, group in group_tensors(tensors).items():
        module = resolve(name, lookup)
        if module in modules:
            raise AdapterError(f"{name:.100} and another name stand for the same module {module}")
        config = configs[module.component]
        try:
            if unknown is None or "oft_R.weight" not in group:
                change = _change(config, module, group, rs_lora)
            elif config.get("peft_type") == "OFT":
                change = read_change(config, module.path, group)
            else:
                raise AdapterError(f"the file does not say {ROTATION_FACTS}: use a folder with adapter_config.json")
        except AdapterError as error:
            raise AdapterError(f"{name:.100}: {error}") from None
        modules[module] = Stored(change, group)
    return modules


def _configs(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The PEFT config of each component in the metadata."""
    return {component: config_of(metadata, component) for component in COMPONENTS}


def _change(config: Mapping[str, Any], module: ModuleName, group: Mapping[str, torch.Tensor], rs_lora: bool) -> Delta:
    """The change of a module, with the scale of the PEFT config in the metadata."""
    if "alpha" in group:
        return read_module(group, rs_lora)
    if config.get("peft_type") in _SCALED:
        return read_change(config, module.path, group)
    down = group.get("lora_A.weight")
    if down is None or not down.ndim or not config:
        return read_module(group, rs_lora)
    alpha = torch.tensor(alpha_from_config(config, module.path, down.shape[0]), dtype=torch.float64)
    return read_module({**group, "alpha": alpha}, rs_lora)


def _is_rank_stabilised(metadata: Mapping[str, str]) -> bool:
    return network_args(metadata).get(_RS_LORA, "").lower() in ("true", "1")


def write(path: Path, contents: Contents, options: WriteOptions) -> None:
    """Write a file with kohya's module names and LyCORIS' tensor names.

    Args:
        path: The file.
        contents: The changes. If none was modified since it was read, the original tensors are written.
        options: The dtype, and which metadata to write.

    Raises:
        AdapterError: A change cannot be written in this format.
    """
    if not contents.metadata.get("ss_network_module"):
        contents = replace(contents, metadata={**contents.metadata, "ss_network_module": "lycoris.kohya"})
    family, modules = contents.naming_family, cast_changes(contents.modules, options.dtype)
    stored = {module: contents.stored.get(module) for module in modules}
    if all(entry is not None and entry.change is modules[module] for module, entry in stored.items()):
        groups = {family.kohya_name(module): entry.tensors for module, entry in stored.items() if entry is not None}
        tensors = {f"{name}.{end}": tensor for name, group in groups.items() for end, tensor in group.items()}
    else:
        tensors = tensors_of(named_changes(modules, family, in_parts=True))
        contents = replace(contents, metadata=_without_rank_stabilisation(contents.metadata))
    metadata = replace(contents, modules=modules).full_metadata(options.modelspec)
    write_hashed(path, {**tensors, **bundled(contents.embeddings)}, metadata)


def _without_rank_stabilisation(metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata without `rs_lora`, since the alphas that `Delta.tensors` writes contain the whole scale."""
    if not _is_rank_stabilised(metadata):
        return dict(metadata)
    args = {name: value for name, value in network_args(metadata).items() if name != _RS_LORA}
    return {**metadata, "ss_network_args": json.dumps(args)}
