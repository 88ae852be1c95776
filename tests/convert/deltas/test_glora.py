"""GLoRA against LyCORIS' module and dense arithmetic."""

import pytest
import torch

from lora_adapters.convert import AdapterError
from lora_adapters.convert.deltas import GLoRA, read_module

from .lycoris_modules import LAYERS, changed, check, check_written, make, written


@pytest.mark.parametrize("multiplier", [1.0, 0.7, -1.5])
@pytest.mark.parametrize("layer", LAYERS)
def test_glora(layer, multiplier):
    made = LAYERS[layer]()
    change = check("GLoRAModule", made, multiplier, lora_dim=4, alpha=3)
    assert (change.kind, change.rank, change.needs_base) == ("GLoRA", 4, True)
    check_written(change.scaled(0.7), made)


def test_scalar_is_in_the_tensors():
    check("GLoRAModule", LAYERS["conv1x1"](), 0.7, lora_dim=4, alpha=3, use_scalar=True)


def test_rank_stabilised():
    layer = LAYERS["linear"]()
    module = make("GLoRAModule", layer, lora_dim=4, alpha=3, rs_lora=True)
    change, inputs = read_module(written(module), rs_lora=True), torch.randn(5, 24)
    with torch.no_grad():
        torch.testing.assert_close(changed(layer, change, inputs), module(inputs), rtol=1e-5, atol=1e-5)


def parts(rank=2):
    shapes = {"a1": (5, rank), "a2": (rank, 5), "b1": (4, rank), "b2": (rank, 5)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def test_delta_has_a_part_of_the_weight_in_it():
    one, weight = GLoRA(alpha=4.0, **parts()), torch.randn(4, 5)
    torch.testing.assert_close(one.delta(weight), 2 * (weight @ one.a1 @ one.a2 + one.b1 @ one.b2))
    torch.testing.assert_close(one.scaled(-0.5).delta(weight), -0.5 * one.delta(weight))
    assert not read_module(one.scaled(0).tensors()).delta(weight).any()


def test_tucker_decomposed():
    one, weight = GLoRA(alpha=2.0, bm=torch.randn(2, 2, 3, 3), **parts()), torch.randn(4, 5, 3, 3)
    dense = torch.einsum("op,pqhw,qi->oihw", one.b1, one.bm, one.b2)
    dense += torch.einsum("oihw,ij->ojhw", weight, one.a1 @ one.a2)
    torch.testing.assert_close(one.delta(weight), dense, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(read_module(one.tensors()).delta(weight), one.delta(weight))


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("a1", (6, 2), r"a1.weight has the shape \[6, 2\], expected \[5, 2\]"),
        ("b1", (4, 3), r"b1.weight has the shape \[4, 3\], expected \[any, 2\]"),
        ("b2", (2, 6), r"b2.weight has the shape \[2, 6\], expected \[2, 5, ...\]"),
        ("bm", (3, 3, 3, 3), r"bm.weight has the shape \[3, 3, 3, 3\], but the rank is 2"),
    ],
)
def test_shapes_that_do_not_fit(name, shape, said):
    with pytest.raises(AdapterError, match=said):
        GLoRA(alpha=1.0, **{**parts(), name: torch.ones(shape)})
    with pytest.raises(AdapterError, match=r"made for a weight of \[4, 5\], but the model's weight is \[5, 5\]"):
        GLoRA(alpha=1.0, **parts()).delta(torch.ones(5, 5))
