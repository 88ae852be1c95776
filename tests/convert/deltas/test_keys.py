"""Keys of whole files, and files that LyCORIS itself writes for a model, against the model with LyCORIS in it."""

import json
import logging
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextModel

from lora_adapters.convert import AdapterError, ModuleName
from lora_adapters.convert.formats.lycoris import group_tensors, read_modules, resolve, split_key

TINY = Path(__file__).parent.parent.parent.parent / "examples" / "tiny-sd"
MID = "mid_block.attentions.0"
TEXT = "text_model.encoder.layers.0"

NAMES = {
    "lora_unet_mid_block_attentions_0_proj_in": ("unet", f"{MID}.proj_in"),
    "lycoris_mid_block_attentions_0_norm": ("unet", f"{MID}.norm"),
    "lora_unet_middle_block_1_transformer_blocks_0_norm2": ("unet", f"{MID}.transformer_blocks.0.norm2"),
    "lora_unet_input_blocks_1_0_in_layers_0": ("unet", "down_blocks.0.resnets.0.norm1"),
    "diffusion_model.input_blocks.1.0.out_layers.0": ("unet", "down_blocks.0.resnets.0.norm2"),
    "diffusion_model.input_blocks.0.0": ("unet", "conv_in"),
    "diffusion_model.out.0": ("unet", "conv_norm_out"),
    "diffusion_model.output_blocks.2.1.conv": ("unet", "up_blocks.0.upsamplers.0.conv"),  # SD1.x
    "diffusion_model.output_blocks.2.2.conv": ("unet", "up_blocks.0.upsamplers.0.conv"),  # SDXL
    "unet.mid_block.attentions.0.proj_in": ("unet", f"{MID}.proj_in"),
    "lora_te_text_model_encoder_layers_0_layer_norm1": ("text_encoder", f"{TEXT}.layer_norm1"),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": ("text_encoder", f"{TEXT}.mlp.fc1"),
    "lora_te2_encoder_layers_0_mlp_fc1": ("text_encoder_2", f"{TEXT}.mlp.fc1"),
    "lora_te2_text_projection": ("text_encoder_2", "text_projection"),
    f"text_encoders.clip_l.transformer.{TEXT}.mlp.fc2": ("text_encoder", f"{TEXT}.mlp.fc2"),
    f"text_encoders.clip_g.transformer.{TEXT}.layer_norm2": ("text_encoder_2", f"{TEXT}.layer_norm2"),
    "text_encoder.text_model.final_layer_norm": ("text_encoder", "text_model.final_layer_norm"),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("suffix", ["lora_up.weight", "alpha", "hada_w1_a", "diff_b", "lora_magnitude_vector"])
def test_split_and_resolve(name, suffix):
    assert split_key(f"{name}.{suffix}") == (name, suffix)
    assert resolve(name) == ModuleName(*NAMES[name])


def test_groups_keep_every_tensor():
    keys = ["lora_unet_conv_in.diff", "lora_unet_conv_in.diff_b", "unet.conv_in.lora_A.weight"]
    groups = group_tensors({key: torch.tensor(float(place)) for place, key in enumerate(keys)})
    assert groups == {"lora_unet_conv_in": {"diff": 0, "diff_b": 1}, "unet.conv_in": {"lora_A.weight": 2}}


def test_every_layer_of_a_model_is_known():
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(TINY, subfolder="unet"))
    paths = [name for name, module in unet.named_modules() if getattr(module, "weight", None) is not None]
    assert len(paths) > 200
    for path in paths:
        assert resolve(f"lora_unet_{path.replace('.', '_')}") == resolve(f"unet.{path}") == ModuleName("unet", path)


def test_what_is_unknown():
    with pytest.raises(AdapterError, match=r"^unknown module lora_unet_mid_block_attentions_0_proj_im; the nearest"):
        resolve("lora_unet_mid_block_attentions_0_proj_im")
    with pytest.raises(AdapterError, match=r"unknown module model_ema.conv_in: names begin with lora_unet_"):
        resolve("model_ema.conv_in")
    with pytest.raises(AdapterError, match=r"first_stage_model.x.scale does not end like a key of a known kind"):
        split_key("first_stage_model.x.scale")
    lookup = {("unet", "motion_modules_0"): "motion_modules.0"}
    assert resolve("lora_unet_motion_modules_0", lambda *name: lookup.get(name)).path == "motion_modules.0"
    with pytest.raises(AdapterError, match="unknown module lora_unet_motion_modules_1"):
        resolve("lora_unet_motion_modules_1", lambda *name: lookup.get(name))


