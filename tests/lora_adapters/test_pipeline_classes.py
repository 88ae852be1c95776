"""Every pipeline class on diffusers' two mixins for Stable Diffusion: what stock loads is loaded, with the same result.

The models are tiny, of the types that each class is for. The file has layers of all parts of the U-Net (motion modules,
temporal layers, the blocks of upscalers) and of CLIP's text encoders, under the names that the models have.
"""

import copy
import inspect
from contextlib import suppress
from functools import cache

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    Kandinsky3UNet,
    MotionAdapter,
    UNet2DConditionModel,
    UNet3DConditionModel,
)
from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import lora_adapters

assert lora_adapters.__version__  # imported for what it does to diffusers

MIXINS = (StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin)
WITHOUT_SENTENCEPIECE = ("KolorsPipeline", "KolorsImg2ImgPipeline", "KolorsPAGPipeline")  # diffusers hides them
NOT_BUILT = {
    **dict.fromkeys(WITHOUT_SENTENCEPIECE, "its text encoder is ChatGLM, whose tokenizer needs sentencepiece"),
    "PRXPipeline": "it has a transformer and no U-Net: stock finds no component to load into",
    "StableDiffusionXLModularPipeline": "its components are loaded from blocks on the Hub",
    "StableDiffusionControlNetXSPipeline": "it makes a U-Net of its own, of a U-Net and a ControlNet-XS",
    "StableDiffusionXLControlNetXSPipeline": "it makes a U-Net of its own, of a U-Net and a ControlNet-XS",
}
# Classes whose U-Nets lack the method by which diffusers loads: stock fails, and the file's own pairs are to be found.
STOCK_FAILS = ("Kandinsky3Img2ImgPipeline", "Kandinsky3Pipeline", "TextToVideoSDPipeline", "VideoToVideoSDPipeline")
FAST = (
    "AnimateDiffPipeline",
    "AnimateDiffSDXLPipeline",
    "IFPipeline",
    "StableDiffusionUpscalePipeline",
    "TextToVideoSDPipeline",
    "WuerstchenPriorPipeline",
)


def classes() -> list[str]:
    found = []
    for name in dir(diffusers):
        with suppress(
            RuntimeError
        ):  # diffusers 0.35 imports ftfy where it is not installed: none of these is on a mixin
            found.append(getattr(diffusers, name, None))
    taken = [cls for cls in found if inspect.isclass(cls) and issubclass(cls, MIXINS) and cls not in MIXINS]
    return sorted({cls.__name__ for cls in taken})


def unet2d(**options):
    facts = {"sample_size": 8, "block_out_channels": (8, 16), "cross_attention_dim": 16, "attention_head_dim": 2}
    facts |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "norm_num_groups": 4, "layers_per_block": 1}
    facts |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    return UNet2DConditionModel(**facts | options)


def text_config(**options):
    return CLIPTextConfig(
        vocab_size=100, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, **options
    )


def unet_of(name):
    """A U-Net of the type and the options that the class is for."""
    if name.startswith("Kandinsky3"):
        return Kandinsky3UNet(
            groups=4, attention_head_dim=4, layers_per_block=1, block_out_channels=(8, 16, 32, 64),
            cross_attention_dim=16, encoder_hid_dim=16,
        )  # fmt: skip
    if name in ("TextToVideoSDPipeline", "VideoToVideoSDPipeline"):
        return UNet3DConditionModel(
            sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16, norm_num_groups=4,
            attention_head_dim=2, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        )  # fmt: skip
    if issubclass(getattr(diffusers, name), StableDiffusionXLLoraLoaderMixin):
        return unet2d(
            cross_attention_dim=32, use_linear_projection=True, transformer_layers_per_block=(2, 1),
            addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64,
        )  # fmt: skip
    if name.startswith("IF"):
        blocks = {"down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D")}
        blocks |= {"up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D")}
        return unet2d(
            **blocks, mid_block_type="UNetMidBlock2DSimpleCrossAttn", encoder_hid_dim=16, addition_embed_type="text",
            addition_embed_type_num_heads=2, only_cross_attention=True, resnet_time_scale_shift="scale_shift",
        )  # fmt: skip
    if name == "StableDiffusionUpscalePipeline":
        return unet2d(in_channels=7, num_class_embeds=100, only_cross_attention=(True, False))
    if "UnCLIP" in name:
        return unet2d(class_embed_type="projection", projection_class_embeddings_input_dim=16)
    return unet2d()


