"""Adapter files for diffusion transformers, in any of the spellings that trainers use.

A key consists of a module name and a suffix for the tensor. Names are flat or dotted, from the original code or from
diffusers (see `families.spelling`); suffixes are kohya's, PEFT's or older ones. Changes of any kind are read. The
change of a layer that the original code fuses is split into those of diffusers' layers (see `deltas.rows`).
"""

import re
from collections.abc import Collection, Mapping

import torch

from lora_adapters.convert.deltas.base import Delta, with_article
from lora_adapters.convert.deltas.reading import SUFFIXES, read_module, split_suffix
from lora_adapters.convert.deltas.rows import cut, halves_swapped, row_count
from lora_adapters.convert.errors import AdapterError, UnknownFormatError, UnknownModuleError
from lora_adapters.convert.families.family import ModelFamily
from lora_adapters.convert.families.names import Lookup, ModuleName, nearest
from lora_adapters.convert.families.registry import BASE_VERSION
from lora_adapters.convert.families.spelling import (
    Target,
    family_of_names,
    fuses,
    known_names,
    may_be_of_transformer,
    split,
    targets_of,
)
from lora_adapters.convert.families.tensor_slice import Span, TensorSlice

from .contents import Contents
from .diffusers import METADATA_KEY, alpha_of, kohya_metadata
from .kinds import unread
from .peft_files import ROTATION_FACTS, open_rotation, without_adapter_name

_FLAT = ("lora_", "lycoris_")  # prefixes of names without dots
_ENDS = {
    **{end: end for end in SUFFIXES},
    **{
        f"{start}.{half}.weight": f"lora_{half}.weight"
        for start in ("lora", "lora_linear_layer")
        for half in ("down", "up")
    },
}
_XLABS = re.compile(r"(.+\.processor\.\w+_lora[12]?)\.(down|up)\.weight")


def split_key(key: str) -> tuple[str, str] | None:
    """Split a key into the name of the module and the suffix.

    Args:
        key: The key of a tensor.

    Returns:
        The name, and kohya's or PEFT's suffix; None for a key that does not belong to an adapter.

    >>> split_key("transformer.proj_out.lora_A.default.weight")
    ('transformer.proj_out', 'lora_A.weight')
    >>> split_key("double_blocks.0.processor.qkv_lora1.down.weight")
    ('double_blocks.0.processor.qkv_lora1', 'lora_down.weight')
    """
    if match := _XLABS.fullmatch(key):
        return match[1], f"lora_{match[2]}.weight"
    key = without_adapter_name(key)
    if key.startswith(_FLAT):
        name, _, end = key.partition(".")
        return (name, _ENDS[end]) if end in _ENDS else None
    split = split_suffix(key, _ENDS)
    return None if split is None else (".".join(split[0]), _ENDS[split[1]])


def read(
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    lookup: Lookup | None = None,
    family: ModelFamily | None = None,
) -> Contents | None:
    """Read a file for a diffusion transformer.

    Args:
        tensors: The tensors of the file; they are not copied.
        metadata: The metadata of the file, which may contain the family and alphas.
        lookup: Finds modules that the family does not have in a live model.
        family: The family of the live model; None recognises it from the file.

    Returns:
        The changes and the metadata; None if the file is not for a diffusion transformer.

    Raises:
        AdapterError: A module is unknown, a pair is incomplete, or shapes do not match.
        UnknownFormatError: A key does not belong to an adapter, neither the family nor the live model has a module, or
            two names stand for the same module but have different changes.
    """
    if (family is None or not fuses(family)) and (family is not None or lookup is not None):
        return None  # the live model is not a diffusion transformer
    splits = {key: split_key(key) for key in tensors}
    names = {parts[0] if parts else key for key, parts in splits.items()}
    if family is None and not may_be_of_transformer(names, metadata):
        return None
    gated = {parts[0] for parts in splits.values() if parts is not None and parts[1] == "on_input"}
    strange = next((key for key, parts in splits.items() if parts is None or _is_weight(parts, gated)), None)
    if strange is not None:
        if family is None:
            return None
        raise unread(tensors, f"{strange:.120} is not a key of an adapter file")
    groups = group_tensors(tensors, splits)
    if family is None and family_of_names(dict.fromkeys(groups), metadata).near is None:
        return None
    unknown = open_rotation(tensors, metadata)
    if unknown is not None:
        raise AdapterError(
            f"{unknown:.120} is a PEFT OFT, and the file does not say {ROTATION_FACTS}: "
            "use PEFT's folder with adapter_config.json"
        )
    changes = {name: change_of(name, group) for name, group in groups.items()}
    own, near, is_alone = family_of_names({name: change.out_in for name, change in changes.items()}, metadata)
    chosen = family or own or near
    assert chosen is not None
    modules: dict[ModuleName, Delta] = {}
    for name, change in changes.items():
        targets = _targets(name, chosen, own, lookup, tensors)
        alpha = _alpha(targets[0].module, groups[name], metadata)
        if alpha is not None:
            change = change_of(name, {**groups[name], "alpha": alpha})
        for target, part in zip(targets, _parts(name, change, targets), strict=True):
            if not _same(modules.setdefault(target.module, part), part):
                said = f"{name:.120} and another name stand for the same module {target.module}, but have other changes"
                raise UnknownFormatError(said)
    stated = {BASE_VERSION: chosen.stated} if family is not None or is_alone else {}
    return Contents(modules, {**stated, **kohya_metadata(metadata)})


