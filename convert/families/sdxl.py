"""Stable Diffusion XL: a U-Net conditioned on the image size, and two text encoders, CLIP's and open_clip's."""

from .blocks import Blocks
from .family import Component, Kind, Marks, ModelFamily, Version
from .text_encoder import TextEncoder
from .unet import COVERAGE, OUTER, PREFIX, UNet, part_of
from .unet import kind_of as unet_kind_of

_UNET = UNet((0, 2, 10), 10, OUTER)
_TEXT_WIDTH = 2048  # the concatenated outputs of both text encoders
# The numbers of output channels of the up blocks are 1280, 640, 320 in SDXL, and 1280, 1280, 640, 320 in SD.
_UP_WIDTHS = {"up_blocks.1": 640, "up_blocks.2": 320}


def _is_own_width(path: str, out_in: tuple[int, int]) -> bool:
    """Whether the size of a U-Net layer occurs only in SDXL, not in SD1.x and SD2.x, which have the layer too."""
    if path.endswith((".attn2.to_k", ".attn2.to_v")):
        return out_in[1] == _TEXT_WIDTH
    wide = _UP_WIDTHS.get(path[:11])
    return wide == out_in[0] and path.endswith((".conv1", ".conv2", ".proj_in", ".to_q", ".to_out.0"))


def _kind_of(path: str) -> Kind:
    return "linear" if path.endswith((".proj_in", ".proj_out")) else unet_kind_of(path)


SDXL = ModelFamily(
    name="sdxl",
    title="SDXL",
    versions=(
        Version(
            title="SDXL",
            long_title="Stable Diffusion XL",
            value="sdxl_base_v1-0",
            modelspec="stable-diffusion-xl-v1-base",
            resolution="1024x1024",
            repository="stabilityai/stable-diffusion-xl-base-1.0",
            text_width=_TEXT_WIDTH,
        ),
    ),
    metadata=("sdxl",),
    components=(
        Component("unet", "denoiser", "lora_unet", _UNET, original=_UNET.original_name, kohya_original=True),
        Component(
            "text_encoder", "text_encoder", "lora_te1", TextEncoder(clip=("conditioner.embedders.0.transformer.",))
        ),
        Component(
            "text_encoder_2",
            "text_encoder",
            "lora_te2",
            TextEncoder(open_clip=("conditioner.embedders.1.model.",), projection=True),
        ),
    ),
    blocks=Blocks(
        sides=(9, 3, 9),
        with_attention=("IN04", "IN05", "IN07", "IN08", "MID", *(f"OUT{number:02d}" for number in range(6))),
        outer=1,
    ),
    coverage=COVERAGE,
    part_of=part_of,
    kind_of=_kind_of,
    marks=Marks(
        tensors=("conditioner.embedders.", f"{PREFIX}label_emb."),
        components=("text_encoder_2",),
        keys=("add_embedding.",),
        config=(("addition_embed_type", "text_time"),),
        kohya=(
            *("lora_te1_", "lora_te2_"),
            *("lora_unet_input_blocks_", "lora_unet_middle_block_", "lora_unet_output_blocks_"),
        ),
        width=_is_own_width,
    ),
    formats=frozenset({"kohya", "diffusers", "peft"}),
    implementation="https://github.com/Stability-AI/generative-models",
    options={"sdxl": "sdxl"},
    tag="stable-diffusion-xl",
    single_file="StableDiffusionXLPipeline",
    marks_v_prediction=True,
)
