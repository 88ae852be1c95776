"""IA3 against LyCORIS' module and plain products."""

import pytest
import torch

from lora_adapters.convert import AdapterError
from lora_adapters.convert.deltas import IA3, read_module

from .lycoris_modules import LAYERS, check


@pytest.mark.parametrize("multiplier", [1.0, 0.7, -1.5])
@pytest.mark.parametrize("on_input", [True, False])
@pytest.mark.parametrize("layer", LAYERS)
def test_ia3(layer, on_input, multiplier):
    change = check("IA3Module", LAYERS[layer](), multiplier, train_on_input=on_input)
    assert (change.kind, change.rank, change.needs_base, change.on_input) == ("IA3", None, True, on_input)


def test_delta_in_numbers():
    weight = torch.arange(6.0).reshape(2, 3)
    rows = IA3(torch.tensor([2.0, -1.0]), on_input=False)
    assert rows.delta(weight).tolist() == [[0, 2, 4], [-3, -4, -5]]
    columns = IA3(torch.tensor([[[[1.0]], [[2.0]], [[0.5]]]]), on_input=True)
    assert columns.scaled(2).delta(weight).tolist() == [[0, 4, 2], [6, 16, 5]]
    assert weight.tolist() == [[0, 1, 2], [3, 4, 5]]
    again = read_module(columns.scaled(2).tensors())
    assert torch.equal(again.delta(weight), columns.scaled(2).delta(weight))
    with pytest.raises(AdapterError, match=r"a weight with 3 input channels, but the model's weight is \[2, 4\]"):
        columns.delta(torch.ones(2, 4))


def test_a_shape_that_is_no_vector():
    with pytest.raises(AdapterError, match=r"weight has the shape \[2, 3\]"):
        read_module({"weight": torch.ones(2, 3), "on_input": torch.tensor(1)})


@pytest.mark.parametrize(
    ("factors", "on_input"),
    [(torch.tensor([[2.0], [0.5]]), False), (torch.tensor([[2.0, 0.5, 1.0]]), True)],
)
def test_pefts_factors(factors, on_input):
    """PEFT multiplies with them (`ia3_l`), LyCORIS with one more than `weight`."""
    weight = torch.arange(6.0).reshape(2, 3)
    change = read_module({"ia3_l": factors})
    assert (change.on_input, change.scales_bias) == (on_input, not on_input)
    torch.testing.assert_close(weight + change.delta(weight), weight * factors)
    halved = change.scaled(0.5)
    again = read_module(halved.tensors())
    assert again.scales_bias == change.scales_bias
    torch.testing.assert_close(again.delta(weight), halved.delta(weight))
    with pytest.raises(AdapterError, match=r"ia3_l has the shape \[2, 3\]"):
        read_module({"ia3_l": torch.ones(2, 3)})
