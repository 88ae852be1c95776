"""Weights of adapters for one call and for single blocks, as diffusers takes them."""

import subprocess
import sys

import pytest
import torch
from diffusers.utils import peft_utils
from peft import LoHaConfig, LoraConfig, inject_adapter_in_model
from torch import nn

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
        ({"up": {"block_9": 0.5}}, r"unknown 'block_9' in the weights of an adapter's up; there are block_0, "),
        ({"mid": "half"}, r"the weight of an adapter's mid is 'half', which is not a number"),
        ({"down": None}, r"the weight of an adapter's down is None, which is not a number"),
        ({"up": {"block_1": [0.5, "1"]}}, r"the weight of an adapter's up\.block_1 is '1', which is not a number"),
        ({"sideways": 1}, r"unknown 'sideways' in the weights of an adapter; there are down, mid, up"),
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