@cache
def built(name):
    torch.manual_seed(0)
    cls = getattr(diffusers, name)
    wanted = inspect.signature(cls.__init__).parameters
    parts = {
        "vae": lambda: AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
        "unet": lambda: unet_of(name),
        "text_encoder": lambda: CLIPTextModel(text_config()),
        "text_encoder_2": lambda: CLIPTextModelWithProjection(text_config(projection_dim=16)),
        "scheduler": DDIMScheduler,
        "prior": lambda: _wuerstchen()(c_in=2, c=16, c_cond=16, c_r=16, depth=2, nhead=2),
        "motion_adapter": lambda: MotionAdapter(
            block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=4,
            motion_num_attention_heads=2, use_motion_mid_block=False,
        ),
    }  # fmt: skip
    if name == "StableUnCLIPPipeline":  # whose prior is no part that takes an adapter
        del parts["prior"]
    given = {key: parts[key]() if key in parts else None for key, one in wanted.items() if _is_component(key, one)}
    options = {"add_watermarker": False, "requires_safety_checker": False}
    given |= {key: value for key, value in options.items() if key in wanted}
    return cls(**given)


def _wuerstchen():
    """The prior's class, which is in another package of diffusers since it is deprecated."""
    import importlib

    module = importlib.import_module(diffusers.WuerstchenPriorPipeline.__module__)
    return module.WuerstchenPrior


def _is_component(key, parameter) -> bool:
    return key != "self" and (parameter.default is inspect.Parameter.empty or parameter.default is None)


def models(pipe):
    return {name: getattr(pipe, name) for name in pipe._lora_loadable_modules if getattr(pipe, name, None) is not None}


def adapter_of(pipe) -> dict[str, torch.Tensor]:
    """Pairs for every attention's queries and outputs, feed-forward and convolution of the pipeline's models."""
    torch.manual_seed(1)
    tensors = {}
    endings = (
        ".to_q",
        ".to_out.0",
        ".proj_in",
        ".net.2",
        ".conv1",
        ".q_proj",
        ".fc1",
        "attention.attn.to_k",
        ".mapper",
    )
    for component, model in models(pipe).items():
        for path, part in model.named_modules():
            if not isinstance(part, (nn.Linear, nn.Conv2d)) or not path.endswith(endings):
                continue
            if isinstance(part, nn.Conv2d):
                down, up = torch.randn(2, *part.weight.shape[1:]), torch.randn(part.out_channels, 2, 1, 1)
            else:
                down, up = torch.randn(2, part.in_features), torch.randn(part.out_features, 2)
            start = (
                f"{component}.text_model."
                if component.startswith("text") and not path.startswith("text_")
                else f"{component}."
            )
            tensors |= {f"{start}{path}.lora_A.weight": down, f"{start}{path}.lora_B.weight": up}
    assert tensors
    return tensors


def layers(pipe):
    """The pairs of every layer with their scales."""
    found = {}
    for component, model in models(pipe).items():
        for path, part in model.named_modules():
            if isinstance(part, LoraLayer):
                for half in (part.lora_A, part.lora_B):
                    found.setdefault(f"{component}.{path}", []).append(half["a"].weight.detach())
                found[f"{component}.{path}"].append(torch.tensor(part.scaling["a"]))
    return found


def test_every_class_is_here_or_said_to_be_missing() -> None:
    assert len(classes()) >= 60
    hidden = {*WITHOUT_SENTENCEPIECE, *(() if hasattr(diffusers, "PRXPipeline") else ("PRXPipeline",))}  # since 0.36
    assert set(NOT_BUILT) - hidden <= set(classes())
    assert set(FAST) <= set(classes())


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in classes() if name not in NOT_BUILT],
)
def test_what_stock_loads_is_loaded(name, tmp_path) -> None:
    pipe = built(name)
    ours, stock = copy.deepcopy(pipe), copy.deepcopy(pipe)
    tensors = adapter_of(pipe)
    save_file(tensors, tmp_path / "a.safetensors")
    ours.load_lora_weights(tmp_path / "a.safetensors", adapter_name="a", strict=True)
    found = layers(ours)
    assert len(found) == len(tensors) / 2
    for path, (down, up, scale) in found.items():
        component, _, rest = path.partition(".")
        key = path if f"{path}.lora_A.weight" in tensors else f"{component}.text_model.{rest}"
        assert torch.equal(down, tensors[f"{key}.lora_A.weight"])
        assert torch.equal(up, tensors[f"{key}.lora_B.weight"])
        assert scale == 1
    load = type(stock).load_lora_weights.stock
    if name in STOCK_FAILS:
        with pytest.raises(AttributeError, match="load_lora_adapter"):
            load(stock, str(tmp_path), weight_name="a.safetensors", adapter_name="a")
        return
    load(stock, str(tmp_path), weight_name="a.safetensors", adapter_name="a")
    wanted = layers(stock)
    assert wanted.keys() == found.keys()
    for path, parts in wanted.items():
        assert all(torch.equal(one, other) for one, other in zip(parts, found[path], strict=True))
