"""Flux.1: a transformer of double blocks (separate weights for image and text) and single blocks, with CLIP-L and T5.

Source of the original names: black-forest-labs/flux; of XLabs': XLabs-AI/x-flux.
"""

from .blocks import StackBlocks
from .family import Component, Marks, ModelFamily, Version
from .text_encoder import TextEncoder
from .transformer import COMFY_CLIP_L, T5, T5_NAMES, Stack, Table, Transformer, fused, swapped

IMAGE_ATTENTION = fused("attn.to_q", "attn.to_k", "attn.to_v")
TEXT_ATTENTION = fused("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
DOUBLE: Table = {
    "img_attn.qkv": IMAGE_ATTENTION,
    "img_attn.proj": "attn.to_out.0",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_attn.qkv": TEXT_ATTENTION,
    "txt_attn.proj": "attn.to_add_out",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
SINGLE: Table = {
    "linear1": fused("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", square=3, others=4),
    "linear2": "proj_out",
}
# XLabs' names: attention processors, which only adapt q, k, v and the output projection.
DOUBLE_PROCESSORS: Table = {
    "processor.qkv_lora1": IMAGE_ATTENTION,
    "processor.proj_lora1": "attn.to_out.0",
    "processor.qkv_lora2": TEXT_ATTENTION,
    "processor.proj_lora2": "attn.to_add_out",
}
SINGLE_PROCESSORS: Table = {"processor.qkv_lora": IMAGE_ATTENTION, "processor.proj_lora": "proj_out"}
DOUBLE_NORMS = {
    "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
    "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
    "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
    "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
}
SINGLE_NORMS = {"norm.query_norm.scale": "attn.norm_q.weight", "norm.key_norm.scale": "attn.norm_k.weight"}
_MODULATION = {"img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear"}
IN_OUT: Table = {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"}


def embedder(original: str, path: str) -> dict[str, str]:
    """The names of the two layers of an embedding MLP."""
    return {f"{original}.in_layer": f"{path}.linear_1", f"{original}.out_layer": f"{path}.linear_2"}


_TRANSFORMER = Transformer(
    stacks=(
        Stack(
            "double_blocks",
            "transformer_blocks",
            19,
            "D",
            {**DOUBLE, **_MODULATION},
            aliases=DOUBLE_PROCESSORS,
            norms=DOUBLE_NORMS,
        ),
        Stack(
            "single_blocks",
            "single_transformer_blocks",
            38,
            "S",
            {**SINGLE, "modulation.lin": "norm.linear"},
            aliases=SINGLE_PROCESSORS,
            norms=SINGLE_NORMS,
        ),
    ),
    outer={
        **IN_OUT,
        **embedder("time_in", "time_text_embed.timestep_embedder"),
        **embedder("vector_in", "time_text_embed.text_embedder"),
        **embedder("guidance_in", "time_text_embed.guidance_embedder"),
        "final_layer.adaLN_modulation.1": swapped("norm_out.linear"),
    },
)

_LIST = ("CLIP", "T5", "IN", *(label for label in StackBlocks(_TRANSFORMER.stacks).labels if label), "OUT")

FLUX = ModelFamily(
    name="flux",
    title="Flux.1",
    versions=(
        Version(
            title="Flux.1",
            long_title="Flux.1",
            value="flux1",
            modelspec="flux-1-dev",
            resolution="1024x1024",
            repository="black-forest-labs/FLUX.1-dev",
            text_width=4096,
            prediction=None,
        ),
    ),
    metadata=("flux1", "flux_kontext", "flux_dev", "flux_schnell"),
    components=(
        _TRANSFORMER.denoiser(),
        Component(
            *("text_encoder", "text_encoder", "lora_te1", TextEncoder(clip=(COMFY_CLIP_L,))),
            others=(COMFY_CLIP_L, "clip_l."),
        ),
        Component("text_encoder_2", "text_encoder", "lora_te3", T5, others=(*T5_NAMES, "lora_te2_")),
    ),
    blocks=StackBlocks(_TRANSFORMER.stacks, (_LIST,), {"text_encoder": "CLIP", "text_encoder_2": "T5"}),
    coverage=_TRANSFORMER.coverage(),
    part_of=_TRANSFORMER.part_of,
    kind_of=_TRANSFORMER.kind_of,
    marks=Marks(
        tensors=_TRANSFORMER.marks("vector_in.", "double_blocks.0.img_mod."),
        widths=frozenset({3072}),
        classes=("FluxTransformer2DModel",),
        mixins=("FluxLoraLoaderMixin",),
        keys=("transformer_blocks.0.norm1_context.linear.", "time_text_embed.text_embedder."),
    ),
    formats=frozenset({"kohya", "diffusers", "peft"}),
    implementation="https://github.com/black-forest-labs/flux",
    network_module="networks.lora_flux",
    options={},
    tag="flux",
    single_file="FluxPipeline",
    vae_prefix="vae.",
)
