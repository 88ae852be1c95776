"""The blocks of a U-Net as kohya's options count them, and their labels in lists of block weights."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

BASE = "BASE"  # the label of the text encoders
LAYER = re.compile(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


@dataclass(frozen=True, eq=False, repr=False)
class Blocks:
    """Blocks from the input to the output.

    sides: how many there are on the way down, in the middle and on the way up. outer: those before and behind them,
    which no adapter changes. with_attention: labels of those that have attention. presets: names of lists of blocks.
    Source: kohya's block_dims and block_lr_weight; the labels are those of the extension sd-webui-lora-block-weight.
    """

    sides: tuple[int, int, int]
    with_attention: tuple[str, ...]
    outer: int = 0
    presets: Mapping[str, str] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many numbers a list for all blocks has."""
        return sum(self.sides) + 2 * self.outer

    @cached_property
    def labels(self) -> tuple[str | None, ...]:
        """The label of each block: IN00, ..., MID, OUT00, ...; None for the outer ones."""
        down, middle, up = self.sides
        inner = [f"IN{n:02d}" for n in range(down)] + ["MID"] * middle + [f"OUT{n:02d}" for n in range(up)]
        outer: list[str | None] = [None] * self.outer
        return (*outer, *inner, *outer)

    @cached_property
    def weight_lists(self) -> tuple[tuple[str, ...], ...]:
        """The labels that lists of block weights are for: one of all blocks, one of those with attention."""
        every = dict.fromkeys(label for label in self.labels if label is not None)
        return (BASE, *every), (BASE, *self.with_attention)

    def index(self, path: str) -> int | None:
        """The index of the block of a U-Net module; None outside of the blocks."""
        match = LAYER.fullmatch(path)
        if match is None:
            return None
        half, block, kind, layer, _ = match.groups()
        down, middle, _ = self.sides
        if half == "mid":  # ResNet, attention, ResNet: three blocks, or one
            return self.outer + down + (0 if middle == 1 else 2 * int(layer) if kind == "resnets" else 1)
        place = 3 * int(block) + (2 if kind in ("downsamplers", "upsamplers") else int(layer))
        return self.outer + (down + middle + place if half == "up" else 1 + place)  # the first one is conv_in's

    def label(self, path: str) -> str | None:
        """The label of the block of a U-Net module; None outside of the blocks."""
        index = self.index(path)
        return None if index is None else self.labels[index]
