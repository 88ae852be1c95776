"""The names and changes that files in kohya's format have, where the original code fuses layers."""

from collections.abc import Mapping, Sequence

from lora_adapters.convert.deltas.low_rank import LowRank
from lora_adapters.convert.deltas.rows import halves_swapped, joined
from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.family import Component, ModelFamily
from lora_adapters.convert.families.names import ModuleName
from lora_adapters.convert.families.transformer import Fused, Transformer


def named_pairs(modules: Mapping[ModuleName, LowRank], family: ModelFamily) -> dict[str, LowRank]:
    """The pairs by kohya's names: one for each layer of the original code, of all layers that it is in diffusers.

    Raises:
        AdapterError: a part of a fused layer is missing whose size nothing tells.
    """
    named: dict[str, LowRank] = {}
    for module, pair in modules.items():
        name, part = family.kohya_name(module), family.component(module.component)
        if name in named:
            continue
        layer = _fused(part, module.path)
        named[name] = pair if layer is None else _whole(module, layer, modules)
    return named


def _fused(part: Component | None, path: str) -> Fused | None:
    """The layer of the original code that a path is of, where kohya's files have that."""
    if part is None or not part.kohya_original or not isinstance(part.layout, Transformer):
        return None
    layer = part.layout.originals.get(part.layout.original_name(path))
    return None if layer is None or (len(layer.paths) == 1 and not layer.swapped) else layer


def _whole(module: ModuleName, layer: Fused, modules: Mapping[ModuleName, LowRank]) -> LowRank:
    parts = [modules.get(module._replace(path=path)) for path in layer.paths]
    if len(parts) > 1:
        try:
            return joined(parts, _rows(layer, parts))
        except AdapterError as error:
            raise AdapterError(f"{module}: {error}") from None
    (pair,) = parts
    assert pair is not None
    rows, width = pair.out_in
    swapped = halves_swapped(pair, rows) if rows == 2 * width else pair
    assert isinstance(swapped, LowRank)
    return swapped


def _rows(layer: Fused, parts: Sequence[LowRank | None]) -> list[int]:
    """How many rows each part has; of parts that are missing, as many as the others tell."""
    width = next(part.out_in[1] for part in parts if part is not None)
    others = [part.out_in[0] for part in parts[layer.square :] if part is not None]
    rest = others[0] if others else layer.others * width
    sizes = [width] * layer.square + [rest] * (len(parts) - layer.square)
    if 0 in sizes:
        missing = next(path for path, part in zip(layer.paths, parts, strict=True) if part is None)
        raise AdapterError(
            f"kohya's format has it in one with {missing}, which the adapter leaves alone: its size is not known; "
            "take the format diffusers"
        )
    found = [size if part is None else part.out_in[0] for size, part in zip(sizes, parts, strict=True)]
    if found != sizes:
        raise AdapterError(f"parts of {found} rows are not those of one layer, which are {sizes}")
    return sizes
