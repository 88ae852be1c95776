"""Learning-rate weights of the U-Net's blocks: 25 in SD1.x and SD2.x, 23 in SDXL."""

import math
import re
import warnings
from collections.abc import Callable, Sequence

from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.registry import by_name
from lora_adapters.convert.parsing import number

PRESETS: dict[str, Callable[[float], float]] = {
    "sine": lambda t: math.sin(math.pi * t / 2),
    "cosine": lambda t: math.cos(math.pi * t / 2),
    "linear": lambda t: t,
    "reverse_linear": lambda t: 1 - t,
    "zeros": lambda t: 0.0,
}
_PRESET = re.compile(rf"({'|'.join(PRESETS)})(?:\+(\d*\.?\d+))?")

Weights = str | float | Sequence[float] | None


def _preset(text: str, count: int) -> list[float] | None:
    """The values of `<preset>` or `<preset>+<number>`, from the first block to the last; None for any other text."""
    match = _PRESET.fullmatch(text)
    if match is None:
        return None
    name, added = match.groups()
    return [PRESETS[name](i / (count - 1) if count > 1 else 0.0) + float(added or 0) for i in range(count)]


def _numbers(name: str, text: str) -> list[float]:
    try:
        return [number(item) if item.strip() else 0.0 for item in text.split(",")]
    except ValueError:
        raise AdapterError(
            f"{name} is {text!r}: give numbers with commas between them, or one of {', '.join(PRESETS)}, "
            "optionally followed by +number to add to all"
        ) from None


def _side(name: str, weights: Weights, count: int) -> list[float]:
    """`count` weights: a single number is used for all, a short list is padded with 1.0, a long one is truncated."""
    if weights is None:
        return [1.0] * count
    if isinstance(weights, str):
        text = weights.strip()
        preset = _preset(text, count)
        weights = preset if preset is not None else _numbers(name, text)
        if preset is None and len(weights) == 1:
            weights = weights[0]
    if isinstance(weights, (int, float)):
        return [float(weights)] * count
    values = [float(value) for value in weights]
    if len(values) > count:
        warnings.warn(f"{name} has {len(values)} values: only the first {count} are used", stacklevel=3)
    return (values + [1.0] * count)[:count]


def block_lr_weights(
    architecture: str = "sd",
    down: Weights = None,
    mid: Weights = None,
    up: Weights = None,
    zero_threshold: float = 0.0,
) -> list[float]:
    """One learning-rate weight for each block of the U-Net, in the format of kohya's network_args.

    Each side is a list, one number for the whole side, text such as "1,0.5,,1" (an empty item is 0), or a preset:
    "sine", "cosine", "linear", "reverse_linear" or "zeros", optionally followed by "+0.2" to add to all.

    Args:
        architecture: The family of the base model, "sd" (SD1.x and SD2.x, 25 blocks) or "sdxl" (23 blocks).
        down: Weights of the 12 down blocks (SDXL: 9), beginning at the input.
        mid: Weight of the middle block (SDXL: 3 weights).
        up: Weights of the 12 up blocks (SDXL: 9), beginning after the middle.
        zero_threshold: Weights up to this value become 0; such blocks get no modules (see `without_zero_blocks`).

    Returns:
        The weights, in the order of the blocks.

    Raises:
        AdapterError: A text is not a list of numbers or a preset.

    >>> block_lr_weights(down="linear", mid=0.5, up=[1, 0])[10:16]
    [0.9090909090909091, 1.0, 0.5, 1.0, 0.0, 1.0]
    """
    blocks = by_name(architecture).blocks
    sides = [
        _side(name, side, count)
        for name, side, count in zip(
            ("down_lr_weight", "mid_lr_weight", "up_lr_weight"), (down, mid, up), blocks.sides, strict=True
        )
    ]
    weights = [weight if weight > zero_threshold else 0.0 for values in sides for weight in values]
    outer = [1.0] * blocks.outer
    return [*outer, *weights, *outer]


def without_zero_blocks(ranks: Sequence[int], weights: Sequence[float]) -> list[int]:
    """The ranks, with 0 (no module) for blocks whose learning-rate weight is 0."""
    return [rank if weight else 0 for rank, weight in zip(ranks, weights, strict=True)]
