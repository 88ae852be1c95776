"""Lumina-Image 2: a transformer with refiners of image and text before its layers, and Gemma as its text encoder.

Source of the original names: Alpha-VLLM/Lumina-Image-2.0.
"""

from .blocks import StackBlocks
from .family import Component, Marks, ModelFamily, Version
from .transformer import LANGUAGE_MODEL, Stack, Table, Transformer, fused

_BLOCK: Table = {
    "attention.qkv": fused("attn.to_q", "attn.to_k", "attn.to_v", square=1),
    "attention.out": "attn.to_out.0",
    **{f"feed_forward.w{number}": f"feed_forward.linear_{number}" for number in (1, 2, 3)},
}
_MODULATED: Table = {**_BLOCK, "adaLN_modulation.1": "norm1.linear"}
_TRANSFORMER = Transformer(
    stacks=(
        Stack("layers", "layers", 26, "L", _MODULATED),
        Stack("noise_refiner", "noise_refiner", 2, "N", _MODULATED),
        Stack("context_refiner", "context_refiner", 2, "C", _BLOCK),
    ),
    outer={
        "x_embedder": "x_embedder",
        "cap_embedder.1": "time_caption_embed.caption_embedder.1",
        "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
        "final_layer.adaLN_modulation.1": "norm_out.linear_1",
        "final_layer.linear": "norm_out.linear_2",
    },
    adapted=("norm_out.",),
)

LUMINA2 = ModelFamily(
    name="lumina2",
    title="Lumina2",
    versions=(
        Version(
            title="Lumina2",
            long_title="Lumina-Image 2",
            value="lumina2",
            modelspec="lumina-2",
            resolution="1024x1024",
            repository="Alpha-VLLM/Lumina-Image-2.0",
            text_width=2304,
            prediction=None,
        ),
    ),
    metadata=("lumina2",),
    components=(
        _TRANSFORMER.denoiser(),
        Component(
            *("text_encoder", "text_encoder", "lora_te", LANGUAGE_MODEL),
            others=("lora_te1_", "text_encoders.gemma2_2b.transformer.model."),
        ),
    ),
    blocks=StackBlocks(_TRANSFORMER.stacks),
    coverage=_TRANSFORMER.coverage("Gemma2Attention", "Gemma2MLP"),
    part_of=_TRANSFORMER.part_of,
    kind_of=_TRANSFORMER.kind_of,
    marks=Marks(
        tensors=_TRANSFORMER.marks("layers.0.adaLN_modulation.1."),
        widths=frozenset({2304}),
        classes=("Lumina2Transformer2DModel",),
        mixins=("Lumina2LoraLoaderMixin",),
        keys=("time_caption_embed.",),
    ),
    formats=frozenset({"kohya", "diffusers", "peft"}),
    implementation="https://github.com/Alpha-VLLM/Lumina-Image-2.0",
    network_module="networks.lora_lumina",
    options={},
    tag="lumina",
)
