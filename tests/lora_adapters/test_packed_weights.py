"""Adapters on weights that are kept in other numbers than torch computes in: GGUF, float8, quanto, torchao."""

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.hooks import apply_layerwise_casting
from peft import LoraConfig
from torch import nn

from lora_adapters.convert.deltas import read_module
from lora_adapters.convert.errors import AdapterError
from lora_adapters.fusing import fusing
from lora_adapters.injection import match_to_model, place

from .changes import KINDS
from .transformers import CONFIGS, flux


def gguf(model: nn.Module) -> nn.Module:
    """The model with its linear layers as diffusers' `GGUFQuantizationConfig` makes them, in Q8_0."""
    library = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFParameter, _replace_with_gguf_linear

    kind, state = library.GGMLQuantizationType.Q8_0, dict(model.state_dict())
    for path, layer in model.named_modules():
        if type(layer) is nn.Linear and layer.in_features % 32 == 0:
            codes = library.quants.quantize(layer.weight.detach().numpy(), kind)
            key = f"{path}.weight"
            state[key] = GGUFParameter(torch.from_numpy(codes), quant_type=kind)
    _replace_with_gguf_linear(model, torch.float32, state)
    for key, value in state.items():
        path, _, name = key.rpartition(".")
        module = model.get_submodule(path)
        if name in module._parameters:
            module._parameters[name] = value if type(value) is GGUFParameter else nn.Parameter(value, False)
    return model


def float8(model: nn.Module) -> nn.Module:
    """As diffusers' `enable_layerwise_casting`: kept in float8, computed in float32."""
    apply_layerwise_casting(model, torch.float8_e4m3fn, torch.float32)
    return model


def quanto(model: nn.Module) -> nn.Module:
    library = pytest.importorskip("optimum.quanto")
    library.quantize(model, weights=library.qint8)
    library.freeze(model)
    return model


def torchao(model: nn.Module) -> nn.Module:
    library = pytest.importorskip("torchao.quantization")
    library.quantize_(model, library.Int8WeightOnlyConfig())
    return model


BASES = {made.__name__: made for made in (gguf, float8, quanto, torchao)}
NOT_FUSED = ("gguf", "quanto", "torchao")


def adapted(base: str, kind: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A model of one linear layer with an adapter, an input, and what the arithmetic of the change makes of it."""
    torch.manual_seed(0)
    model = BASES[base](nn.Sequential(nn.Linear(64, 128)).eval())
    bias = model(torch.zeros(1, 64))
    weight = (model(torch.eye(64)) - bias).T  # what the layer computes with
    x, change = torch.randn(3, 64), read_module(KINDS[kind]())
    delta = change.delta(weight if change.needs_base else None).reshape(weight.shape)
    wanted = model(x) + x @ delta.T
    if (added := change.bias()) is not None:
        wanted = wanted + added
    place(model, match_to_model(model, "unet", {"0": change}), "a", {"type": "lora"})
    return model, x, wanted


@torch.no_grad()
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_adds_the_change_of_the_weight_that_it_computes_with(kind: str, base: str) -> None:
    model, x, wanted = adapted(base, kind)
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("base", NOT_FUSED)
@pytest.mark.parametrize("kind", ["LoRA", "IA3", "OFT"])
def test_it_is_not_fused_into_codes(kind: str, base: str) -> None:
    model, x, wanted = adapted(base, kind)
    if base != "torchao":  # PEFT's own layer refuses by itself
        with pytest.raises(AdapterError, match=r"is quantised .* cannot be fused"):
            model[0].merge()
    with pytest.raises(AdapterError, match=r"^0 is quantised .* without quantisation$"):
        fusing(lambda model: model[0].merge())(model)
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_fused_into_float8_by_rounding_once(kind: str) -> None:
    model, x, wanted = adapted("float8", kind)
    layer = model[0].get_base_layer()
    before = layer.weight.detach().clone()
    fusing(lambda model: model[0].merge())(model)
    assert layer.weight.dtype == torch.float8_e4m3fn
    step = layer.weight.float().abs() * 2**-4 + 2**-10  # half the distance of two numbers in float8_e4m3fn
    bias = 2**-4 * layer.bias.float().abs()
    assert ((model(x) - wanted).abs() <= x.abs() @ step.T + bias + 1e-5).all()
    model[0].unmerge()
    assert torch.equal(layer.weight.view(torch.uint8), before.view(torch.uint8))
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)


def test_nothing_of_a_model_is_fused_where_one_layer_cannot_be() -> None:
    config = {**CONFIGS["FluxTransformer2DModel"], "in_channels": 12}
    model = gguf(FluxTransformer2DModel(**config).eval())
    plain = [path for path, layer in model.named_modules() if type(layer) is nn.Linear]
    packed = [path for path, layer in model.named_modules() if type(layer).__name__ == "GGUFLinear"]
    assert plain
    assert packed
    model.add_adapter(LoraConfig(r=2, target_modules=[*plain[:2], packed[-1]], init_lora_weights=False))
    before = {path: model.get_submodule(path).get_base_layer().weight.clone() for path in plain[:2]}
    pipe = flux(text=False)
    pipe.register_modules(transformer=model)
    for fuse in (model.fuse_lora, lambda: pipe.fuse_lora(["transformer"]), pipe.fuse_lora):
        with pytest.raises(AdapterError, match=f"{packed[-1]} is quantised"):
            fuse()
    for path, weight in before.items():
        assert torch.equal(model.get_submodule(path).get_base_layer().weight, weight)
