"""The names and changes that files in kohya's format have, where the original code fuses layers."""

from collections.abc import Mapping, Sequence
from typing import TypeVar, cast

from lora_adapters.convert.deltas.base import Delta, with_article
from lora_adapters.convert.deltas.rows import Rows, halves_swapped, whole
from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.family import Component, ModelFamily
from lora_adapters.convert.families.names import ModuleName
from lora_adapters.convert.families.transformer import Fused, Transformer

Change = TypeVar("Change", bound=Delta)


def named_changes(
    modules: Mapping[ModuleName, Change], family: ModelFamily, in_parts: bool = False
) -> dict[str, Change]:
    """The changes by kohya's names: one for each layer of the original code, which may be several layers in diffusers.

    Args:
        modules: The changes.
        family: The family of the base model.
        in_parts: Whether parts that cannot be joined get names of their own, those that OneTrainer gives to the layers
            of diffusers' model (`lora_transformer_...`).

    Returns:
        The changes by name.

    Raises:
        AdapterError: A part of a fused layer has no change and its size is unknown, or the parts cannot be joined.
    """
    named: dict[str, Change] = {}
    apart: set[str] = set()
    for module, change in modules.items():
        name, layer = family.kohya_name(module), _fused(family.component(module.component), module.path)
        if name in named:
            continue
        if layer is None:
            named[name] = change
            continue
        joined = None if name in apart else _joined(module, layer, modules, in_parts)
        if joined is not None:
            named[name] = cast(Change, joined)
            continue
        apart.add(name)
        named[f"lora_{module.component}_{module.path.replace('.', '_')}"] = change
    return named


def _joined(module: ModuleName, layer: Fused, modules: Mapping[ModuleName, Delta], may_fail: bool) -> Delta | None:
    """The change of a fused layer; None if that cannot be written and `may_fail` is set."""
    try:
        joined = _whole(module, layer, modules)
    except AdapterError:
        if may_fail:
            return None
        raise
    return None if may_fail and isinstance(joined, Rows) else joined


def _fused(part: Component | None, path: str) -> Fused | None:
    """The layer of the original code that a path is of, where kohya's files have that."""
    if part is None or not part.kohya_original or not isinstance(part.layout, Transformer):
        return None
    layer = part.layout.originals.get(part.layout.original_name(path))
    return None if layer is None or (len(layer.paths) == 1 and not layer.swapped) else layer


def _whole(module: ModuleName, layer: Fused, modules: Mapping[ModuleName, Delta]) -> Delta:
    parts = [modules.get(module._replace(path=path)) for path in layer.paths]
    if len(parts) > 1:
        try:
            return whole(parts, _rows(layer, parts))
        except AdapterError as error:
            raise AdapterError(f"{module}: {error}") from None
    (part,) = parts
    assert part is not None
    rows, width = _size(part)
    return halves_swapped(part, rows) if rows == 2 * width else part


def _size(change: Delta) -> tuple[int, int]:
    if change.out_in is None:
        raise AdapterError(f"{with_article(change.kind)} of a fused layer cannot be written: its size is not known")
    return change.out_in


def _rows(layer: Fused, parts: Sequence[Delta | None]) -> list[int]:
    """How many rows each part has; of parts that are missing, as many as the others tell."""
    width = next(_size(part)[1] for part in parts if part is not None)
    others = [_size(part)[0] for part in parts[layer.square :] if part is not None]
    rest = others[0] if others else layer.others * width
    sizes = [width] * layer.square + [rest] * (len(parts) - layer.square)
    if 0 in sizes:
        missing = next(path for path, part in zip(layer.paths, parts, strict=True) if part is None)
        raise AdapterError(
            f"kohya's format has it in one with {missing}, which the adapter leaves alone: its size is not known; "
            "take the format diffusers"
        )
    actual = [size if part is None else _size(part)[0] for size, part in zip(sizes, parts, strict=True)]
    if actual != sizes:
        raise AdapterError(f"parts of {actual} rows are not those of one layer, which are {sizes}")
    return sizes
