"""Weights of adapters for one call and for single blocks, as diffusers takes them."""

import copy
import subprocess
import sys

import pytest
import torch
from diffusers.utils import peft_utils
from peft import LoHaConfig, LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch._dynamo.testing import CompileCounter

from lora_adapters import AdapterError

from .conftest import GOLDEN, expected
from .golden_outputs import outputs


def scalings(pipe):
    models = (pipe.unet, pipe.text_encoder)
    layers = [module for model in models for module in model.modules() if hasattr(module, "scaling")]
    return [float(layer.scaling[name]) for layer in layers for name in layer.scaling]


def call(pipe, scale):
    """The U-Net's part of a call with that scale."""
    given = expected("sd15")
    kwargs = {"cross_attention_kwargs": {"scale": scale}}
    return pipe.unet(given["latents"], 7, given["context"], **kwargs).sample


@pytest.mark.parametrize("prepared", [False, True], ids=["as it comes", "prepared"])
def test_a_scale_of_zero_is_for_one_call(prepared, pipeline) -> None:
    pipe = pipeline()
    base = outputs(pipe, expected("sd15"))
    if prepared:
        pipe.enable_lora_hotswap(target_rank=8)
    pipe.load_lora_weights(GOLDEN / "sd15" / "lierla.safetensors", adapter_name="a")
    pipe.set_adapters(["a"], [{"unet": 0.6, "text_encoder": 0.3}])
    wanted, before = outputs(pipe, expected("sd15")), scalings(pipe)
    kinds = [type(layer.scaling["a"]) for layer in pipe.unet.modules() if hasattr(layer, "scaling")]
    for _ in range(2):
        torch.testing.assert_close(call(pipe, 0.0), base["unet"])
        assert scalings(pipe) == before
    torch.testing.assert_close(outputs(pipe, expected("sd15")), wanted, rtol=0, atol=0)
    assert kinds == [type(layer.scaling["a"]) for layer in pipe.unet.modules() if hasattr(layer, "scaling")]


def test_a_call_at_zero_that_failed_does_not_become_the_weight(pipeline) -> None:
    pipe = pipeline()
    pipe.load_lora_weights(GOLDEN / "sd15" / "lierla.safetensors", adapter_name="a")
    pipe.set_adapters(["a"], [0.6])
    before = scalings(pipe)
    peft_utils.scale_lora_layers(pipe.text_encoder, 0.0)  # an error here, and diffusers does not come to unscale
    peft_utils.scale_lora_layers(pipe.text_encoder, 0.0)
    peft_utils.unscale_lora_layers(pipe.text_encoder, 0.0)
    assert scalings(pipe) == before


def test_other_methods_and_other_scales_are_as_in_diffusers() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 5))
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=1, target_modules=["0"]), model, "a")
    model.__dict__.pop("peft_config", None)
    inject_adapter_in_model(LoHaConfig(r=2, alpha=1, target_modules=["1"]), model, "a")
    model[0].set_scale("a", 0.6)
    for scale in (0.5, 0.0):
        peft_utils.scale_lora_layers(model, scale)
        peft_utils.unscale_lora_layers(model, scale)
        assert (model[0].scaling["a"], model[1].scaling["a"]) == (0.3, 0.5)


def state(model: nn.Module) -> list:
    """What setting the weights of adapters may change in the layers."""
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    held = [(layer.active_adapters, layer.disable_adapters, getattr(layer, "scaling", None)) for layer in layers]
    return [*held, [(name, one.requires_grad) for name, one in model.named_parameters()]]


KINDS = {
    "plain": lambda model: inject_adapter_in_model(LoraConfig(r=2, target_modules="0|2.0.0.0"), model, "b"),
    "rslora": lambda model: inject_adapter_in_model(LoraConfig(r=4, use_rslora=True, target_modules="0"), model, "b"),
    "dora": lambda model: inject_adapter_in_model(LoraConfig(r=2, use_dora=True, target_modules="0"), model, "b"),
    "biases": lambda model: inject_adapter_in_model(LoraConfig(r=2, lora_bias=True, target_modules="0"), model, "b"),
    "loha": lambda model: inject_adapter_in_model(LoHaConfig(r=2, alpha=1, target_modules="3"), model, "b"),
}
WEIGHTS = {
    "one": (["a"], [0.3]),
    "both": (["b", "a"], [0.3, 2]),
    "none": ([], []),
    "unknown": (["a", "c"], [1, 1]),
    "parts": (["a", "b"], [{"2.0": 0.2, "0": 0.7, "1": 0.4}, 0.5]),
    "blocks": (["a", "b"], [{"2.0.attentions.0": 0.2}, {"2.0.attentions.1": 0.1}]),
}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_set_as_in_diffusers(kind, weights) -> None:
    ours = nn.Sequential(nn.Linear(3, 5), nn.Conv2d(2, 2, 1))
    ours.append(nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(5, 5)))))
    ours.append(nn.Sequential(nn.Linear(5, 5)) if kind != "loha" else nn.Linear(5, 5))
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=1, target_modules="0|1|2.0.0.0"), ours, "a")
    if kind == "loha":
        ours.__dict__.pop("peft_config", None)
    KINDS[kind](ours)
    ours.requires_grad_(False)
    stock = copy.deepcopy(ours)
    names, values = WEIGHTS[weights]
    if weights == "blocks" or kind == "loha":  # of which diffusers wants paths of four parts
        values = [0.5 for _ in values]
    peft_utils.set_weights_and_activate_adapters(ours, names, values)
    peft_utils.set_weights_and_activate_adapters.stock(stock, names, values)
    assert state(ours) == state(stock)


