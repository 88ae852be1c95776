"""Block weights ("lbw"): one factor for the text encoders (BASE) and one for each block of the U-Net."""

from collections.abc import Sequence

from .adapter import Adapter
from .errors import AdapterError
from .names import ModuleName, block_index
from .parsing import json_value, number

_FULL_SD = list(range(25))  # IN00-IN11, MID, OUT00-OUT11
_FULL_SDXL = [*range(1, 10), 10, *range(13, 22)]  # IN00-IN08, MID (three blocks), OUT00-OUT08
_BLOCKS = {
    26: ("sd", _FULL_SD),
    17: ("sd", [1, 2, 4, 5, 7, 8, 12, *range(16, 25)]),
    20: ("sdxl", _FULL_SDXL),
    12: ("sdxl", [5, 6, 8, 9, 10, *range(13, 19)]),
}
_MID_SDXL = {11: 10, 12: 10}


def parse(text: str) -> list[float]:
    """The numbers of a JSON list or of a comma-separated one, 12, 17, 20 or 26 of them."""
    try:
        values = json_value(text if text.lstrip().startswith("[") else f"[{text}]")
        numbers = [number(value) for value in values]
    except (ValueError, TypeError):
        raise AdapterError(f"block weights are a list of numbers such as [1,0.5,...], not {text[:60]}") from None
    if len(numbers) not in _BLOCKS:
        raise AdapterError(f"{len(numbers)} block weights: 17 or 26 are right for SD1.x/SD2.x, 12 or 20 for SDXL")
    return numbers


def weighted(adapter: Adapter, weights: Sequence[float]) -> Adapter:
    """The adapter with each module scaled by the weight of its block; blocks that are not listed keep 1.

    weights: BASE (all text encoders), then the blocks. 26 and 20 are all blocks of SD1.x/SD2.x and of SDXL; 17 and 12
    are those that have attention.
    """
    architecture, blocks = _BLOCKS[len(weights)]
    if architecture != adapter.architecture:
        raise AdapterError(
            f"{len(weights)} block weights are for {architecture}, the adapter is {adapter.architecture}"
        )
    table = dict(zip(blocks, weights[1:], strict=True))

    def factor(module: ModuleName) -> float:
        if module.component != "unet":
            return weights[0]
        index = block_index(module.path, architecture)
        if architecture == "sdxl" and index is not None:
            index = _MID_SDXL.get(index, index)
        return 1.0 if index is None else table.get(index, 1.0)

    return adapter.with_modules({module: one.scaled(factor(module)) for module, one in adapter.modules.items()})
