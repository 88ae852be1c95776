"""A table of what is trained in each block: modules, ranks, alphas and learning rates. Names as in `info`."""

import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from lora_adapters.convert.deltas.base import alpha_in
from lora_adapters.convert.families.names import ModuleName
from lora_adapters.convert.families.registry import by_name
from lora_adapters.train.models.family import is_text_encoder
from lora_adapters.train.training import adapters
from lora_adapters.train.training.setup import Run
from lora_adapters.types.registry import delta_of, parts_of


@dataclass
class Block:
    """A row of the table: a text encoder or a block of the denoiser. `place` is its position in the table."""

    place: int = sys.maxsize

    modules: int = 0
    parameters: int = 0
    ranks: set[int] = field(default_factory=set)
    alphas: set[float] = field(default_factory=set)
    rates: set[str] = field(default_factory=set)

    def cells(self, name: str) -> tuple[str, ...]:
        """A row of the table."""
        return (
            name, str(self.modules), f"{self.parameters:,}", _range(self.ranks), _range(self.alphas),
            " and ".join(sorted(self.rates)),
        )  # fmt: skip


def blocks(run: Run) -> dict[str, Block]:
    """Name -> Block: text encoders first, then the denoiser from its input to its output."""
    rates = {id(p): _rate(group) for group in run.optimizer.param_groups for p in group["params"]}
    by_label: dict[str, Block] = defaultdict(Block)
    for name, layer in adapters.lora_layers(run.trained).items():
        block = by_label[by_name(run.models.family.name).block_label(name)]
        own = [weight for _, part in parts_of(layer, adapters.ADAPTER) for weight in part.parameters()]
        change = delta_of(layer, adapters.ADAPTER)
        alpha = alpha_in(change)
        block.place = min(block.place, _place(run, name))  # SDXL's MID consists of three blocks
        block.modules += 1
        block.parameters += sum(weight.numel() for weight in own)
        if change.rank is not None:
            block.ranks.add(change.rank)
        if alpha is not None:
            block.alphas.add(round(alpha, 6))
        block.rates |= {
            rates.get(id(weight), "not trained") if weight.requires_grad else "not trained" for weight in own
        }
    return dict(sorted(by_label.items(), key=lambda entry: entry[1].place))


def table(run: Run) -> list[str]:
    """The blocks as lines of a table."""
    rows: list[tuple[str, ...]] = [("block", "modules", "parameters", "rank", "alpha", "rate")]
    rows += [block.cells(name) for name, block in blocks(run).items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(_padded, range(len(row)), row, widths)).rstrip() for row in rows]


def _padded(column: int, cell: str, width: int) -> str:
    """Pad a cell to the width of its column; counts are right-aligned."""
    return cell.rjust(width) if column in (1, 2) else cell.ljust(width)


def _place(run: Run, name: ModuleName) -> int:
    if is_text_encoder(name.component):
        return -1
    block = run.models.family.block(name.path)
    return sys.maxsize if block is None else block


def _rate(group: dict[str, Any]) -> str:
    return "the optimizer's own" if group.get("lr") is None else f"{group['lr']:g}"


def _range(values: Iterable[float]) -> str:
    ordered = sorted(values)
    if not ordered:  # kinds of delta without a rank or alpha
        return "-"
    return f"{ordered[0]:g}" if len(ordered) == 1 else f"{ordered[0]:g} to {ordered[-1]:g}"
