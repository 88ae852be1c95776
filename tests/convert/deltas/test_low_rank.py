"""One low-rank pair against dense arithmetic."""

import pytest
import torch

from lora_adapters.convert import AdapterError, LowRank

SHAPES = {
    "linear": ((4, 6), (5, 4)),
    "conv1x1": ((4, 6, 1, 1), (5, 4, 1, 1)),
    "conv3x3": ((4, 6, 3, 3), (5, 4, 1, 1)),
}


def make(kind, alpha=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    down, up = SHAPES[kind]
    return LowRank(torch.randn(down, generator=generator), torch.randn(up, generator=generator), alpha)


def dense(one):
    return one.alpha / one.rank * torch.einsum("or,r...->o...", one.up.double().flatten(1), one.down.double())


@pytest.mark.parametrize("kind", SHAPES)
def test_delta_sum_and_scale(kind):
    a, b = make(kind), make(kind, alpha=3.0, seed=1)
    torch.testing.assert_close(a.delta(dtype=torch.float64), dense(a))
    both = a.scaled(0.5) + b.scaled(-2.0)
    assert both.rank == 8
    torch.testing.assert_close(both.delta().double(), 0.5 * dense(a) - 2 * dense(b), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a.with_alpha(7.0).delta().double(), dense(a), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("scaling", "alpha"), [("constant", 1.0), ("rank", 2.0), ("sqrt", 2.0 * 0.5**0.5)])
def test_truncated(scaling, alpha):
    one = make("conv3x3")
    cut = one.truncated(2, scaling)
    assert (cut.rank, cut.alpha) == (2, pytest.approx(alpha))
    assert torch.equal(cut.down, one.down[:2])
    assert torch.equal(cut.up, one.up[:, :2])
    assert one.truncated(9) is one


def test_spellings_of_1x1_are_one_thing():
    conv = make("conv1x1")
    linear = conv.shaped_like((5, 6))
    assert linear.down.shape == (4, 6)
    assert torch.equal(linear.shaped_like((5, 6, 1, 1)).delta(), conv.delta())
    with pytest.raises(AdapterError, match=r"\[5, 6\], but the model's weight is \[5, 7\]"):
        conv.shaped_like((5, 7))


@pytest.mark.parametrize(
    ("down", "up", "alpha", "said"),
    [
        ((4, 6), (5, 3), 1, "ranks differ"),
        ((0, 6), (5, 0), 1, "rank"),
        ((4,), (5, 4), 1, "not a low-rank"),
        ((4, 6), (5, 4), float("nan"), "alpha"),
    ],
)
def test_what_is_no_pair(down, up, alpha, said):
    with pytest.raises(AdapterError, match=said):
        LowRank(torch.zeros(down), torch.zeros(up), alpha)
    with pytest.raises(AdapterError, match="floating point"):
        LowRank(torch.zeros(4, 6, dtype=torch.int8), torch.zeros(5, 4), 1.0)
