"""kohya's file format: `<flat module name>.{lora_down.weight, lora_up.weight, alpha}`.

LyCORIS writes its LoCon adapters in the same format, with a third factor `lora_mid.weight` where a convolution is
Tucker-decomposed; it is folded into `down` when read.
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
    # Other programs' halves under kohya's names.
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
    """Whether every key is kohya's and all are of low-rank pairs, not of DoRA, LoHa or LoKr."""
    return bool(keys) and all(key.startswith(_STARTS) and key.partition(".")[2] in _TENSORS for key in keys)


def read(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], lookup: Lookup | None = None) -> Contents:
    """What a file in kohya's format holds; see `read_modules`."""
    modules = read_modules(tensors, lookup)
    return Contents(modules, with_family(metadata, tensors, modules))


def with_family(
    metadata: Mapping[str, str], keys: Collection[str], modules: Mapping[ModuleName, Sized]
) -> dict[str, str]:
    """The metadata with the version of the base model, where only one family's modules are called like that.

    Programs other than kohya's have the original code's names for other families, too, of which the widths tell.
    """
    family = by_kohya_names(keys)
    if family is None or not family.has(modules) or reads_other_text_than(family, modules):
        return dict(metadata)
    return {BASE_VERSION: family.versions[0].value, **metadata}


def write(path: Path, contents: Contents, options: WriteOptions) -> None:
    """Write a file in kohya's format."""
    family = contents.family
    contents = replace(contents, modules=cast_pairs(contents.pairs(), options.dtype))
    tensors = {**to_tensors(contents.pairs(), family.name), **bundled(contents.embeddings)}
    write_hashed(path, tensors, contents.full_metadata(options.modelspec))


def read_modules(tensors: Mapping[str, torch.Tensor], lookup: Lookup | None = None) -> dict[ModuleName, LowRank]:
    """The modules of kohya-format tensors.

    An alpha that is missing or 0 means the rank, as in kohya's network code. AdapterError for unknown names (see
    `kohya_names.from_kohya`), lone halves and shapes that do not fit.
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
                raise AdapterError(f"{name} has no lora_{half}.weight beside its {beside}")
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
    """Kohya-format tensors in the dtypes that the modules have.

    alpha is 0-dim and of the same dtype, as kohya's, or float32 where that would round it. AdapterError where it is
    beyond float32.
    """
    return tensors_of(named_changes(modules, by_name(architecture)))
