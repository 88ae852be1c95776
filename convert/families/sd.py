"""Stable Diffusion 1.x and 2.x: one U-Net, and one text encoder of CLIP's (1.x) or open_clip's (2.x)."""

from .blocks import Blocks
from .family import Component, Marks, ModelFamily, Version
from .text_encoder import TextEncoder
from .unet import COVERAGE, OUTER, PREFIX, SIZE, UNet, kind_of, part_of

_UNET = UNet((1, 1, 1, 0), 1, {path: name for path, name in OUTER.items() if path not in SIZE})
_TEXT_ENCODER = TextEncoder(
    clip=("cond_stage_model.transformer.", "conditioner.embedders.0.transformer."),
    open_clip=("cond_stage_model.model.",),
    unused_layer=23,
)

SD = ModelFamily(
    name="sd",
    title="SD",
    versions=(
        Version(
            title="SD1.x",
            long_title="Stable Diffusion 1.x",
            value="sd_v1",
            modelspec="stable-diffusion-v1",
            resolution="512x512",
            repository="stable-diffusion-v1-5/stable-diffusion-v1-5",
            text_width=768,
            projections="conv1x1",
        ),
        Version(
            title="SD2.x",
            long_title="Stable Diffusion 2.x",
            value="sd_v2",
            modelspec="stable-diffusion-v2-512",
            resolution="512x512",
            repository="stabilityai/stable-diffusion-2-1-base",
            text_width=1024,
        ),
        Version(
            title="SD2.x",
            long_title="Stable Diffusion 2.x, v-prediction",
            value="sd_v2_v",
            modelspec="stable-diffusion-v2-768-v",
            resolution="768x768",
            repository="stabilityai/stable-diffusion-2-1",
            text_width=1024,
            prediction="v",
        ),
    ),
    metadata=("sd_v1", "sd_v2"),
    components=(
        Component("unet", "denoiser", "lora_unet", _UNET, original=_UNET.original_name),
        Component("text_encoder", "text_encoder", "lora_te", _TEXT_ENCODER),
    ),
    blocks=Blocks(
        sides=(12, 1, 12),
        with_attention=(
            *("IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "MID"),
            *(f"OUT{number:02d}" for number in range(3, 12)),
        ),
        presets={  # the blocks with factor 1, the others have factor 0; from the extension's DEF_WEIGHT_PRESET
            "INS": "BASE IN01 IN02 IN04",
            "IND": "BASE IN05 IN07 IN08",
            "INALL": "BASE IN01-IN08",
            "MIDD": "BASE IN05-OUT06",
            "OUTD": "BASE OUT03-OUT06",
            "OUTS": "BASE OUT07-OUT11",
            "OUTALL": "BASE OUT03-OUT11",
        },
    ),
    coverage=COVERAGE,
    part_of=part_of,
    kind_of=kind_of,
    marks=Marks(tensors=(f"{PREFIX}input_blocks.1.1.",)),  # attention at full size
    formats=frozenset({"kohya", "diffusers", "peft", "cloneofsimo"}),
    implementation="diffusers",
    options={"v2": "sd_v2", "v_parameterization": "sd_v2"},
    tag="stable-diffusion",
    single_file="StableDiffusionPipeline",
)