def test_weights_of_blocks_are_set_as_in_diffusers(pipeline) -> None:
    states, blocks = [], {"down": 0.5, "mid": 0.2, "up": {"block_1": [0.1, 0.2, 0.3], "block_2": 0.7}}
    for function in ("stock", "__call__"):
        pipe = pipeline()
        for name in ("a", "b"):
            pipe.load_lora_weights(GOLDEN / "sd15" / "lierla.safetensors", adapter_name=name)
        setting = getattr(peft_utils.set_weights_and_activate_adapters, function)
        with pytest.MonkeyPatch.context() as patch:
            for module in ("diffusers.loaders.peft", "diffusers.loaders.lora_base"):
                patch.setattr(f"{module}.set_weights_and_activate_adapters", setting)
            pipe.set_adapters(["a", "b"], [{"unet": blocks, "text_encoder": 0.3}, 0.4])
        states.append([state(pipe.unet), state(pipe.text_encoder)])
    assert states[0] == states[1]


def test_weights_are_set_without_a_search(pipeline, monkeypatch) -> None:
    pipe = pipeline()
    for name in ("a", "b"):
        pipe.load_lora_weights(GOLDEN / "sd15" / "lierla.safetensors", adapter_name=name)
    pipe.set_adapters(["a", "b"], [0.5, 0.2])
    monkeypatch.setattr("lora_adapters.types.found_layers.outer_modules", lambda _: pytest.fail("a search"))
    for method in ("modules", "named_modules", "parameters", "apply"):
        monkeypatch.setattr(nn.Module, method, lambda *_, **__: pytest.fail("a search"))
    pipe.set_adapters(["a", "b"], [0.3, 0.6])


def test_a_compiled_model_follows_the_weights_of_prepared_adapters(pipeline) -> None:
    pipe = pipeline()
    pipe.enable_lora_hotswap(target_rank=8)
    for name in ("a", "b"):
        pipe.load_lora_weights(GOLDEN / "sd15" / "lierla.safetensors", adapter_name=name)
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap

    prepare_model_for_compiled_hotswap(pipe.unet, target_rank=8)
    layer = next(layer for layer in pipe.unet.modules() if isinstance(layer, BaseTunerLayer))
    counter = CompileCounter()
    compiled = torch.compile(layer, backend=counter)
    x = torch.randn(2, 4, layer.in_features) if layer.base_layer.weight.ndim == 2 else None
    x = torch.randn(1, layer.in_features, 4, 4) if x is None else x
    with torch.no_grad():
        for weights in ([1, 1], [0.5, 0.2], [0.1, 2], [0, 1]):
            pipe.set_adapters(["a", "b"], weights)
            torch.testing.assert_close(compiled(x), layer(x))
    assert counter.frame_count == 1


def test_modules_that_imported_the_functions_before_have_them_too() -> None:
    code = """
import diffusers.models.unets.unet_2d_condition, diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion as one
stock = one.unscale_lora_layers
import lora_adapters
from diffusers.utils import peft_utils, unscale_lora_layers
assert one.unscale_lora_layers is unscale_lora_layers is peft_utils.unscale_lora_layers is not stock
assert unscale_lora_layers.stock is stock
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("weights", "line"),
    [
        ({"dwon": 0.5}, r"unknown 'dwon' in the weights of an adapter; did you mean 'down'?"),
        ({"down": {"blok_1": 0.5}}, r"unknown 'blok_1' in the weights of an adapter's down; did you mean 'block_1'"),
        ({"up": {"block_9": 0.5}}, r"unknown 'block_9' in the weights of an adapter's up; known names are block_0, "),
        ({"mid": "half"}, r"the weight of an adapter's mid is 'half', which is not a number"),
        ({"down": None}, r"the weight of an adapter's down is None, which is not a number"),
        ({"up": {"block_1": [0.5, "1"]}}, r"the weight of an adapter's up\.block_1 is '1', which is not a number"),
        ({"sideways": 1}, r"unknown 'sideways' in the weights of an adapter; known names are down, mid, up"),
    ],
)
def test_a_misspelt_block_is_named(weights, line, pipeline) -> None:
    pipe = pipeline()
    pipe.load_lora_weights(GOLDEN / "sd15" / "lierla.safetensors", adapter_name="a")
    pipe.set_adapters(["a"], [0.6])
    before = scalings(pipe)
    with pytest.raises(AdapterError, match=line):
        pipe.set_adapters(["a"], [{"unet": weights}])
    assert scalings(pipe) == before
    pipe.set_adapters(["a"], [{"unet": {"down": 0.5, "up": {"block_1": 0.2}}}])
    assert set(scalings(pipe)) != set(before)
