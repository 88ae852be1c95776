"""Block weights ("lbw"): one factor for the text encoders (BASE) and one for each block of the U-Net.

Written as numbers, as kohya's scripts and the sd-webui-lora-block-weight extension of A1111 take them, as one of the
extension's presets (MIDD), or as names of blocks (IN02, IN04-OUT05, NOT MID).
"""

import re
from collections.abc import Sequence
from typing import TypeVar

from lora_adapters.convert.adapter import Adapter
from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.names import ModuleName
from lora_adapters.convert.families.registry import FAMILIES, by_name
from lora_adapters.convert.parsing import json_value, number

AnAdapter = TypeVar("AnAdapter", bound=Adapter)
BLOCKS = FAMILIES[0].blocks.weight_lists[0]  # names of blocks are those of the family that has the most
_LISTS = {len(blocks): (family, blocks) for family in FAMILIES for blocks in family.blocks.weight_lists}
_PRESETS = {name: blocks for family in FAMILIES for name, blocks in family.blocks.presets.items()}
_EVERYWHERE = {"NONE": 0.0, "ALL": 1.0, "ALL0.5": 0.5}


class BlockWeights(dict[str, float]):
    """The factor of each block by its name. `rest` is that of all others, `architecture` what the list is for."""

    def __init__(self, factors: dict[str, float], rest: float = 1.0, architecture: str | None = None) -> None:
        super().__init__(factors)
        self.rest, self.architecture = rest, architecture


def block_name(module: ModuleName, architecture: str) -> str:
    """The label of a module's block in a family of that name; see `ModelFamily.block_label`."""
    return by_name(architecture).block_label(module)


def parse(text: str, rest: float = 1.0) -> BlockWeights:
    """Block weights from numbers, a preset or names of blocks.

    Args:
        text: 12, 17, 20 or 26 numbers, a JSON list or with commas between them; a preset of the extension's; or blocks
            that keep the whole strength, all others losing it: "IN02", "IN04-OUT05", "BASE MID"; "NOT IN02" and "NIN02"
            mean all blocks but these.
        rest: the factor of blocks that a list of numbers has no place for (kohya's scripts: 1, the extension: 0).

    Raises:
        AdapterError: it is none of these.
    """
    named = _named(text.strip())
    if named is not None:
        return named
    try:
        values = json_value(text if text.lstrip().startswith("[") else f"[{text}]")
        numbers = [number(value) for value in values]
    except (ValueError, TypeError):
        raise AdapterError(
            "block weights are a list of numbers such as [1,0.5,...], a preset "
            f"({', '.join([*_EVERYWHERE, *_PRESETS])}) or names of blocks such as IN02, not {text[:60]}"
        ) from None
    return listed(numbers, rest)


def listed(numbers: Sequence[float], rest: float = 1.0) -> BlockWeights:
    """Block weights from 12, 17, 20 or 26 numbers; see `parse`."""
    if len(numbers) not in _LISTS:
        raise AdapterError(f"{len(numbers)} block weights: {_right_lengths()}")
    family, blocks = _LISTS[len(numbers)]
    return BlockWeights(dict(zip(blocks, numbers, strict=True)), rest, family.name)


def _right_lengths() -> str:
    """How many numbers are right for which models."""
    lengths = {family: " or ".join(map(str, sorted(map(len, family.blocks.weight_lists)))) for family in FAMILIES}
    first, *others = [(text, "/".join(family.titles)) for family, text in lengths.items()]
    return ", ".join([f"{first[0]} are right for {first[1]}", *(f"{text} for {title}" for text, title in others)])


def _named(text: str) -> BlockWeights | None:
    if text in _EVERYWHERE:
        return BlockWeights({}, _EVERYWHERE[text])
    inverted = re.fullmatch(r"NOT\s+(.+)|N(?=BASE|IN|M|OUT)(\S+)", text)
    names = _PRESETS.get(text) or (text if inverted is None else inverted[1] or inverted[2])
    if not re.fullmatch(r"[A-Z0-9]+([\s-]+[A-Z0-9]+)*", names) or not any(letter.isalpha() for letter in names):
        return None
    chosen: list[str] = []
    for part in names.split():
        first, _, last = part.partition("-")
        ends = [_block(first), _block(last or first)]
        chosen += BLOCKS[min(ends) : max(ends) + 1]
    inside, outside = (1.0, 0.0) if inverted is None else (0.0, 1.0)
    return BlockWeights(dict.fromkeys(chosen, inside), outside)


def _block(name: str) -> int:
    """Where a block is among BLOCKS, by its name in any spelling (IN02, IN2, MID, M00)."""
    match = re.fullmatch(r"(IN|OUT)(\d{1,2})", name)
    full = f"{match[1]}{int(match[2]):02d}" if match else "MID" if name in ("M00", "MID00") else name
    if full not in BLOCKS:
        raise AdapterError(
            f"block weights: {name:.40} is not a block or preset: there are BASE, IN00 to IN11, MID, OUT00 to OUT11, "
            f"{', '.join([*_EVERYWHERE, *_PRESETS])}"
        )
    return BLOCKS.index(full)


def weighted(adapter: AnAdapter, weights: BlockWeights | Sequence[float]) -> AnAdapter:
    """The adapter with each module scaled by the weight of its block, the text encoders' by that of BASE.

    weights: of `parse`, or 12, 17, 20 or 26 numbers as there. AdapterError where they are for another architecture.
    """
    given = weights if isinstance(weights, BlockWeights) else listed(weights)
    if given.architecture not in (None, adapter.architecture):
        count = next(count for count, (_, blocks) in _LISTS.items() if tuple(given) == blocks)
        raise AdapterError(f"{count} block weights are for {given.architecture}, the adapter is {adapter.architecture}")

    family = by_name(adapter.architecture)

    def factor(module: ModuleName) -> float:
        return given.get(family.weight_label(module), given.rest)

    factors = {module: factor(module) for module in adapter.modules}
    return adapter.with_modules(
        {
            module: one.scaled(factors[module])
            for module, one in adapter.modules.items()
            if factors[module] or not one.needs_base  # a DoRA's change at 0 is what its magnitude does not scale
        }
    )
