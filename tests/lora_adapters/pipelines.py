"""Tiny Stable Diffusion pipelines that support LoRA, with random weights, and how each is called."""

import copy
import inspect
from functools import cache
from pathlib import Path

import diffusers
import torch
from diffusers import ControlNetModel, DiffusionPipeline
from PIL import Image

from lora_adapters import Adapter, C3LierConfig, DyLoraConfig, LierLaConfig, add_adapter
from tests.train.conftest import build_sd1, build_sdxl

SD = ("StableDiffusion", "StableDiffusionImg2Img", "StableDiffusionInpaint", "StableDiffusionControlNet")
SDXL = ("StableDiffusionXL", "StableDiffusionXLImg2Img", "StableDiffusionXLInpaint", "StableDiffusionXLControlNet")
KINDS = SD + SDXL
IMAGE = Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 20).convert("RGB")
MASK = Image.linear_gradient("L").resize((64, 64)).point(lambda value: 255 * (value > 128))
ADAPTERS = {
    "style": (C3LierConfig(r=4, lora_alpha=2, conv_dim=2, conv_alpha=3), LierLaConfig(r=3, lora_alpha=3)),
    "dial": (
        DyLoraConfig(r=4, lora_alpha=4, unit=2, conv_dim=4, conv_alpha=2),
        DyLoraConfig(r=4, lora_alpha=2, unit=2),
    ),
}


@cache
def _components(architecture: str, folder: Path) -> dict:
    build = build_sdxl if architecture == "sdxl" else build_sd1
    pipe = DiffusionPipeline.from_pretrained(build(folder / architecture), torch_dtype=torch.float32)
    parts = pipe.components
    torch.manual_seed(1)
    parts["controlnet"] = ControlNetModel.from_unet(parts["unet"], conditioning_channels=3)
    with torch.no_grad():  # else its zero convolutions would have no effect
        for part in (*parts["controlnet"].controlnet_down_blocks, parts["controlnet"].controlnet_mid_block):
            part.weight.normal_(std=0.1)
    return parts


def architecture(kind: str) -> str:
    return "sdxl" if "XL" in kind else "sd"


def make(kind: str, folder: Path) -> DiffusionPipeline:
    """A pipeline with its own copy of the weights."""
    parts = copy.deepcopy(_components(architecture(kind), folder))
    if "ControlNet" not in kind:
        del parts["controlnet"]
    cls = getattr(diffusers, f"{kind}Pipeline")
    options = {"add_watermarker": False} if "XL" in kind else {"requires_safety_checker": False}
    wanted = inspect.signature(cls.__init__).parameters
    known = {key: value for key, value in parts.items() if key in wanted}
    pipe = cls(**known, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def latents_of(pipe: DiffusionPipeline, **options) -> torch.Tensor:
    """The latents of an image after two or three steps; deterministic."""
    kind = type(pipe).__name__
    if "Img2Img" in kind:
        options |= {"image": IMAGE, "strength": 0.8}
    elif "Inpaint" in kind:
        options |= {"image": IMAGE, "mask_image": MASK, "strength": 0.8, "height": 64, "width": 64}
    elif "ControlNet" in kind:
        options |= {"image": IMAGE, "height": 64, "width": 64}
    else:
        options |= {"height": 64, "width": 64}
    return pipe(
        "a red disc on white",
        num_inference_steps=3,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        **options,
    ).images


def models(pipe: DiffusionPipeline) -> dict:
    names = ("unet", "text_encoder", "text_encoder_2")
    return {name: getattr(pipe, name) for name in names if getattr(pipe, name, None) is not None}


def state(pipe: DiffusionPipeline) -> dict:
    return {
        f"{part}.{key}": one.clone() for part, model in models(pipe).items() for key, one in model.state_dict().items()
    }


@cache
def adapter(name: str, arch: str, folder: Path) -> Adapter:
    """One of ADAPTERS with random weights, as an `Adapter`."""
    pipe = make("StableDiffusionXL" if arch == "sdxl" else "StableDiffusion", folder)
    torch.manual_seed(len(name))
    unet, text = ADAPTERS[name]
    with torch.no_grad():
        for part, model in models(pipe).items():
            add_adapter(model, unet if part == "unet" else text, "new")
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(std=0.2)
    return Adapter.from_pipeline(pipe, "new")


@torch.no_grad()
def add_to_weights(pipe: DiffusionPipeline, change: Adapter, weight: float = 1.0) -> None:
    """Add weight times the adapter's delta to the pipeline's weights, without PEFT."""
    for module, pair in change.modules.items():
        model = models(pipe)[module.component]
        path = module.path if hasattr(model, "text_model") else module.path.removeprefix("text_model.")
        base = model.get_submodule(path).weight
        base += weight * pair.delta().reshape(base.shape)


def by_hand(kind: str, folder: Path, *changes: tuple[Adapter, float]) -> torch.Tensor:
    """The latents of a pipeline with the adapters' deltas merged into its weights."""
    pipe = make(kind, folder)
    for one, weight in changes:
        add_to_weights(pipe, one, weight)
    return latents_of(pipe)
