"""kohya's file format: `<flat module name>.{lora_down.weight, lora_up.weight, alpha}`.

LyCORIS writes its LoCon adapters in the same format, with a third factor `lora_mid.weight` where a convolution is
Tucker-decomposed; it is folded into `down` when read.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from lora_adapters.convert.deltas.base import scalar_of
from lora_adapters.convert.deltas.casting import cast_pairs
from lora_adapters.convert.deltas.low_rank import LowRank
from lora_adapters.convert.errors import AdapterError, first_line
from lora_adapters.convert.families import kohya_names
from lora_adapters.convert.families.names import Lookup, ModuleName
from lora_adapters.convert.families.registry import BASE_VERSION, by_kohya_names, by_name

from .contents import Contents, WriteOptions
from .fused import named_changes
from .metadata import hashes
from .writing import apart, bundled, write_file

NAME = "kohya"

_TENSORS = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_mid.weight": "mid",
    "alpha": "alpha",
    "lora_A.weight": "down",
    "lora_B.weight": "up",
}

_STARTS = tuple(kohya_names.PREFIXES)


def matches(keys: Collection[str]) -> bool:
    """Whether every key is kohya's and all are of low-rank pairs, not of DoRA, LoHa or LoKr."""
    return bool(keys) and all(key.startswith(_STARTS) and key.partition(".")[2] in _TENSORS for key in keys)


def _tucker(down: torch.Tensor, mid: torch.Tensor) -> torch.Tensor:
    """(r, in, 1, 1) and (r, r, h, w) as one (r, in, h, w), float32: a narrower dtype would round it once more."""
    return torch.einsum("ijhw,jk->ikhw", mid.float(), down.float().flatten(1))


def read(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], lookup: Lookup | None = None) -> Contents:
    """What a file in kohya's format holds; see `read_modules`."""
    modules = read_modules(tensors, lookup)
    return Contents(modules, with_family(metadata, tensors, modules))


def with_family(metadata: Mapping[str, str], keys: Collection[str], modules: Collection[ModuleName]) -> dict[str, str]:
    """The metadata with the version of the base model, where only one family's modules are called like that."""
    family = by_kohya_names(keys)
    told = {BASE_VERSION: family.versions[0].value} if family is not None and family.has(modules) else {}
    return {**told, **metadata}


def write(path: Path, contents: Contents, options: WriteOptions) -> None:
    """Write a file in kohya's format."""
    family = contents.family
    contents = replace(contents, modules=cast_pairs(contents.pairs(), options.dtype))
    tensors = apart({**to_tensors(contents.pairs(), family.name), **bundled(contents.embeddings)})
    metadata = contents.full_metadata(options.modelspec)
    write_file(path, tensors, metadata | hashes(tensors, metadata))


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
            if half not in part:
                raise AdapterError(f"{name} has no lora_{half}.weight beside its {other if other in part else 'alpha'}")
        if module in modules:
            raise AdapterError(f"{name} and another name stand for the same module {module}")
        try:
            down = _tucker(part["down"], part["mid"]) if "mid" in part else part["down"]
            alpha = scalar_of("alpha", part["alpha"]) if "alpha" in part else 0.0
            modules[module] = LowRank(down, part["up"], alpha or float(down.shape[0]))
        except (RuntimeError, IndexError) as error:  # a lora_mid of another shape
            raise AdapterError(f"{name}: {first_line(error)}") from None
        except AdapterError as error:
            raise type(error)(f"{name}: {error}") from None
    return modules


def to_tensors(modules: Mapping[ModuleName, LowRank], architecture: str) -> dict[str, torch.Tensor]:
    """Kohya-format tensors in the dtypes that the modules have.

    alpha is 0-dim and of the same dtype, as kohya's, or float32 where that would round it. AdapterError where it is
    beyond float32.
    """
    tensors = {}
    for name, one in named_changes(modules, by_name(architecture)).items():
        alpha = torch.tensor(one.alpha, dtype=one.up.dtype)
        if float(alpha) != one.alpha:
            alpha = torch.tensor(one.alpha, dtype=torch.float32)
        if math.isinf(float(alpha)):  # no dtype of 8 bits has an isinf of its own
            raise AdapterError(f"{name}: alpha {one.alpha:g} is too large to be written")
        if alpha == 0:  # a literal 0 is read as "the rank" by trainers: no effect is written as a zero matrix
            one, alpha = replace(one, up=torch.zeros_like(one.up)), torch.tensor(float(one.rank), dtype=one.up.dtype)
        tensors[f"{name}.alpha"] = alpha
        tensors[f"{name}.lora_down.weight"] = one.down.contiguous()
        tensors[f"{name}.lora_up.weight"] = one.up.contiguous()
    return tensors
