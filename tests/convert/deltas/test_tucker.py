"""LoRA and Tucker-decomposed LoRA against LyCORIS' LoCon and dense arithmetic."""

import pytest
import torch

from lora_adapters.convert import AdapterError, LowRank
from lora_adapters.convert.deltas import Tucker, read_module

from .lycoris_modules import LAYERS, check, check_written


@pytest.mark.parametrize("multiplier", [1.0, 0.7, -1.5])
@pytest.mark.parametrize("layer", LAYERS)
def test_locon(layer, multiplier):
    made = LAYERS[layer]()
    change = check("LoConModule", made, multiplier, lora_dim=4, alpha=3, use_tucker=True)
    assert type(change) is (Tucker if "3x3" in layer else LowRank)
    assert (change.kind, change.rank, change.needs_base) == ("LoRA", 4, False)
    check_written(change.scaled(0.7), made)


@pytest.mark.parametrize("tucker", [False, True])
def test_scalar_and_rank_stabilised_scale_are_in_the_tensors(tucker):
    options = {"lora_dim": 9, "alpha": 2, "use_scalar": True, "rs_lora": True, "use_tucker": tucker}
    change = check("LoConModule", LAYERS["conv3x3"](), 0.7, **options)
    assert change.alpha == 6  # alpha / sqrt(rank), as alpha / rank


def tucker(alpha=1.0):
    return Tucker(torch.randn(3, 5, 1, 1), torch.randn(3, 3, 3, 2), torch.randn(4, 3, 1, 1), alpha)


def test_delta_is_the_sum_over_both_ranks():
    one = tucker(alpha=2.0)
    dense = torch.einsum("op,pqhw,qi->oihw", one.up.flatten(1), one.mid, one.down.flatten(1)) * 2 / 3
    torch.testing.assert_close(one.delta(), dense)
    torch.testing.assert_close(one.scaled(0.5).delta(dtype=torch.float64), 0.5 * dense.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one.scaled(-3).low_rank().delta(), -3 * dense)
    assert one.fits((4, 5, 3, 2))
    assert not one.fits((4, 5, 2, 3))
    with pytest.raises(AdapterError, match=r"a weight of \[4, 5, 3, 2\], but the model's weight is \[4, 5, 3, 3\]"):
        one.delta(torch.zeros(4, 5, 3, 3))


def test_dtypes_and_finiteness():
    half = tucker().to(torch.float16)
    assert {tensor.dtype for tensor in (half.down, half.mid, half.up)} == {torch.float16}
    assert half.delta().dtype == torch.float32
    assert half.to(None) is half
    assert half.is_finite()
    half.mid[0, 0, 0, 0] = float("nan")
    assert not half.is_finite()


def test_a_weight_of_0_is_read_as_no_change():
    tensors = tucker().scaled(0).tensors()
    assert tensors["alpha"] == 3  # trainers read an alpha of 0 as the rank
    assert not read_module(tensors).delta().any()


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("down", (3,), r"lora_down.weight has the shape \[3\]"),
        ("up", (4, 2, 1, 1), r"lora_up.weight has the shape \[4, 2, 1, 1\], expected \[any, 3\]"),
        ("mid", (3, 2, 3, 3), r"lora_mid.weight has the shape \[3, 2, 3, 3\], but the rank is 3"),
    ],
)
def test_shapes_that_do_not_fit(name, shape, said):
    parts = {"down": torch.ones(3, 5), "mid": torch.ones(3, 3, 3, 3), "up": torch.ones(4, 3), name: torch.ones(shape)}
    with pytest.raises(AdapterError, match=said):
        Tucker(alpha=1.0, **parts)
