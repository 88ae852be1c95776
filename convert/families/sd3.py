"""Stable Diffusion 3 and 3.5: a transformer of joint blocks, and three text encoders: CLIP-L, CLIP-G and T5.

Source of the original names: Stability-AI/sd3.5.
"""

from .blocks import StackBlocks
from .family import Component, Marks, ModelFamily, Version
from .text_encoder import TextEncoder
from .transformer import COMFY_CLIP_G, COMFY_CLIP_L, T5, T5_NAMES, Stack, Table, Transformer, fused, swapped

_BLOCK: Table = {
    "x_block.attn.qkv": fused("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn2.qkv": fused("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "x_block.adaLN_modulation.1": "norm1.linear",
    "context_block.attn.qkv": fused("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
    "context_block.adaLN_modulation.1": swapped("norm1_context.linear"),  # the last block has 2 rows for each column
}
_OUTER: Table = {
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": swapped("norm_out.linear"),
}
_NORMS = {
    f"{block}.ln_{one}.weight": f"{path}_{one}.weight"
    for block, path in (
        ("x_block.attn", "attn.norm"),
        ("context_block.attn", "attn.norm_added"),
        ("x_block.attn2", "attn2.norm"),
    )
    for one in "qk"
}
_TRANSFORMER = Transformer(
    stacks=(Stack("joint_blocks", "transformer_blocks", 38, "J", _BLOCK, norms=_NORMS),),
    outer=_OUTER,
    convolutions=frozenset({"pos_embed.proj"}),
    tensors={"pos_embed": "pos_embed.pos_embed"},
)


def _version(title: str, value: str, model: str) -> Version:
    return Version(
        title=title,
        long_title=f"Stable Diffusion {model.replace('-', ' ')}",
        value=value,
        modelspec=f"stable-diffusion-{model}",
        resolution="1024x1024",
        repository=f"stabilityai/stable-diffusion-{model}",
        text_width=4096,
        prediction=None,
    )


SD3 = ModelFamily(
    name="sd3",
    title="SD3",
    versions=(
        _version("SD3", "medium", "3-medium"),
        _version("SD3.5 medium", "5-medium", "3.5-medium")._replace(
            modelspec="stable-diffusion-5-medium", mark="transformer_blocks.0.attn2.to_q"
        ),
        _version("SD3.5 large", "5-large", "3.5-large")._replace(
            modelspec="stable-diffusion-5-large", mark="transformer_blocks.37.attn.to_q"
        ),
    ),
    metadata=("sd3", "medium", "large", "3-", "3.5-", "5-"),
    components=(
        _TRANSFORMER.denoiser(),
        Component(
            *("text_encoder", "text_encoder", "lora_te1", TextEncoder(clip=(COMFY_CLIP_L,))),
            others=(COMFY_CLIP_L, "clip_l."),
        ),
        Component(
            *("text_encoder_2", "text_encoder", "lora_te2", TextEncoder(clip=(COMFY_CLIP_G,), projection=True)),
            others=(COMFY_CLIP_G, "clip_g."),
        ),
        Component("text_encoder_3", "text_encoder", "lora_te3", T5, others=T5_NAMES),
    ),
    blocks=StackBlocks(_TRANSFORMER.stacks),
    coverage=_TRANSFORMER.coverage(),
    part_of=_TRANSFORMER.part_of,
    kind_of=_TRANSFORMER.kind_of,
    marks=Marks(
        tensors=_TRANSFORMER.marks("joint_blocks."),
        widths=frozenset({1536, 2432}),
        classes=("SD3Transformer2DModel",),
        mixins=("SD3LoraLoaderMixin",),
        components=("text_encoder_3",),
    ),
    formats=frozenset({"kohya", "diffusers", "peft"}),
    implementation="diffusers",
    network_module="networks.lora_sd3",
    options={},
    tag="stable-diffusion-3",
    single_file="StableDiffusion3Pipeline",
)
