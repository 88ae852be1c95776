"""Pipelines of the tiny golden models: copied for each test from models that are loaded once."""

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.hooks import apply_group_offloading
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

GOLDEN = Path(__file__).parent.parent / "golden"


def _groups_are_offloaded() -> bool:
    """Whether diffusers' group offloading works here; old versions need an accelerator even if it is not used."""
    try:
        apply_group_offloading(nn.Linear(1, 1), *[torch.device("cpu")] * 2, offload_type="leaf_level")
    except AttributeError:
        return False
    return hasattr(DiffusionPipeline, "enable_group_offload")


needs_groups = pytest.mark.skipif(not _groups_are_offloaded(), reason="diffusers is too old to offload groups here")


@cache
def _parts(folder):
    encoders = [CLIPTextModel.from_pretrained(folder / "text_encoder")]
    if (folder / "text_encoder_2").is_dir():
        encoders.append(CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2"))
    return UNet2DConditionModel.from_pretrained(folder / "unet"), encoders


def make_pipeline(name="sd15"):
    unet, encoders = copy.deepcopy(_parts(GOLDEN / name))
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    if len(encoders) == 2:
        return StableDiffusionXLPipeline(
            vae, *encoders, None, None, unet, EulerDiscreteScheduler(), add_watermarker=False
        )
    return StableDiffusionPipeline(
        vae, encoders[0], None, unet, DDIMScheduler(), None, None, requires_safety_checker=False
    )


@pytest.fixture
def pipeline():
    return make_pipeline


@cache
def expected(name):
    return load_file(GOLDEN / name / "expected.safetensors")
