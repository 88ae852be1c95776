"""Modules that no table has, found in the models that do: flat names, the original code's, other text encoders'."""

import copy

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline
from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

from lora_adapters.live_names import LiveNames

from .test_pipeline_classes import built, text_config, unet2d


def pairs(pipe, names, tmp_path):
    """A file with a pair for each module, under the name that it is given; {(component, path): what is to be found}."""
    torch.manual_seed(2)
    tensors, wanted = {}, {}
    for name, (component, path) in names.items():
        weight = getattr(pipe, component).get_submodule(path).weight
        extra = (1, 1) if weight.ndim == 4 else ()
        down, up = torch.randn(2, *weight.shape[1:]), torch.randn(weight.shape[0], 2, *extra)
        ends = (
            ("lora_down.weight", "lora_up.weight") if name.startswith("lora_") else ("lora_A.weight", "lora_B.weight")
        )
        tensors |= {f"{name}.{ends[0]}": down, f"{name}.{ends[1]}": up}
        wanted[component, path] = (down, up)
    save_file(tensors, tmp_path / "live.safetensors")
    return tmp_path / "live.safetensors", wanted


def refiner():
    """The refiner's layout: four levels, attention in the two in the middle, four layers deep."""
    blocks = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
    unet = unet2d(
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=2,
        down_block_types=blocks,
        up_block_types=[block.replace("Down", "Up") for block in blocks],
        transformer_layers_per_block=4,
        attention_head_dim=2,
    )
    two = CLIPTextModelWithProjection(text_config(projection_dim=16))
    return StableDiffusionXLImg2ImgPipeline(None, None, two, None, None, unet, None, add_watermarker=False)


def deep_floyd():
    pipe = copy.deepcopy(built("IFPipeline"))
    t5 = T5EncoderModel(T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    pipe.register_modules(text_encoder=t5)
    return pipe


BLOCK = "transformer_blocks"
MOTION = f"down_blocks.0.motion_modules.0.{BLOCK}.0.attn1.to_q"
CASES = {
    "refiner": (
        refiner,
        {
            f"lora_unet_input_blocks_4_1_{BLOCK}_3_attn1_to_q": f"down_blocks.1.attentions.0.{BLOCK}.3.attn1.to_q",
            "lora_unet_input_blocks_9_0_op": "down_blocks.2.downsamplers.0.conv",
            "lora_unet_input_blocks_11_0_in_layers_2": "down_blocks.3.resnets.1.conv1",
            f"lora_unet_middle_block_1_{BLOCK}_3_ff_net_2": f"mid_block.attentions.0.{BLOCK}.3.ff.net.2",
            "lora_unet_output_blocks_2_1_conv": "up_blocks.0.upsamplers.0.conv",
            "lora_unet_output_blocks_3_1_proj_in": "up_blocks.1.attentions.0.proj_in",
            "lora_unet_output_blocks_5_2_conv": "up_blocks.1.upsamplers.0.conv",
            f"lora_unet_up_blocks_2_attentions_1_{BLOCK}_2_ff_net_2": f"up_blocks.2.attentions.1.{BLOCK}.2.ff.net.2",
        },
    ),
    "AnimateDiff": (
        lambda: built("AnimateDiffPipeline"),
        {
            f"lora_unet_{MOTION.replace('.', '_')}": MOTION,
            "unet.up_blocks.1.motion_modules.0.proj_out": "up_blocks.1.motion_modules.0.proj_out",
        },
    ),
    "x4 upscaler": (
        lambda: built("StableDiffusionUpscalePipeline"),
        {"lora_unet_conv_in": "conv_in", "lora_unet_mid_block_resnets_0_conv1": "mid_block.resnets.0.conv1"},
    ),
    "text to video": (
        lambda: built("TextToVideoSDPipeline"),
        {"unet.down_blocks.0.temp_attentions.0.proj_in": "down_blocks.0.temp_attentions.0.proj_in"},
    ),
    "DeepFloyd's T5": (
        deep_floyd,
        {
            "text_encoder.encoder.block.0.layer.0.SelfAttention.q": "encoder.block.0.layer.0.SelfAttention.q",
            "lora_te_encoder_block_0_layer_1_DenseReluDense_wo": "encoder.block.0.layer.1.DenseReluDense.wo",
            "lora_unet_add_embedding_proj": "add_embedding.proj",
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_names_are_looked_up_in_the_live_model(case, tmp_path) -> None:
    make, names = CASES[case]
    pipe = copy.deepcopy(make())
    text = ("text_encoder", "lora_te_")
    names = {name: ("text_encoder" if name.startswith(text) else "unet", path) for name, path in names.items()}
    one_format = [{k: v for k, v in names.items() if k.startswith("lora_") == flat} for flat in (True, False)]
    for number, part in enumerate(filter(None, one_format)):
        file, wanted = pairs(pipe, part, tmp_path)
        pipe.load_lora_weights(file, adapter_name=f"a{number}", strict=True)
        for (component, path), (down, up) in wanted.items():
            layer = getattr(pipe, component).get_submodule(path)
            assert torch.equal(layer.lora_A[f"a{number}"].weight, down)
            assert torch.equal(layer.lora_B[f"a{number}"].weight, up)


class Twins(nn.Module):
    """Two modules of the same flat name."""

    def __init__(self):
        super().__init__()
        self.a_b = nn.Linear(2, 2)
        self.a = nn.ModuleDict({"b": nn.Linear(2, 2), "c": nn.Linear(2, 2)})


def test_a_flat_name_of_two_modules_stands_for_neither() -> None:
    names = LiveNames({"unet": Twins()})
    assert names("unet", "a_c") == names("unet", "a.c") == "a.c"
    assert names("unet", "a_b") == "a_b"  # not found: as it is
    assert names("text_encoder", "x_y") == "x_y"


def test_layers_that_are_adapted_already_have_their_own_names(pipeline) -> None:
    unet = pipeline().unet
    unet.add_adapter(LoraConfig(target_modules=["to_q"]))
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    assert LiveNames({"unet": unet})("unet", path.replace(".", "_")) == path


def test_models_are_listed_when_a_name_is_in_no_table(pipeline, monkeypatch, tmp_path) -> None:
    from .conftest import GOLDEN

    monkeypatch.setattr("lora_adapters.live_names._by_flat_name", lambda *args: pytest.fail("the model was walked"))
    pipe = pipeline()
    pipe.load_lora_weights(GOLDEN / "sd15" / "c3lier.safetensors")
