"""Block weights ("lbw"): one factor for the text encoders (BASE) and one for each block of the U-Net.

Written as numbers, as kohya's scripts and the sd-webui-lora-block-weight extension of A1111 take them, as one of the
extension's presets (MIDD), or as names of blocks (IN02, IN04-OUT05, NOT MID).
"""

import re
from collections.abc import Sequence
from typing import TypeVar

from lora_adapters.convert.adapter import Adapter
from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.names import ModuleName, block_index
from lora_adapters.convert.parsing import json_value, number

AnAdapter = TypeVar("AnAdapter", bound=Adapter)
BLOCKS = ("BASE", *(f"IN{n:02d}" for n in range(12)), "MID", *(f"OUT{n:02d}" for n in range(12)))
_SDXL = ("BASE", *(f"IN{n:02d}" for n in range(9)), "MID", *(f"OUT{n:02d}" for n in range(9)))
_ATTENTION = ("BASE", "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "MID", *(f"OUT{n:02d}" for n in range(3, 12)))
_ATTENTION_SDXL = ("BASE", "IN04", "IN05", "IN07", "IN08", "MID", *(f"OUT{n:02d}" for n in range(6)))
_LISTS = {26: ("sd", BLOCKS), 17: ("sd", _ATTENTION), 20: ("sdxl", _SDXL), 12: ("sdxl", _ATTENTION_SDXL)}
_PRESETS = {  # the blocks at 1; those that are not named here are at 0. Source: the extension's DEF_WEIGHT_PRESET
    "INS": "BASE IN01 IN02 IN04",
    "IND": "BASE IN05 IN07 IN08",
    "INALL": "BASE IN01-IN08",
    "MIDD": "BASE IN05-OUT06",
    "OUTD": "BASE OUT03-OUT06",
    "OUTS": "BASE OUT07-OUT11",
    "OUTALL": "BASE OUT03-OUT11",
}
_EVERYWHERE = {"NONE": 0.0, "ALL": 1.0, "ALL0.5": 0.5}


class BlockWeights(dict[str, float]):
    """The factor of each block by its name. `rest` is that of all others, `architecture` what the list is for."""

    def __init__(self, factors: dict[str, float], rest: float = 1.0, architecture: str | None = None) -> None:
        super().__init__(factors)
        self.rest, self.architecture = rest, architecture


def block_name(module: ModuleName, architecture: str) -> str:
    """The name of a module's block: its component, or IN, MID or OUT with its number in the U-Net ("sd", "sdxl").

    "unet" for a module of the U-Net outside of the blocks.
    """
    if module.component != "unet":
        return module.component
    index = block_index(module.path, architecture)
    if index is None:
        return "unet"
    first, middle = (0, (12,)) if architecture == "sd" else (1, (10, 11, 12))
    if index in middle:
        return "MID"
    return f"IN{index - first:02d}" if index < middle[0] else f"OUT{index - 13:02d}"


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
        raise AdapterError(f"{len(numbers)} block weights: 17 or 26 are right for SD1.x/SD2.x, 12 or 20 for SDXL")
    architecture, blocks = _LISTS[len(numbers)]
    return BlockWeights(dict(zip(blocks, numbers, strict=True)), rest, architecture)


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
            f"block weights: {name:.40} is no block or preset: there are BASE, IN00 to IN11, MID, OUT00 to OUT11, "
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

    def factor(module: ModuleName) -> float:
        name = "BASE" if module.component != "unet" else block_name(module, adapter.architecture)
        return given.get(name, given.rest)

    return adapter.with_modules({module: one.scaled(factor(module)) for module, one in adapter.modules.items()})
