"""OFT and BOFT against LyCORIS' modules and plain rotations."""

import pytest
import torch

from lora_adapters.convert import AdapterError
from lora_adapters.convert.deltas import BOFT, OFT, read_module
from lora_adapters.convert.deltas.oft import rotations

from .lycoris_modules import LAYERS, check, check_written

KINDS = {"OFT": (OFT, "DiagOFTModule"), "BOFT": (BOFT, "ButterflyOFTModule")}
OPTIONS = {"plain": {}, "rescaled": {"rescaled": True}, "constrained": {"constraint": 0.02}}


@pytest.mark.parametrize("multiplier", [1.0, 0.7, -1.5])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_lycoris(kind, layer, options, multiplier):
    cls, algorithm = KINDS[kind]
    made = LAYERS[layer]()
    change = check(algorithm, made, multiplier, lora_dim=4, **OPTIONS[options])
    assert (type(change), change.kind, change.rank, change.needs_base) == (cls, kind, None, True)
    assert change.constraint == pytest.approx(0.02 if options == "constrained" else 0)
    check_written(change, made)


def test_rotations_are_rotations():
    turned = rotations(torch.randn(3, 4, 4, dtype=torch.float64), 0, torch.float64)
    torch.testing.assert_close(turned @ turned.mT, torch.eye(4, dtype=torch.float64).expand(3, 4, 4))
    torch.testing.assert_close(torch.linalg.det(turned), torch.ones(3, dtype=torch.float64))


def test_a_quarter_turn_in_numbers():
    # Q = [[0, -1], [1, 0]] gives R = [[0, -1], [1, 0]]: OFT applies its transpose, BOFT applies R
    block = torch.tensor([[0.0, -0.5], [0.5, 0.0]])
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    torch.testing.assert_close(weight + OFT(block[None]).delta(weight), torch.tensor([[3.0, 4.0], [-1.0, -2.0]]))
    torch.testing.assert_close(weight + BOFT(block[None, None]).delta(weight), torch.tensor([[-3.0, -4.0], [1.0, 2.0]]))
    rescaled = OFT(block[None], rescale=torch.tensor([[2.0], [1.0]]))
    torch.testing.assert_close(weight + rescaled.delta(weight), torch.tensor([[6.0, 8.0], [-1.0, -2.0]]))


def test_the_constraint_limits_all_blocks_together():
    blocks = torch.randn(2, 4, 4)
    skew = blocks - blocks.mT
    limited = OFT(blocks, constraint=0.25 * float(skew.norm()) / 8)  # of 8 rows
    free = OFT(blocks * 0.25)
    weight = torch.randn(8, 3)
    torch.testing.assert_close(limited.delta(weight), free.delta(weight), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_computed_in_float32(kind):
    change = KINDS[kind][0](0.1 * torch.randn((4, 4, 4) if kind == "OFT" else (1, 4, 4, 4))).to(torch.float16)
    weight = torch.randn(16, 5).half()
    assert change.delta(weight).dtype == torch.float32
    narrow = change.delta(weight, torch.float16)
    assert narrow.dtype == torch.float16
    torch.testing.assert_close(narrow.float(), change.delta(weight), rtol=0.02, atol=0.01)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"oft_blocks": torch.ones(3, 4, 5)}, r"oft_blocks has the shape \[3, 4, 5\], expected \[3, 4, 4\]"),
        ({"oft_blocks": torch.ones(2, 3, 4, 4)}, r"\[2, 3, 4, 4\], expected \(stages, count, size, size\)"),
        ({"oft_blocks": torch.ones(4, 4)}, "tensors match no known kind of adapter: oft_blocks"),
        ({"oft_blocks": torch.ones(3, 4, 4), "rescale": torch.ones(11, 1)}, r"rescale has the shape \[11, 1\]"),
    ],
)
def test_what_does_not_fit(tensors, said):
    with pytest.raises(AdapterError, match=said):
        read_module(tensors)


def test_no_weight_is_written():
    change = OFT(torch.ones(3, 4, 4)).scaled(0.5)
    with pytest.raises(AdapterError, match=r"an OFT at weight 0.5 cannot be written"):
        change.tensors()
    with pytest.raises(AdapterError, match=r"a weight with 12 output channels, but the model's weight is \[11, 4\]"):
        change.delta(torch.ones(11, 4))
