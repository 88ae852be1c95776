"""The blocks of a U-Net or a transformer: their order in options, and their labels in lists of block weights."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

BASE = "BASE"  # the label of the text encoders
LAYER = re.compile(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


@dataclass(frozen=True, eq=False, repr=False)
class Blocks:
    """The blocks of a U-Net, from the input to the output.

    The order is that of kohya's block_dims and block_lr_weight; the labels are those of the extension
    sd-webui-lora-block-weight.

    Attributes:
        sides: The numbers of down, middle and up blocks.
        with_attention: The labels of the blocks with attention.
        outer: The number of extra blocks at each end, which no adapter changes.
        presets: Lists of blocks by the names of the extension's presets.
    """

    sides: tuple[int, int, int]
    with_attention: tuple[str, ...]
    outer: int = 0
    presets: Mapping[str, str] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """The length of a list of numbers for all blocks."""
        return sum(self.sides) + 2 * self.outer

    @cached_property
    def labels(self) -> tuple[str | None, ...]:
        """The label of each block: IN00, ..., MID, OUT00, ...; None for the outer blocks."""
        down, middle, up = self.sides
        inner = [f"IN{n:02d}" for n in range(down)] + ["MID"] * middle + [f"OUT{n:02d}" for n in range(up)]
        outer: list[str | None] = [None] * self.outer
        return (*outer, *inner, *outer)

    @cached_property
    def weight_lists(self) -> tuple[tuple[str, ...], ...]:
        """The labels for the lists of block weights: one list of all blocks, one of the blocks with attention."""
        every = dict.fromkeys(label for label in self.labels if label is not None)
        return (BASE, *every), (BASE, *self.with_attention)

    def index(self, path: str) -> int | None:
        """The index of the block that contains a U-Net module; None outside of the blocks."""
        match = LAYER.fullmatch(path)
        if match is None:
            return None
        half, block, kind, layer, _ = match.groups()
        down, middle, _ = self.sides
        if half == "mid":  # ResNet, attention, ResNet: counted as three blocks or as one
            return self.outer + down + (0 if middle == 1 else 2 * int(layer) if kind == "resnets" else 1)
        place = 3 * int(block) + (2 if kind in ("downsamplers", "upsamplers") else int(layer))
        return self.outer + (down + middle + place if half == "up" else 1 + place)  # the first down block is conv_in

    def label(self, path: str) -> str | None:
        """The label of the block that contains a U-Net module; None outside of the blocks."""
        index = self.index(path)
        return None if index is None else self.labels[index]


class Run(Protocol):
    """A stack of blocks of the same kind; see `transformer.Stack`."""

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

    Flux.1's labels and list are those of the extension sd-webui-lora-block-weight.

    Attributes:
        stacks: The stacks of the largest model.
        lists: The labels for further lists of numbers, besides the list of all blocks.
        texts: The labels of text encoders with a weight of their own, by component.
        behind: The prefixes of paths of layers after the blocks.
        presets: Lists of blocks by the names of presets.
    """

    stacks: tuple[Run, ...]
    lists: tuple[tuple[str, ...], ...] = ()
    texts: Mapping[str, str] = field(default_factory=dict)
    behind: tuple[str, ...] = ("norm_out.", "proj_out", "all_final_layer.")
    presets: Mapping[str, str] = field(default_factory=dict)

    @property
    def sides(self) -> tuple[int, ...]:
        """The number of blocks of each stack."""
        return tuple(stack.depth for stack in self.stacks)

    @property
    def outer(self) -> int:
        """0: there are no extra blocks at the ends."""
        return 0

    @property
    def count(self) -> int:
        """The length of a list of numbers for all blocks."""
        return sum(self.sides)

    @cached_property
    def labels(self) -> tuple[str | None, ...]:
        """The label of each block: D00, ..., S00, ..."""
        return tuple(f"{stack.letter}{number:02d}" for stack in self.stacks for number in range(stack.depth))

    @cached_property
    def weight_lists(self) -> tuple[tuple[str, ...], ...]:
        """The labels for the lists of block weights."""
        return (BASE, *(label for label in self.labels if label is not None)), *self.lists

    @cached_property
    def order(self) -> tuple[str, ...]:
        """All labels in order, from the text encoders to the layers after the blocks."""
        return BASE, *self.texts.values(), "IN", *self.weight_lists[0][1:], "OUT"

    def index(self, path: str) -> int | None:
        """The index of the block that contains a module; None outside of the blocks of the largest model."""
        before = 0
        for stack in self.stacks:
            number = _number(stack, path)
            if number is not None:
                return before + number if number < stack.depth else None
            before += stack.depth
        return None

    def label(self, path: str) -> str:
        """The label of the block that contains a module; IN and OUT for layers before and after the blocks."""
        for stack in self.stacks:
            number = _number(stack, path)
            if number is not None:
                return f"{stack.letter}{number:02d}"
        return "OUT" if path.startswith(self.behind) else "IN"

    def named(self, name: str) -> str | None:
        """The label of a block from its name in the original code or in diffusers (double_blocks.3), or None."""
        head, _, number = name.rpartition(".")
        stack = next((stack for stack in self.stacks if head in (stack.original, stack.path)), None)
        return None if stack is None or not number.isdecimal() else f"{stack.letter}{int(number):02d}"


def _number(stack: Run, path: str) -> int | None:
    """The number of the block that contains a module; None if it is not in this stack."""
    head, _, rest = path.partition(".")
    return int(rest.partition(".")[0]) if head == stack.path else None
