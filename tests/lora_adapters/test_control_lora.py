"""Control LoRAs of Flux.1 in Black Forest Labs' names: a wider input, norms in place of the model's, biases."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxControlPipeline, FluxTransformer2DModel

import lora_adapters  # noqa: F401

WIDTH, HEAD, CHANNELS = 3072, 128, 64


def control_lora(rank: int = 2) -> dict[str, torch.Tensor]:
    """The layout of FLUX.1-Canny-dev-lora: pairs with biases for all layers, an input of 128 channels, all norms."""
    layers = {"img_in": (WIDTH, 2 * CHANNELS), "txt_in": (WIDTH, 4096)}
    for name, width in (("time_in", 256), ("vector_in", 768), ("guidance_in", 256)):
        layers |= {f"{name}.in_layer": (WIDTH, width), f"{name}.out_layer": (WIDTH, WIDTH)}
    layers |= {"final_layer.linear": (CHANNELS, WIDTH), "final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH)}
    norms = []
    for block in range(19):
        for stream in ("img", "txt"):
            start = f"double_blocks.{block}.{stream}"
            layers |= {f"{start}_attn.qkv": (3 * WIDTH, WIDTH), f"{start}_attn.proj": (WIDTH, WIDTH)}
            layers |= {f"{start}_mlp.0": (4 * WIDTH, WIDTH), f"{start}_mlp.2": (WIDTH, 4 * WIDTH)}
            layers |= {f"{start}_mod.lin": (6 * WIDTH, WIDTH)}
            norms += [f"{start}_attn.norm.{part}_norm.scale" for part in ("query", "key")]
    for block in range(38):
        start = f"single_blocks.{block}"
        layers |= {f"{start}.linear1": (7 * WIDTH, WIDTH), f"{start}.linear2": (WIDTH, 5 * WIDTH)}
        layers |= {f"{start}.modulation.lin": (3 * WIDTH, WIDTH)}
        norms += [f"{start}.norm.{part}_norm.scale" for part in ("query", "key")]
    tensors = {name: torch.ones(HEAD) for name in norms}
    for name, (out, into) in layers.items():
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = (
            torch.ones(rank, into),
            torch.ones(out, rank),
        )
        tensors[f"{name}.lora_B.bias"] = torch.ones(out)
    return tensors


@pytest.mark.slow
def test_it_is_loaded_whole_by_diffusers() -> None:
    """On weights without memory: diffusers' conversion knows Flux.1's own sizes only."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)
    absent = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = FluxControlPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=transformer, **absent)
    pipe.load_lora_weights(control_lora(), adapter_name="control")
    linear = {name: layer for name, layer in transformer.named_modules() if hasattr(layer, "lora_B")}
    assert len(linear) == 2 + 6 + 2 + 19 * 14 + 38 * 6  # q, k, v and MLP are layers of their own
    assert all(layer.lora_B["control"].bias is not None for layer in linear.values())
    assert transformer.x_embedder.in_features == transformer.config.in_channels == 2 * CHANNELS
