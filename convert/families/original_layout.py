"""Mapping the tensors of a Diffusers folder to the original Stable Diffusion layout.

A single-file checkpoint uses the names and shapes of CompVis' and Stability's original code:

U-Net                  model.diffusion_model.input_blocks.1.1...
VAE                    first_stage_model.encoder.down.0.block.0...; the attention's matrices are 1x1 convolutions
text encoder of SD1.x  cond_stage_model.transformer.text_model...
text encoder of SD2.x  cond_stage_model.model.transformer.resblocks.0... (open_clip: q, k and v are one tensor)
SDXL's text encoders   conditioner.embedders.0.transformer.text_model..., conditioner.embedders.1.model...

Source of the names: CompVis/stable-diffusion, Stability-AI/generative-models and open_clip; diffusers'
`from_single_file` reads them back.
"""

import re
from collections.abc import Collection
from typing import Literal, NamedTuple

from lora_adapters.convert.errors import AdapterError

from .blocks import LAYER
from .unet import PREFIX

VAE = "first_stage_model."

_LAYERS = {"down": 2, "mid": 2, "up": 3}  # ResNets in a block of the original U-Net
_UNET_OUTER = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "class_embedding.linear_1": "label_emb.0.0",
    "class_embedding.linear_2": "label_emb.0.2",
    "class_embedding": "label_emb",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_BLOCK = re.compile(
    r"(encoder|decoder)\.(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)
_VAE_ATTENTION = {  # older folders use the second spelling
    "group_norm": "norm",
    "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
    "query": "q", "key": "k", "value": "v", "proj_attn": "proj_out",
}  # fmt: skip
_OPEN_CLIP_OUTER = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_OPEN_CLIP_BLOCK = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


Form = Literal["same", "stacked", "conv", "transposed", "swapped"]


class Origin(NamedTuple):
    """The source of a tensor of the original layout.

    Attributes:
        keys: The keys of the folder's tensors.
        form: The transformation: "same" (a single tensor, unchanged); "stacked" (concatenated along the rows); "conv"
            (a matrix as a 1x1 convolution); "transposed"; "swapped" (the two halves of the rows are swapped).
    """

    keys: tuple[str, ...]
    form: Form = "same"


def _unknown(key: str, what: str) -> AdapterError:
    return AdapterError(f"{key} of the {what} has no name in the original layout: write a Diffusers folder instead")


def unet_origins(keys: Collection[str]) -> dict[str, Origin]:
    """The sources of a U-Net's tensors by original name; AdapterError unless the architecture is SD's or SDXL's."""
    attended = {key.split(".")[1] for key in keys if key.startswith("up_blocks.") and ".attentions." in key}
    return {f"{PREFIX}{_unet_name(key, attended)}": Origin((key,)) for key in keys}


def _unet_name(key: str, attended: Collection[str]) -> str:
    module, _, end = key.rpartition(".")
    if module in _UNET_OUTER:
        return f"{_UNET_OUTER[module]}.{end}"
    match = LAYER.fullmatch(key)
    if match is None:
        raise _unknown(key, "U-Net")
    half, block, kind, layer, rest = match.groups()
    if int(layer) >= (_LAYERS[half] if kind in ("resnets", "attentions") else 1):
        raise _unknown(key, "U-Net")
    if half == "mid":
        place = f"middle_block.{2 * int(layer) if kind == 'resnets' else 1}"
    elif kind == "downsamplers":
        return f"input_blocks.{3 * int(block) + 3}.0.{rest.replace('conv', 'op')}"
    elif kind == "upsamplers":  # after the attention, if the block has attention
        return f"output_blocks.{3 * int(block) + 2}.{2 if block in attended else 1}.{rest}"
    else:
        first, index = ("input_blocks", 1) if half == "down" else ("output_blocks", 0)
        place = f"{first}.{3 * int(block) + int(layer) + index}.{0 if kind == 'resnets' else 1}"
    if kind == "attentions":
        return f"{place}.{rest}"
    part, _, end = rest.rpartition(".")
    if part not in _UNET_RESNET:
        raise _unknown(key, "U-Net")
    return f"{place}.{_UNET_RESNET[part]}.{end}"


def vae_origins(keys: Collection[str]) -> dict[str, Origin]:
    """The sources of a VAE's tensors by original name; AdapterError for another architecture."""
    ups = 1 + max((int(key.split(".")[2]) for key in keys if key.startswith("decoder.up_blocks.")), default=-1)
    made = {}
    for key in keys:
        name = _vae_name(key, ups)
        matrix = ".attn_1." in name and name.endswith(".weight") and ".norm." not in name
        made[VAE + name] = Origin((key,), "conv" if matrix else "same")
    return made


def _vae_name(key: str, ups: int) -> str:
    match = _VAE_BLOCK.fullmatch(key)
    if match is None:
        outer = key.replace("conv_norm_out", "norm_out")
        if not re.fullmatch(
            r"((encoder|decoder)\.(conv_in|conv_out|norm_out)|(post_)?quant_conv)\.(weight|bias)", outer
        ):
            raise _unknown(key, "VAE")
        return outer
    half, direction, block, kind, layer, rest = match.groups()
    part, _, end = rest.rpartition(".")
    if kind == "attentions":
        if direction != "mid" or layer != "0" or part not in _VAE_ATTENTION:
            raise _unknown(key, "VAE")
        return f"{half}.mid.attn_1.{_VAE_ATTENTION[part]}.{end}"
    if direction == "mid":
        place = f"{half}.mid.block_{int(layer) + 1}"
    else:
        number = int(block) if direction == "down" else ups - 1 - int(block)
        place = f"{half}.{direction}.{number}"
        if kind != "resnets":
            return f"{place}.{'downsample' if direction == 'down' else 'upsample'}.{rest}"
        place = f"{place}.block.{layer}"
    return f"{place}.{part.replace('conv_shortcut', 'nin_shortcut')}.{end}"


def _inner(key: str) -> str:
    """A text encoder's key without `text_model.`, which newer versions of transformers omit."""
    return key.removeprefix("text_model.")


def clip_origins(keys: Collection[str], prefix: str) -> dict[str, Origin]:
    """The sources of a CLIP text encoder's tensors (SD1.x, SDXL's first) by original name."""
    return {f"{prefix}text_model.{_inner(key)}": Origin((key,)) for key in keys}


def open_clip_origins(keys: Collection[str], prefix: str) -> dict[str, Origin]:
    """The sources of an open_clip text encoder's tensors (SD2.x, SDXL's second) by original name.

    Args:
        keys: The names of its tensors in the Diffusers folder.
        prefix: The prefix of its names in the original checkpoint.

    Returns:
        The source of each tensor, by the name in the original checkpoint.

    Raises:
        AdapterError: A tensor belongs to a text encoder of another architecture.
    """
    made: dict[str, Origin] = {}
    for key in keys:
        inner = _inner(key)
        match = _OPEN_CLIP_BLOCK.fullmatch(inner)
        if inner in _OPEN_CLIP_OUTER:
            made[prefix + _OPEN_CLIP_OUTER[inner]] = Origin((key,))
        elif inner == "text_projection.weight":
            made[f"{prefix}text_projection"] = Origin((key,), "transposed")
        elif inner == "embeddings.position_ids":  # the buffer 0 to 76, which only transformers has
            continue
        elif match is None:
            raise _unknown(key, "text encoder")
        else:
            layer, part, end = match.groups()
            name, origin = _open_clip_layer(key, layer, part, end, keys)
            made[prefix + name] = origin
    return made


def _open_clip_layer(key: str, layer: str, part: str, end: str, keys: Collection[str]) -> tuple[str, Origin]:
    block = f"transformer.resblocks.{layer}"
    if part in _OPEN_CLIP_LAYER:
        return f"{block}.{_OPEN_CLIP_LAYER[part]}.{end}", Origin((key,))
    if part not in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        raise _unknown(key, "text encoder")
    stacked = tuple(key.replace(part, f"self_attn.{letter}_proj") for letter in "qkv")
    missing = [name for name in stacked if name not in keys]
    if missing:
        raise AdapterError(f"the text encoder has {key}, but no {missing[0]}")
    return f"{block}.attn.in_proj_{end}", Origin(stacked, "stacked")
