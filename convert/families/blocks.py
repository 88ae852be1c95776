"""The blocks of a U-Net or a transformer as options count them, and their labels in lists of block weights."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

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


class Run(Protocol):
    """Blocks of one kind, one after the other; see `transformer.Stack`."""

    @property
    def original(self) -> str: ...

    @property
    def path(self) -> str: ...

    @property
    def depth(self) -> int: ...

    @property
    def letter(self) -> str: ...


@dataclass(frozen=True, eq=False, repr=False)
class StackBlocks:
    """The blocks of a transformer, stack by stack.

    stacks: of the largest model. lists: the labels of lists of numbers other than the one of all blocks. texts: the
    labels of text encoders that have one of their own. behind: the beginnings of paths behind the blocks.
    Source of Flux.1's labels and list: the extension sd-webui-lora-block-weight.
    """

    stacks: tuple[Run, ...]
    lists: tuple[tuple[str, ...], ...] = ()
    texts: Mapping[str, str] = field(default_factory=dict)
    behind: tuple[str, ...] = ("norm_out.", "proj_out", "all_final_layer.")
    presets: Mapping[str, str] = field(default_factory=dict)

    @property
    def sides(self) -> tuple[int, ...]:
        """How many blocks each stack has."""
        return tuple(stack.depth for stack in self.stacks)

    @property
    def outer(self) -> int:
        """0: no list counts what is outside of the blocks."""
        return 0

    @property
    def count(self) -> int:
        """How many numbers a list for all blocks has."""
        return sum(self.sides)

    @cached_property
    def labels(self) -> tuple[str | None, ...]:
        """The label of each block: D00, ..., S00, ..."""
        return tuple(f"{stack.letter}{number:02d}" for stack in self.stacks for number in range(stack.depth))

    @cached_property
    def weight_lists(self) -> tuple[tuple[str, ...], ...]:
        """The labels that lists of block weights are for."""
        return (BASE, *(label for label in self.labels if label is not None)), *self.lists

    @cached_property
    def order(self) -> tuple[str, ...]:
        """All labels, from the text encoders to what is behind the blocks."""
        return BASE, *self.texts.values(), "IN", *self.weight_lists[0][1:], "OUT"

    def index(self, path: str) -> int | None:
        """The index of the block of a module; None outside of the blocks that the largest model has."""
        before = 0
        for stack in self.stacks:
            number = _number(stack, path)
            if number is not None:
                return before + number if number < stack.depth else None
            before += stack.depth
        return None

    def label(self, path: str) -> str:
        """The label of the block of a module; IN and OUT before and behind the blocks."""
        for stack in self.stacks:
            number = _number(stack, path)
            if number is not None:
                return f"{stack.letter}{number:02d}"
        return "OUT" if path.startswith(self.behind) else "IN"

    def named(self, name: str) -> str | None:
        """The label of a block by its name in the original code or in diffusers (double_blocks.3); None for another."""
        head, _, number = name.rpartition(".")
        stack = next((stack for stack in self.stacks if head in (stack.original, stack.path)), None)
        return None if stack is None or not number.isdecimal() else f"{stack.letter}{int(number):02d}"


def _number(stack: Run, path: str) -> int | None:
    """The number of a module's block in the stack."""
    head, _, rest = path.partition(".")
    return int(rest.partition(".")[0]) if head == stack.path else None