def _same(first: Delta, second: Delta) -> bool:
    """Whether two changes are equal up to rounding: a file may contain a layer twice, fused and split into parts."""
    if first is second:
        return True
    if first.needs_base or second.needs_base or first.out_in != second.out_in or first.out_in is None:
        return False
    one, other = first.delta(), second.delta()
    return one.shape == other.shape and bool((one - other).norm() <= 1e-3 * one.norm())  # they may differ in rounding


def _is_weight(parts: tuple[str, str], gated: Collection[str]) -> bool:
    """Whether a tensor is a model's weight; an (IA)3 also uses the suffix `weight`, together with `on_input`."""
    return parts[1] == "weight" and parts[0] not in gated


def group_tensors(
    tensors: Mapping[str, torch.Tensor], splits: Mapping[str, tuple[str, str] | None]
) -> dict[str, dict[str, torch.Tensor]]:
    """Group the tensors by module and key suffix; `splits` are the results of `split_key`."""
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, end = splits[key] or ("", "")
        group = groups.setdefault(name, {})
        if end in group:
            raise AdapterError(f"{key:.120} and another key stand for the same tensor")
        group[end] = tensor
    return groups


def change_of(name: str, group: Mapping[str, torch.Tensor]) -> Delta:
    """Read the change of a module from its tensors; see `read_module`.

    Args:
        name: The module's name in the file.
        group: Its tensors by key suffix.

    Returns:
        The change.

    Raises:
        AdapterError: The tensors cannot be read; the message begins with the name.
    """
    try:
        return read_module(group)
    except AdapterError as error:
        raise type(error)(f"{name:.120}: {error}") from None


def _alpha(module: ModuleName, group: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> torch.Tensor | None:
    """The alpha in diffusers' metadata for a pair without an alpha tensor; None if there is nothing to add."""
    return None if METADATA_KEY not in metadata else missing_alpha(module, group, metadata)


def missing_alpha(
    module: ModuleName, group: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> torch.Tensor | None:
    """The alpha of a pair without an alpha tensor.

    Args:
        module: The module, with the name in the PEFT config of the metadata.
        group: The module's tensors by key suffix.
        metadata: The metadata of the file; if they contain no config, alpha is the rank.

    Returns:
        The alpha as a scalar tensor; None for a module that has an alpha tensor or is not a low-rank pair.
    """
    down = group.get("lora_A.weight", group.get("lora_down.weight"))
    if down is None or not down.ndim or "alpha" in group:
        return None
    return torch.tensor(alpha_of(metadata, module.component, module.path, down.shape[0]), dtype=torch.float64)


def _targets(
    name: str,
    family: ModelFamily,
    own: ModelFamily | None,
    lookup: Lookup | None,
    tensors: Mapping[str, torch.Tensor],
) -> tuple[Target, ...]:
    """The modules that a name stands for: in the family, or in the live model, or in the family of the file."""
    targets = targets_of(family, name)
    if targets is None and lookup is not None:
        for component, rest in split(family, name):
            flat = rest.replace(".", "_")
            path = lookup(component, flat)
            if path != flat:
                return (Target(ModuleName(component, path)),)
    if targets is None and own is not None:
        targets = targets_of(own, name)
    if targets is not None:
        return targets
    near = nearest(split(family, name)[-1][1].replace(".", "_"), known_names(family))
    said = f"unknown module {name:.120} for {family.title}{near}"
    raise UnknownModuleError(said) if lookup is None else UnknownFormatError(said)


def _parts(name: str, change: Delta, targets: tuple[Target, ...]) -> list[Delta]:
    """Split a change into those of the modules that its name stands for."""
    size = change.out_in
    try:
        if size is None:
            return _parts_of_rows(change, targets)
        places = [TensorSlice("", target.part, swapped=target.swapped).placed(size) for target in targets]
        parts = cut(change, [_rows(place, size[0]) for place in places])
        return [
            halves_swapped(part, size[0]) if place.swapped else part for part, place in zip(parts, places, strict=True)
        ]
    except AdapterError as error:
        raise type(error)(f"{name:.120}: {error}") from None


def _parts_of_rows(change: Delta, targets: tuple[Target, ...]) -> list[Delta]:
    """The same as `_parts`, for a change that does not contain the number of input channels."""
    if len(targets) == 1 and not targets[0].swapped:
        return [change]
    rows = row_count(change)
    if rows is None:
        return [change] * len(targets)
    parts = [target.part for target in targets]
    if any(target.swapped for target in targets) or any(part is None or part.square for part in parts):
        raise AdapterError(
            f"cannot split {with_article(change.kind)} of a fused layer: the number of input channels is unknown"
        )
    spans = [part.span(rows, 0) for part in parts if part is not None]
    return cut(change, [slice(*span) for span in spans])


def _rows(place: TensorSlice, count: int) -> slice:
    return place.rows.within(count) if isinstance(place.rows, Span) else slice(0, count)
