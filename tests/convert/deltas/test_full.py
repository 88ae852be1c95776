"""Whole changes of weights and biases against LyCORIS' modules and plain sums."""

import pytest
import torch
from torch import nn

from lora_adapters.convert import AdapterError, LowRank
from lora_adapters.convert.deltas import Full, Norm, WithBias, read_module

from .lycoris_modules import LAYERS, changed, check, check_written

NORMS = {
    "LayerNorm": (lambda: nn.LayerNorm(12), (3, 5, 12)),
    "GroupNorm": (lambda: nn.GroupNorm(4, 12), (2, 12, 5, 5)),
}


@pytest.mark.parametrize("multiplier", [1.0, 0.7, -1.5])
@pytest.mark.parametrize("layer", LAYERS)
def test_full(layer, multiplier):
    made = LAYERS[layer]()
    change = check("FullModule", made, multiplier)
    assert (change.kind, change.rank, change.needs_base) == ("full", None, False)
    assert (change.bias() is None) == (made.bias is None)
    check_written(change.scaled(0.7), made)


@pytest.mark.parametrize("multiplier", [1.0, 0.7, -1.5])
@pytest.mark.parametrize("norm", NORMS)
def test_norm(norm, multiplier):
    make, shape = NORMS[norm]
    made, inputs = make(), torch.randn(shape)
    change = check("NormModule", made, multiplier, inputs)
    assert (type(change), change.kind) == (Norm, "norm")
    check_written(change.scaled(0.7), made, inputs)


def test_the_diff_of_a_norm():
    change = read_module({"diff": torch.ones(12), "diff_b": torch.full((12,), 2.0)}).scaled(0.5)
    layer, inputs = nn.LayerNorm(12), torch.randn(3, 12)
    torch.testing.assert_close(changed(layer, change, inputs), 1.5 * layer(inputs) + 1)


def test_a_1x1_kernel_may_be_left_out():
    change = Full(torch.randn(4, 3))
    assert change.fits((4, 3, 1, 1))
    assert change.delta(torch.zeros(4, 3, 1, 1)).shape == (4, 3, 1, 1)
    assert not change.fits((4, 3, 3, 3))


def test_only_the_bias_changes():
    change = read_module({"diff_b": torch.tensor([1.0, 2.0])}).scaled(0.5)
    assert change.needs_base
    assert change.bias().tolist() == [0.5, 1.0]
    assert torch.equal(change.delta(torch.ones(2, 3)), torch.zeros(2, 3))
    assert change.tensors()["diff_b"].tolist() == [0.5, 1.0]
    assert not change.fits((3, 2))
    with pytest.raises(AdapterError, match="depends on the model's weight"):
        change.delta()
    with pytest.raises(AdapterError, match=r"made for a bias of \[2\], but the model's weight is \[3, 2\]"):
        change.delta(torch.ones(3, 2))


def test_the_result_is_a_new_tensor():
    diff, bias = torch.ones(2, 3), torch.ones(2)
    for change in (Full(diff, bias), WithBias(Full(diff), bias)):
        change.delta().zero_()
        change.bias().zero_()
    assert diff.all()
    assert bias.all()


def test_a_bias_beside_another_kind():
    pair = {"lora_down.weight": torch.randn(2, 3), "lora_up.weight": torch.randn(4, 2), "diff_b": torch.randn(4)}
    change = read_module(pair)
    assert (type(change), change.kind, change.rank, change.needs_base) == (WithBias, "LoRA", 2, False)
    half = change.scaled(0.5)
    torch.testing.assert_close(half.delta(), 0.5 * pair["lora_up.weight"] @ pair["lora_down.weight"])
    torch.testing.assert_close(half.bias(), 0.5 * pair["diff_b"])
    again = read_module(half.tensors())
    torch.testing.assert_close(again.delta(), half.delta())
    torch.testing.assert_close(again.bias(), half.bias())
    assert half.to(torch.bfloat16).tensors()["diff_b"].dtype == torch.bfloat16
    assert change.fits((4, 3))
    assert change.is_finite()
    assert not WithBias(change.change, torch.tensor([1.0, float("inf")])).is_finite()
    short = WithBias(LowRank(torch.ones(2, 3), torch.ones(4, 2), 1.0), torch.ones(5))
    assert not short.fits((4, 3))
    with pytest.raises(AdapterError, match=r"diff_b has the shape \[5\], but the model's weight is \[4, 3\]"):
        short.delta(torch.ones(4, 3))


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"diff": torch.ones(4, 3), "diff_b": torch.ones(3)}, r"diff_b has the shape \[3\], expected \[4\]"),
        ({"diff": torch.ones(())}, r"diff has the shape \[\]"),
        ({"w_norm": torch.ones(4, 3)}, r"w_norm has the shape \[4, 3\]"),
        ({"w_norm": torch.ones(4), "b_norm": torch.ones(5)}, r"b_norm has the shape \[5\], expected \[4\]"),
        ({"diff": torch.ones(4, 3, dtype=torch.int32)}, "diff must be floating point"),
    ],
)
def test_shapes_that_do_not_fit(tensors, said):
    with pytest.raises(AdapterError, match=said):
        read_module(tensors)
