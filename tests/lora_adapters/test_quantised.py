"""Adapters on bitsandbytes' 4-bit and 8-bit layers, on the CPU, for which bitsandbytes has kernels of its own."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from lora_adapters import Adapter, DyLoraConfig, set_rank
from lora_adapters.convert.deltas import read_module
from lora_adapters.injection import match_to_model, place
from lora_adapters.types.lycoris.operations import base_weight

from .changes import KINDS
from .conftest import GOLDEN, expected, make_pipeline
from .golden_outputs import outputs
from .peft_models import CONFIGS, MODELS, config, fill

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (pip install lora-adapters[8bit])")
pytestmark = pytest.mark.slow
BITS = ("4bit", "8bit")


def quantised(model: nn.Module, bits: str) -> nn.Module:
    """The model with bitsandbytes' layers in place of its linear ones, as from_pretrained puts them there."""
    for name, child in list(model.named_children()):
        if type(child) is not nn.Linear:
            quantised(child, bits)
            continue
        options = {"bias": child.bias is not None}
        if bits == "4bit":
            layer = bnb.nn.Linear4bit(child.in_features, child.out_features, compute_dtype=torch.float32, **options)
            # Its layout for fast inference on some CPUs is read wrongly by training and merging (in bitsandbytes 0.50).
            layer.support_avx512bf16_for_cpu = False
            layer.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
        else:
            layer = bnb.nn.Linear8bitLt(child.in_features, child.out_features, has_fp16_weights=False, **options)
            layer.weight = bnb.nn.Int8Params(child.weight.data, requires_grad=False, has_fp16_weights=False)
        layer.bias = child.bias
        setattr(model, name, layer.to("cpu"))
    setattr(model, f"is_loaded_in_{bits}", True)
    return model


def model_of(name, bits):
    """bitsandbytes' 4-bit kernel for the CPU wants widths that are multiples of 64."""
    if name == "custom":
        model, call = MODELS[name]()
        return quantised(model, bits), call
    torch.manual_seed(0)
    wide = {"vocab_size": 154, "hidden_size": 64, "intermediate_size": 128}
    text = CLIPTextConfig(num_hidden_layers=2, num_attention_heads=2, eos_token_id=153, **wide)
    model, ids = CLIPTextModel(text), torch.arange(154).view(2, 77)
    return quantised(model, bits), lambda model: model(ids)[0]


@torch.no_grad()
def run(call, model):
    return call(model.eval())


def linear_layers(model):
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    for layer in model.modules():
        if hasattr(layer, "lora_A") and isinstance(layer.get_base_layer(), kinds):
            yield layer


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", ["custom", "clip"])
def test_trained_saved_and_loaded(name, kind, bits, tmp_path) -> None:
    model, call = model_of(name, bits)
    base = run(call, model)
    peft_model = get_peft_model(model, config(kind, name))
    assert len(list(linear_layers(peft_model))) > 1
    torch.testing.assert_close(run(call, peft_model), base)
    peft_model.train()
    optimizer = torch.optim.Adam([one for one in peft_model.parameters() if one.requires_grad], lr=0.02)
    for _ in range(3):
        call(peft_model).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = run(call, peft_model)
    assert (trained - base).abs().max() > 1e-4
    peft_model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(model_of(name, bits)[0], tmp_path)
    torch.testing.assert_close(run(call, again), trained)
    assert type(again.peft_config["default"]) is CONFIGS[kind][0]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_layer_adds_its_change_to_what_the_quantised_one_does(kind, bits) -> None:
    model, _ = model_of("custom", bits)
    peft_model = fill(get_peft_model(model, config(kind, "custom")))
    if kind == "dylora":
        set_rank(peft_model, 2)
    rank, scale = (2, 2 / 4 * 2**0.5) if kind == "dylora" else (4, 2 / 4)  # sqrt, the default, of 4 over 2
    for layer in linear_layers(peft_model):
        x = torch.randn(5, layer.in_features)
        down, up = layer.lora_A["default"].weight[:rank], layer.lora_B["default"].weight[:, :rank]
        with torch.no_grad():
            wanted = layer.base_layer(x) + scale * x @ down.T @ up.T
            torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"LoRA"}))
def test_other_kinds_change_what_the_quantised_weight_stands_for(kind, bits) -> None:
    """Those that depend on the model's weight depend on the dequantised one."""
    torch.manual_seed(0)
    model = quantised(nn.Sequential(nn.Linear(64, 128)).eval(), bits)
    layer, x = model[0], torch.randn(3, 64)
    before, change = model(x), read_module(KINDS[kind]())
    weight = base_weight(layer, torch.device("cpu"))
    place(model, match_to_model(model, "unet", {"0": change}), "a", {})
    wanted = before + x @ change.delta(weight if change.needs_base else None).reshape(weight.shape).T
    if change.bias() is not None:
        wanted = wanted + change.bias()
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)  # the layer is as it was


@pytest.mark.parametrize("bits", BITS)
def test_merged_it_is_near(bits) -> None:
    """Merging quantises anew, so that it is not exact; it must be nearer than the base."""
    model, call = model_of("custom", bits)
    base = run(call, model)
    peft_model = fill(get_peft_model(model, config("dylora", "custom")))
    with torch.no_grad():
        for layer in linear_layers(peft_model):
            layer.lora_B["default"].weight.mul_(10)
    set_rank(peft_model, 2)
    wanted = run(call, peft_model)
    merged = run(call, peft_model.merge_and_unload())
    assert (merged - wanted).norm() < 0.3 * (base - wanted).norm()


@pytest.mark.parametrize("bits", BITS)
def test_in_a_pipeline(bits) -> None:
    """`load_lora_weights` into a pipeline whose U-Net is quantised; C3Lier's convolutions are not."""
    pipe, golden = make_pipeline(), expected("sd15")
    quantised(pipe.unet, bits)
    base = outputs(pipe, golden)
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    pipe.load_lora_weights(GOLDEN / "sd15" / "dylora_conv.safetensors", adapter_name="a")
    assert isinstance(pipe.unet.peft_config["a"], DyLoraConfig)
    whole = outputs(pipe, golden)
    wanted = golden["dylora_conv.x1.0.unet"] - golden["base.unet"]
    change = whole["unet"] - base["unet"]
    assert (change - wanted).norm() < 0.25 * wanted.norm()  # the base is another one, a little
    set_rank(pipe, 2)
    assert (outputs(pipe, golden)["unet"] - whole["unet"]).abs().max() > 1e-4
    taken = Adapter.from_pipeline(pipe, "a")
    assert len(taken.modules) == len(Adapter.load(GOLDEN / "sd15" / "dylora_conv.safetensors").modules)
    pipe.unload_lora_weights()
    after = pipe.unet.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