def test_errors_name_the_module():
    with pytest.raises(AdapterError, match=r"^lora_unet_conv_in: a LoHa module lacks hada_w1_b"):
        read_modules({"lora_unet_conv_in.hada_w1_a": torch.ones(2, 2)})
    twice = {"lora_unet_conv_in.diff": torch.ones(2, 2), "unet.conv_in.diff": torch.ones(2, 2)}
    with pytest.raises(AdapterError, match=r"unet.conv_in and another name stand for the same module"):
        read_modules(twice)


# --- whole files ---------------------------------------------------------------------------------------------------

FILES = {
    "locon, Tucker, norms": {"algo": "locon", "conv_dim": 2, "use_tucker": True, "train_norm": True},
    "DoRA over LoHa": {"algo": "loha", "conv_dim": 2, "dora_wd": True, "wd_on_output": False},
    "LoKr": {"algo": "lokr", "factor": 4, "decompose_both": True, "use_scalar": True, "rs_lora": True},
    "full": {"algo": "full"},
    "OFT": {"algo": "diag-oft", "rescaled": True},
    "BOFT": {"algo": "boft", "constraint": 0.01},
    "IA3": {"algo": "ia3"},
    "GLoRA": {"algo": "glora", "rs_lora": True},
}

# Transformers, convolutions and both ends of the U-Net: LyCORIS' own "full" finds time_embedding twice and refuses it.
PRESET = """
unet_target_module = ["Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"]
unet_target_name = ["conv_in", "conv_out"]
text_encoder_target_module = ["CLIPAttention", "CLIPMLP"]
"""


@pytest.fixture(scope="module")
def base():
    """tiny-sd's U-Net and text encoder, float32; to be copied before they are changed."""
    unet = UNet2DConditionModel.from_pretrained(TINY, subfolder="unet")
    return unet.float().eval(), CLIPTextModel.from_pretrained(TINY, subfolder="text_encoder").float().eval()


@torch.no_grad()
def outputs(unet, text_encoder):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, unet.config.in_channels, 8, 8, generator=generator)
    text = text_encoder(torch.randint(0, text_encoder.config.vocab_size, (1, 9), generator=generator))[0]
    return [text, unet(latents, 7, text).sample]


@torch.no_grad()
def merge(modules, components, weight):
    """Add every delta to its module's weight and bias."""
    for module, change in modules.items():
        model = components[module.component]
        known = dict(model.named_modules())
        layer = known.get(module.path) or known[module.path.removeprefix("text_model.")]  # as transformers 5 has it
        assert isinstance(layer, nn.Linear | nn.Conv2d | nn.LayerNorm | nn.GroupNorm)
        scaled = change.scaled(weight)
        difference = scaled.bias()
        layer.weight += scaled.delta(layer.weight)
        if difference is not None:
            layer.bias += difference


@pytest.mark.parametrize("file", FILES)
def test_a_file_of_lycoris_merged(file, base, tmp_path):
    kohya = pytest.importorskip("lycoris.kohya")
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    torch.manual_seed(0)
    adapted = deepcopy(base)
    preset = tmp_path / "preset.toml"
    preset.write_text(PRESET)
    network = kohya.create_network(1.0, 8, 4.0, None, adapted[1], adapted[0], preset=str(preset), **FILES[file])
    network.apply_to(adapted[1], adapted[0], True, True)
    network.eval()
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    network.save_weights(str(tmp_path / "a.safetensors"), torch.float32, {})
    metadata = {"ss_network_args": json.dumps({key: str(value) for key, value in FILES[file].items()})}
    modules = read_modules(load_file(tmp_path / "a.safetensors"), metadata)
    assert len(modules) == len(network.unet_loras) + len(network.text_encoder_loras) > 20

    before = outputs(*base)
    for weight in (1.0, 0.6):
        network.set_multiplier(weight)
        merged = deepcopy(base)
        merge(modules, dict(zip(("unet", "text_encoder"), merged, strict=True)), weight)
        for got, wanted, plain in zip(outputs(*merged), outputs(*adapted), before, strict=True):
            change = float((wanted - plain).norm())
            assert change > 0.01 * float(plain.norm())
            assert float((got - wanted).norm()) < 1e-4 * change
