"""kohya's file format: `<flat module name>.{lora_down.weight, lora_up.weight, alpha}`.

LyCORIS writes its LoCon adapters in the same format, with a third factor `lora_mid.weight` for Tucker-decomposed
convolutions, which is multiplied into `down` on reading.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from lora_adapters.convert.deltas.casting import cast_pairs
from lora_adapters.convert.deltas.low_rank import LowRank
from lora_adapters.convert.deltas.tucker import Tucker, read_lora
from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families import kohya_names
from lora_adapters.convert.families.detection import Sized, reads_other_text_than
from lora_adapters.convert.families.names import Lookup, ModuleName
from lora_adapters.convert.families.registry import BASE_VERSION, by_kohya_names, by_name

from .contents import Contents, WriteOptions
from .fused import named_changes
from .writing import bundled, tensors_of, write_hashed

NAME = "kohya"

_TENSORS = {
    "lora_down.weight": "lora_down.weight",
    "lora_up.weight": "lora_up.weight",
    "lora_mid.weight": "lora_mid.weight",
    "alpha": "alpha",
    # Kohya's module names with other programs' suffixes.
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora_A.default.weight": "lora_down.weight",
    "lora_B.default.weight": "lora_up.weight",
    "lora.down.weight": "lora_down.weight",
    "lora.up.weight": "lora_up.weight",
    "lora_linear_layer.down.weight": "lora_down.weight",
    "lora_linear_layer.up.weight": "lora_up.weight",
}

_STARTS = tuple(kohya_names.PREFIXES)


def matches(keys: Collection[str]) -> bool:
    """Whether all keys are kohya's and belong to low-rank pairs, not to DoRA, LoHa or LoKr."""
    return bool(keys) and all(key.startswith(_STARTS) and key.partition(".")[2] in _TENSORS for key in keys)


def read(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], lookup: Lookup | None = None) -> Contents:
    """Read a file in kohya's format; see `read_modules`."""
    modules = read_modules(tensors, lookup)
    return Contents(modules, with_family(metadata, tensors, modules))


def with_family(
    metadata: Mapping[str, str], keys: Collection[str], modules: Mapping[ModuleName, Sized]
) -> dict[str, str]:
    """Add the version of the base model to metadata, if only one family has modules of these names.

    Programs other than kohya's use the original code's names for other families too; these differ in their widths.

    Args:
        metadata: The metadata of the file.
        keys: The keys of its tensors.
        modules: Its modules, of which only `out_in` is used.

    Returns:
        The metadata; an existing entry is kept.
    """
    family = by_kohya_names(keys)
    if family is None or not family.has(modules) or reads_other_text_than(family, modules):
        return dict(metadata)
    return {BASE_VERSION: family.versions[0].value, **metadata}


def write(path: Path, contents: Contents, options: WriteOptions) -> None:
    """Write a file in kohya's format."""
    family = contents.naming_family
    contents = replace(contents, modules=cast_pairs(contents.pairs(), options.dtype))
    tensors = {**to_tensors(contents.pairs(), family.name), **bundled(contents.embeddings)}
    write_hashed(path, tensors, contents.full_metadata(options.modelspec))


def read_modules(tensors: Mapping[str, torch.Tensor], lookup: Lookup | None = None) -> dict[ModuleName, LowRank]:
    """The modules of tensors in kohya's format.

    Args:
        tensors: The tensors of the file; they are not copied. An alpha that is missing or 0 means the rank, as in
            kohya's network code.
        lookup: See `kohya_names.from_kohya`.

    Returns:
        The pairs.

    Raises:
        AdapterError: A module is unknown, a pair is incomplete, or shapes do not match.
    """
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, kind = key.partition(".")
        part = parts.setdefault(name, {})
        if _TENSORS[kind] in part:
            raise AdapterError(f"{key} and another key stand for the same tensor")
        part[_TENSORS[kind]] = tensor
    modules: dict[ModuleName, LowRank] = {}
    for name, part in parts.items():
        module = kohya_names.from_kohya(name, lookup)
        for half, other in (("down", "up"), ("up", "down")):
            if f"lora_{half}.weight" not in part:
                beside = other if f"lora_{other}.weight" in part else "alpha"
                raise AdapterError(f"{name} is incomplete: it has {beside} but no lora_{half}.weight")
        if module in modules:
            raise AdapterError(f"{name} and another name stand for the same module {module}")
        try:
            change = read_lora(part)
            assert change is not None, name
            modules[module] = change.low_rank() if isinstance(change, Tucker) else change
        except AdapterError as error:
            raise type(error)(f"{name}: {error}") from None
    return modules


def to_tensors(modules: Mapping[ModuleName, LowRank], architecture: str) -> dict[str, torch.Tensor]:
    """The tensors of a file in kohya's format, in the dtypes of the modules.

    Args:
        modules: The pairs.
        architecture: The name of the family.

    Returns:
        The tensors. As in kohya's files, alpha has shape () and the dtype of the factors, or float32 if that dtype
        would round it.

    Raises:
        AdapterError: An alpha is too large for float32, or the parts of a fused layer cannot be joined.
    """
    return tensors_of(named_changes(modules, by_name(architecture)))
