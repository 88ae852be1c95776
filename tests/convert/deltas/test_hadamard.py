"""LoHa against LyCORIS' module and dense arithmetic."""

import pytest
import torch

from lora_adapters.convert import AdapterError
from lora_adapters.convert.deltas import Hadamard, read_module

from .lycoris_modules import LAYERS, check, check_written


@pytest.mark.parametrize("multiplier", [1.0, 0.7, -1.5])
@pytest.mark.parametrize("use_tucker", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_loha(layer, use_tucker, multiplier):
    made = LAYERS[layer]()
    change = check("LohaModule", made, multiplier, lora_dim=4, alpha=3, use_tucker=use_tucker)
    assert (change.kind, change.rank, change.needs_base) == ("LoHa", 4, False)
    check_written(change.scaled(0.7), made)


def test_scalar_and_rank_stabilised_scale_are_in_the_tensors():
    options = {"lora_dim": 4, "alpha": 3, "use_scalar": True, "rs_lora": True}
    assert check("LohaModule", LAYERS["linear"](), 1.0, **options).alpha == 6


def ones(**other):
    parts = {"w1_a": torch.ones(5, 2), "w1_b": torch.ones(2, 12), "w2_a": torch.ones(5, 2), "w2_b": torch.ones(2, 12)}
    return Hadamard(**{"alpha": 1.0, **parts, **other})


def test_delta_in_numbers():
    one = ones(w1_a=torch.tensor([[1.0, 2.0]] * 5))
    assert torch.equal(one.delta(), torch.full((5, 12), 3.0))  # (1 + 2) * (1 + 1) * alpha / rank
    assert torch.equal(one.scaled(0.5).delta(torch.zeros(5, 3, 2, 2)), torch.full((5, 3, 2, 2), 1.5))
    assert one.fits((5, 12))
    assert one.fits((5, 3, 2, 2))
    assert not one.fits((5, 3, 3, 3))
    assert "rank 2" in repr(one)
    with pytest.raises(AdapterError, match=r"made for a weight of \[5, 12\], but the model's weight is \[5, 11\]"):
        one.delta(torch.zeros(5, 11))


def test_a_weight_of_0_is_read_as_no_change():
    assert not read_module(ones().scaled(0).tensors()).delta().any()


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"w1_a": torch.ones(5, 3)}, r"hada_w1_a has the shape \[5, 3\], expected \[any, 2\]"),
        ({"w2_a": torch.ones(6, 2)}, r"hada_w2_a has the shape \[6, 2\], expected \[5, 2\]"),
        ({"w2_b": torch.ones(2, 11)}, r"hada_w2_b has the shape \[2, 11\], expected \[2, 12\]"),
        ({"w1_b": torch.ones(2)}, r"hada_w1_b has the shape \[2\]"),
        ({"t1": torch.ones(2, 2, 3, 3)}, "only one of hada_t1 and hada_t2 is present"),
        ({"alpha": float("inf")}, "alpha is inf"),
        ({"w1_a": torch.ones(5, 2, dtype=torch.int8)}, "w1_a must be floating point, not torch.int8"),
    ],
)
def test_what_does_not_fit(other, said):
    with pytest.raises(AdapterError, match=said):
        ones(**other)


def test_tucker_cores_of_another_rank():
    cores = {"t1": torch.ones(3, 3, 3, 3), "t2": torch.ones(3, 3, 3, 3)}
    with pytest.raises(AdapterError, match=r"hada_t1 has the shape \[3, 3, 3, 3\], but the rank is 2"):
        ones(w1_a=torch.ones(2, 5), w2_a=torch.ones(2, 5), **cores)
