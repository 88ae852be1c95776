"""Pipelines of the tiny golden models, made anew for each test from models that are read once."""

import copy
from functools import cache
from pathlib import Path

import pytest
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

GOLDEN = Path(__file__).parent.parent / "golden"


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
