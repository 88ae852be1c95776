"""Block weights ("lbw"): one factor for the text encoders (BASE) and one for each block of the denoiser.

They can be given as numbers, as in kohya's scripts and A1111's extension sd-webui-lora-block-weight, as one of the
extension's presets (MIDD), or as names of blocks (IN02, IN04-OUT05, NOT MID).
"""

import re
from collections.abc import Sequence
from typing import TypeVar

from lora_adapters.convert.adapter import Adapter
from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.blocks import BASE, StackBlocks
from lora_adapters.convert.families.family import ModelFamily
from lora_adapters.convert.families.names import ModuleName
from lora_adapters.convert.families.registry import FAMILIES, by_name
from lora_adapters.convert.parsing import json_value, number

AnAdapter = TypeVar("AnAdapter", bound=Adapter)
BLOCKS = FAMILIES[0].blocks.weight_lists[0]  # the block names of the U-Net with the most blocks
_ORDERS = (BLOCKS, *(family.blocks.order for family in FAMILIES if isinstance(family.blocks, StackBlocks)))
_LISTS = {
    len(blocks): (family, blocks) for family in reversed(FAMILIES) for blocks in reversed(family.blocks.weight_lists)
}
_PRESETS = {name: blocks for family in FAMILIES for name, blocks in family.blocks.presets.items()}
_EVERYWHERE = {"NONE": 0.0, "ALL": 1.0, "ALL0.5": 0.5, "FLUXALL": 1.0}
_NAME = r"(?:[A-Z0-9]+|[a-z_]+\.\d+)"  # IN02, D07, double_blocks.7


class BlockWeights(dict[str, float]):
    """The factor of each block, by block name.

    `rest` is the factor of all other blocks. `architecture` is set for a list of numbers: the first family with lists
    of that length.
    """

    def __init__(self, factors: dict[str, float], rest: float = 1.0, architecture: str | None = None) -> None:
        super().__init__(factors)
        self.rest, self.architecture = rest, architecture

    def of(self, family: ModelFamily) -> "BlockWeights":
        """The weights by block names of a family; AdapterError if they are for another family."""
        if self.architecture is None:
            known = {BASE, *(label for order in family.blocks.weight_lists for label in order), *_order(family)}
            if self and not known & self.keys():
                raise AdapterError(f"{'/'.join(family.titles)} has no block {next(iter(self))}")
            return self
        lists = [self.keys(), *(blocks for blocks in family.blocks.weight_lists if len(blocks) == len(self))]
        fitting = lists[:1] if self.architecture == family.name else lists[1:]
        if not fitting:
            raise AdapterError(f"{len(self)} block weights are for {self.architecture}, the adapter is {family.name}")
        return BlockWeights(dict(zip(fitting[0], self.values(), strict=True)), self.rest, family.name)


def _order(family: ModelFamily) -> tuple[str, ...]:
    return family.blocks.order if isinstance(family.blocks, StackBlocks) else ()


def block_name(module: ModuleName, architecture: str) -> str:
    """The label of a module's block in the family with this name; see `ModelFamily.block_label`."""
    return by_name(architecture).block_label(module)


def parse(text: str, rest: float = 1.0) -> BlockWeights:
    """Read block weights from numbers, a preset or names of blocks.

    Numbers are a JSON list or separated by commas: 12, 17, 20 or 26 of them, 61 or 58 for Flux.1, and for other
    transformers one for the text encoders and one for each block. Presets are those of the extension LoRA Block Weight.
    Names select the blocks with factor 1; all others have factor 0: "IN02", "IN04-OUT05", "BASE MID", "D00-D18",
    "double_blocks.3". "NOT IN02" and "NIN02" invert the selection.

    Args:
        text: The numbers, the preset or the names.
        rest: The factor of blocks that a list of numbers does not include (1 in kohya's scripts, 0 in the extension).

    Returns:
        The block weights.

    Raises:
        AdapterError: The text is not numbers, a preset or names of blocks.
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
    """The numbers of block weights that each model accepts, as text."""
    lengths = {family: " or ".join(map(str, sorted(map(len, family.blocks.weight_lists)))) for family in FAMILIES}
    first, *others = [(text, "/".join(family.titles)) for family, text in lengths.items()]
    return ", ".join([f"expected {first[0]} for {first[1]}", *(f"{text} for {title}" for text, title in others)])


def _named(text: str) -> BlockWeights | None:
    if text in _EVERYWHERE:
        return BlockWeights({}, _EVERYWHERE[text])
    inverted = re.fullmatch(r"NOT\s+(.+)|N(?=BASE|IN|M|OUT|[A-Z]\d)(\S+)", text)
    names = _PRESETS.get(text) or (text if inverted is None else inverted[1] or inverted[2])
    if not re.fullmatch(rf"{_NAME}([\s-]+{_NAME})*", names) or not any(letter.isalpha() for letter in names):
        return None
    chosen: list[str] = []
    for part in names.split():
        first, _, last = part.partition("-")
        chosen += _span(_block(first), _block(last or first), part)
    inside, outside = (1.0, 0.0) if inverted is None else (0.0, 1.0)
    return BlockWeights(dict.fromkeys(chosen, inside), outside)


def _span(first: str, last: str, part: str) -> tuple[str, ...]:
    """All blocks from one to another, in the first family that has both."""
    order = next((order for order in _ORDERS if first in order and last in order), None)
    if order is None:
        raise AdapterError(f"block weights: no model has both blocks of {part:.60}")
    ends = order.index(first), order.index(last)
    return order[min(ends) : max(ends) + 1]


def _block(name: str) -> str:
    """The label of a block from its name in any spelling (IN02, IN2, MID, M00, D7, double_blocks.7)."""
    match = re.fullmatch(r"([A-Z]+)(\d{1,2})", name)
    full = "MID" if name in ("M00", "MID00") else f"{match[1]}{int(match[2]):02d}" if match else name
    full = name if any(name in order for order in _ORDERS) else full  # T5
    stacks = (family.blocks for family in FAMILIES if isinstance(family.blocks, StackBlocks))
    full = next((label for blocks in stacks if (label := blocks.named(name)) is not None), full)
    if not any(full in order for order in _ORDERS):
        letters = sorted({label[0] for order in _ORDERS[1:] for label in order if label[1:].isdigit()})
        raise AdapterError(
            f"block weights: {name:.40} is not a block or preset: known are BASE, IN00 to IN11, MID, OUT00 to OUT11, "
            f"for transformers {', '.join(f'{letter}00' for letter in letters)} and so on, and the presets "
            f"{', '.join([*_EVERYWHERE, *_PRESETS])}"
        )
    return full


def weighted(adapter: AnAdapter, weights: BlockWeights | Sequence[float]) -> AnAdapter:
    """Scale each module by the weight of its block, those of text encoders by the weight of BASE.

    Args:
        adapter: The adapter.
        weights: The result of `parse`, or a list of numbers as described there.

    Returns:
        The scaled adapter.

    Raises:
        AdapterError: The weights are for another architecture.
    """
    family = by_name(adapter.architecture)
    by_label = (weights if isinstance(weights, BlockWeights) else listed(weights)).of(family)

    def factor(module: ModuleName) -> float:
        labels = [label for label in (family.weight_label(module), family.text_label(module)) if label is not None]
        return next((by_label[label] for label in labels if label in by_label), by_label.rest)

    factors = {module: factor(module) for module in adapter.modules}
    return adapter.with_modules(
        {
            module: change.scaled(factors[module])
            for module, change in adapter.modules.items()
            if factors[module] or not change.needs_base  # left out at 0, where a DoRA would still add its change
        }
    )
