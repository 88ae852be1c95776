"""Names and changes of modules in kohya's format, which fuses some layers as the original code does."""

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
        in_parts: Write parts that cannot be joined separately, under OneTrainer's names of diffusers' layers
            (`lora_transformer_...`).

    Returns:
        The changes by name.

    Raises:
        AdapterError: An unchanged part of a fused layer has an unknown size, or the parts cannot be joined.
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
    """The change of a fused layer; None if `may_fail` is set and the change cannot be joined and written."""
    try:
        joined = _whole(module, layer, modules)
    except AdapterError:
        if may_fail:
            return None
        raise
    return None if may_fail and isinstance(joined, Rows) else joined


def _fused(part: Component | None, path: str) -> Fused | None:
    """The original code's fused (or swapped) layer that contains a path, if kohya's files use its name."""
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
        raise AdapterError(f"cannot write {with_article(change.kind)} of a fused layer: its size is unknown")
    return change.out_in


def _rows(layer: Fused, parts: Sequence[Delta | None]) -> list[int]:
    """The number of rows of each part; those of missing parts are derived from the others."""
    width = next(_size(part)[1] for part in parts if part is not None)
    others = [_size(part)[0] for part in parts[layer.square :] if part is not None]
    rest = others[0] if others else layer.others * width
    sizes = [width] * layer.square + [rest] * (len(parts) - layer.square)
    if 0 in sizes:
        missing = next(path for path, part in zip(layer.paths, parts, strict=True) if part is None)
        raise AdapterError(
            f"kohya's format fuses this layer with {missing}, which the adapter does not change and whose size is "
            "unknown: use the format diffusers"
        )
    actual = [size if part is None else _size(part)[0] for size, part in zip(sizes, parts, strict=True)]
    if actual != sizes:
        raise AdapterError(f"the parts of a fused layer have {actual} rows, expected {sizes}")
    return sizes
