"""Changes of any kinds in live layers, compared with LyCORIS' own modules: outputs and gradients."""

from dataclasses import replace

import pytest
import torch
from peft import inject_adapter_in_model
from torch import nn

from lora_adapters import LycorisConfig
from lora_adapters.convert.deltas import read_module
from lora_adapters.types import registry
from lora_adapters.types.layers import layers
from lora_adapters.types.lycoris.layer import hold
from tests.convert.deltas.lycoris_modules import INPUTS, LAYERS, make, written

KINDS = {
    "LoHa": ("LohaModule", {"lora_dim": 4, "alpha": 3}),
    "LoHa, Tucker": ("LohaModule", {"lora_dim": 4, "alpha": 3, "use_tucker": True}),
    "LoKr": ("LokrModule", {"lora_dim": 2, "alpha": 3, "factor": 4}),
    "LoKr, full": ("LokrModule", {"lora_dim": 10000, "alpha": 3, "factor": 4}),
    "LoCon, Tucker": ("LoConModule", {"lora_dim": 4, "alpha": 3, "use_tucker": True}),
    "DoRA": ("LoConModule", {"lora_dim": 4, "alpha": 3, "weight_decompose": True, "wd_on_out": True}),
    "DoRA, inputs": ("LoConModule", {"lora_dim": 4, "alpha": 3, "weight_decompose": True, "wd_on_out": False}),
    "GLoRA": ("GLoRAModule", {"lora_dim": 4, "alpha": 3}),
    "IA3": ("IA3Module", {"train_on_input": True}),
    "OFT": ("DiagOFTModule", {"lora_dim": 4, "rescaled": True}),
    "BOFT": ("ButterflyOFTModule", {"lora_dim": 4}),
}
SHAPES = ("linear", "conv3x3")


def live(layer, change):
    """The layer in a model that has the change as its adapter."""
    model = inject_adapter_in_model(LycorisConfig(r=1, target_modules=["0"]), nn.Sequential(layer))
    hold(model[0], "default", change)
    return model


@pytest.mark.parametrize("multiplier", [1.0, 0.6])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_lycoris(kind, shape, multiplier) -> None:
    algorithm, options = KINDS[kind]
    torch.manual_seed(0)
    layer = LAYERS[shape]()
    theirs = make(algorithm, layer, multiplier, **options)
    model = live(layer, read_module(written(theirs)))
    model[0].set_scale("default", multiplier)
    x = torch.randn(INPUTS[type(layer)](layer), requires_grad=True)
    expected, got = theirs(x), model(x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    by_theirs = torch.autograd.grad(
        expected.square().sum(), [x, *(one for one in theirs.parameters())], allow_unused=True
    )
    mine = list(model[0].lora_A["default"].parameters())
    by_mine = torch.autograd.grad(got.square().sum(), [x, *mine])
    sizes = sorted(float(one.norm()) for one in by_mine[1:])
    wanted = sorted(float(one.norm()) for one in by_theirs[1:] if one is not None)[-len(sizes) :]
    torch.testing.assert_close(by_mine[0], by_theirs[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.tensor(sizes), torch.tensor(wanted), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_fused_and_taken_out_again(kind) -> None:
    algorithm, options = KINDS[kind]
    torch.manual_seed(0)
    layer = LAYERS["conv3x3"]()
    before = layer.weight.detach().clone()
    model = live(layer, read_module(written(make(algorithm, layer, **options))))
    x = torch.randn(INPUTS[nn.Conv2d](layer))
    with torch.no_grad():
        expected = model(x)
        for safe in (False, True):
            model[0].merge(safe_merge=safe)
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
            model[0].unmerge()
            torch.testing.assert_close(layer.weight, before, rtol=1e-6, atol=1e-6)
            assert torch.equal(layer.weight, before) or not registry.delta_of(model[0], "default").needs_base


def test_a_norm_and_a_bias() -> None:
    norm = nn.GroupNorm(2, 8)
    model = live(norm, read_module({"w_norm": torch.arange(8.0), "b_norm": torch.ones(8)}))
    x = torch.randn(2, 8, 3)
    plain = nn.functional.group_norm(x, 2, eps=norm.eps)
    torch.testing.assert_close(model(x), plain * (1 + torch.arange(8.0)[:, None]) + 1)
    model[0].set_scale("default", 0.5)
    torch.testing.assert_close(model(x), plain * (1 + 0.5 * torch.arange(8.0)[:, None]) + 0.5)
    model[0].merge()
    torch.testing.assert_close(model(x), plain * (1 + 0.5 * torch.arange(8.0)[:, None]) + 0.5)
    model[0].unmerge()
    assert torch.equal(norm.weight, torch.ones(8))
    assert torch.equal(norm.bias, torch.zeros(8))
    only_bias = live(nn.Linear(3, 2), read_module({"diff_b": torch.tensor([1.0, 2.0])}))
    inputs = torch.randn(4, 3)
    torch.testing.assert_close(only_bias(inputs), only_bias[0].base_layer(inputs) + torch.tensor([1.0, 2.0]))


def test_parameters_that_were_replaced_are_the_change_s() -> None:
    torch.manual_seed(0)
    layer = LAYERS["linear"]()
    model = live(layer, read_module(written(make("LohaModule", layer, lora_dim=4, alpha=3))))
    weights = model[0].lora_A["default"]
    assert [name for name, _ in weights.named_parameters()] == ["w1_a", "w1_b", "w2_a", "w2_b"]
    assert weights.change.w1_a is weights.w1_a
    weights.w1_a = nn.Parameter(torch.zeros_like(weights.w1_a))
    assert weights.change.w1_a is weights.w1_a
    x = torch.randn(2, 24)
    torch.testing.assert_close(model(x), layer(x))


def test_what_takes_part_in_the_gradient() -> None:
    layer = LAYERS["linear"]()
    model = live(layer, read_module(written(make("LoConModule", layer, lora_dim=4, weight_decompose=True))))
    model(torch.randn(2, 24)).sum().backward()
    assert {name for name, one in model.named_parameters() if one.grad is not None} == {
        f"0.lora_A.default.{name}" for name in ("change_down", "change_up", "magnitude")
    }
    ((_, found),) = layers(model, "default")
    assert [kind for kind, _ in registry.parts_of(found, "default")] == ["change", "up", "change"]
    change = registry.delta_of(found, "default")
    assert not change.magnitude.requires_grad
    assert replace(change, multiplier=2.0).kind == "DoRA"
