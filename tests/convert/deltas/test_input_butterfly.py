"""PEFT's BOFT against PEFT's own layers, with any number of stages; OFT of PEFT's older versions by arithmetic."""

import peft
import pytest
import torch
from peft.tuners.boft import layer as boft_layer
from torch import nn

from lora_adapters.convert import AdapterError
from lora_adapters.convert.deltas import OFT, read_module

LAYERS = {
    "linear": lambda: nn.Linear(24, 10),
    "1x1": lambda: nn.Conv2d(24, 10, 1),
    "3x3": lambda: nn.Conv2d(8, 10, 3, padding=1),
}


class BlockDiagonal:
    """What PEFT's CUDA kernel computes, without which it takes one stage only."""

    def forward(self, blocks: torch.Tensor) -> list[torch.Tensor]:
        return [torch.stack([torch.block_diag(*stage) for stage in blocks])]


@pytest.mark.parametrize(("stages", "size"), [(1, 3), (1, 8), (2, 4), (2, 6), (3, 2)])
@pytest.mark.parametrize("layer", LAYERS)
def test_as_peft_computes_it(layer, stages, size, monkeypatch):
    monkeypatch.setattr(boft_layer, "get_fbd_cuda", BlockDiagonal)
    torch.manual_seed(0)
    base = LAYERS[layer]()
    weight = base.weight.detach().clone()
    config = peft.BOFTConfig(
        boft_block_size=size, boft_n_butterfly_factor=stages, target_modules=["0"], init_weights=False
    )
    model = peft.get_peft_model(nn.Sequential(base), config).eval()
    tensors = peft.get_peft_model_state_dict(model)
    change = read_module({key.rpartition(".")[2]: tensor for key, tensor in tensors.items()})
    assert (change.kind, change.needs_base, change.out_in) == ("BOFT", True, (10, weight[0].numel()))
    x = torch.randn(2, 24) if layer == "linear" else torch.randn(2, weight.shape[1], 4, 4)
    with torch.no_grad():
        want = model(x)
        base.weight.copy_(weight + change.delta(weight))
        torch.testing.assert_close(base(x), want, rtol=1e-5, atol=1e-5)
    again = read_module(change.tensors())
    torch.testing.assert_close(again.delta(weight), change.delta(weight))
    half = change.scaled(0.5).delta(weight)
    assert 0.2 < float(half.norm() / change.delta(weight).norm()) < 0.8
    with pytest.raises(AdapterError, match="made for a weight with 10 output channels"):
        change.delta(torch.randn(10, 48))


def cayley(blocks):
    skew, eye = (blocks - blocks.mT) / 2, torch.eye(blocks.shape[-1])
    return torch.linalg.solve(eye + skew, eye - skew, left=False)


def test_oft_before_peft_0_14_rotates_outputs():
    """y · diag(R), where y has no bias yet."""
    blocks, weight = torch.randn(3, 4, 4), torch.randn(12, 5)
    change = read_module({"oft_r": blocks})
    assert isinstance(change, OFT)
    want = torch.block_diag(*cayley(blocks)).T @ weight
    torch.testing.assert_close(weight + change.delta(weight), want)


@pytest.mark.parametrize("count", [3, 1])
def test_oft_of_peft_0_14_and_0_15_rotates_inputs(count):
    """One block of several groups of channels is shared by them."""
    blocks, factors = torch.randn(count, 4, 4), torch.rand(6, 1) + 0.5
    for weight in (torch.randn(6, 12), torch.randn(6, 3, 2, 2)):
        change = read_module({"oft_r": blocks, "oft_s": factors})
        turns = torch.block_diag(*cayley(blocks).expand(3, -1, -1))
        want = (factors * (weight.flatten(1) @ turns.T)).reshape(weight.shape)
        torch.testing.assert_close(weight + change.delta(weight), want, rtol=1e-5, atol=1e-5)
        assert change.kind == "OFT"
        assert change.tensors().keys() == {"oft_r", "oft_s"}


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"boft_R": torch.ones(1, 2, 4, 4)}, "a BOFT module lacks boft_s"),
        ({"boft_R": torch.ones(2, 3, 4, 4), "boft_s": torch.ones(5, 1)}, r"expected \(stages, count, size, size\)"),
        ({"boft_R": torch.ones(1, 2, 4, 4), "boft_s": torch.ones(5)}, r"boft_s has the shape \[5\]"),
        ({"oft_r": torch.ones(4, 4)}, r"oft_r has the shape \[4, 4\]"),
    ],
)
def test_tensors_of_no_such_layer(tensors, said):
    with pytest.raises(AdapterError, match=said):
        read_module(tensors)
