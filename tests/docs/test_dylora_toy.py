"""What one set of weights can reach at four ranks, by scale: the table of the page about DyLoRA."""

import re

import pytest
import torch

from lora_adapters.convert.deltas.low_rank import RANK_SCALINGS, LowRank

from .blocks import PAGES

RANKS, FULL = (4, 8, 12, 16), 16
TARGET = torch.diag(1 / torch.arange(1, 65)).double()
TABLE = {
    row[0]: [float(value) for value in row[1:]]
    for row in re.findall(
        r"^\| (.+?) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$",
        (PAGES / "dylora.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
}


def change(up, down, rank, scaling):
    """ΔW at a rank, by the very scale that cutting an adapter gives."""
    cut = LowRank(torch.ones(FULL, 1), torch.ones(1, FULL), float(FULL)).truncated(rank, scaling)
    return cut.scale * up[:, :rank] @ down[:rank]


@pytest.mark.parametrize("scaling", RANK_SCALINGS)
def test_reached_errors(scaling):
    generator = torch.Generator().manual_seed(0)
    up, down = (0.1 * torch.randn(shape, generator=generator, dtype=torch.double) for shape in ((64, FULL), (FULL, 64)))
    up.requires_grad_()
    down.requires_grad_()
    optimizer = torch.optim.LBFGS([up, down], max_iter=300, history_size=20, line_search_fn="strong_wolfe")

    def squared_errors():
        return torch.stack([(change(up, down, rank, scaling) - TARGET).square().sum() for rank in RANKS])

    def closure():
        optimizer.zero_grad()
        total = squared_errors().sum()
        total.backward()
        return total

    optimizer.step(closure)
    reached = (squared_errors().detach().sqrt() / TARGET.norm()).tolist()
    assert reached == pytest.approx(TABLE[f'`"{scaling}"`'], abs=0.002)


def test_best_approximations():
    values = torch.linalg.svdvals(TARGET)
    best = [float(values[rank:].norm() / values.norm()) for rank in RANKS]
    assert best == pytest.approx(TABLE["the best approximation of each rank"], abs=5e-4)
