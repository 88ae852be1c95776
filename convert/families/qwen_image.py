"""Qwen-Image: a transformer of double blocks, for which all programs use diffusers' names."""

from .blocks import StackBlocks
from .family import Marks, ModelFamily, Version
from .transformer import Stack, Transformer

_BLOCK = [
    *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    *(f"{stream}_mlp.net.{layer}" for stream in ("img", "txt") for layer in ("0.proj", "2")),
    *("img_mod.1", "txt_mod.1"),
]
_OUTER = [
    *("img_in", "txt_in", "proj_out", "norm_out.linear"),
    *(f"time_text_embed.timestep_embedder.linear_{number}" for number in (1, 2)),
]
_TRANSFORMER = Transformer(
    stacks=(
        Stack(
            "transformer_blocks",
            "transformer_blocks",
            60,
            "B",
            {name: name for name in _BLOCK},
            outer=("img_mod.", "txt_mod."),
        ),
    ),
    outer={name: name for name in _OUTER},
)

QWEN_IMAGE = ModelFamily(
    name="qwen_image",
    title="Qwen-Image",
    versions=(
        Version(
            title="Qwen-Image",
            long_title="Qwen-Image",
            value="qwen_image",
            modelspec="Qwen-Image",
            resolution="1328x1328",
            repository="Qwen/Qwen-Image",
            text_width=3584,
            prediction=None,
        ),
    ),
    metadata=("qwen_image", "qwen-image"),
    components=(_TRANSFORMER.denoiser(kohya_original=False),),
    blocks=StackBlocks(_TRANSFORMER.stacks),
    coverage=_TRANSFORMER.coverage(),
    part_of=_TRANSFORMER.part_of,
    kind_of=_TRANSFORMER.kind_of,
    marks=Marks(
        tensors=_TRANSFORMER.marks("transformer_blocks.0.img_mod.1."),
        widths=frozenset({3072}),
        classes=("QwenImageTransformer2DModel",),
        mixins=("QwenImageLoraLoaderMixin",),
        keys=("transformer_blocks.0.img_mod.1.",),
    ),
    formats=frozenset({"kohya", "diffusers", "peft"}),
    implementation="https://github.com/QwenLM/Qwen-Image",
    network_module="networks.lora_qwen_image",
    options={},
    tag="qwen-image",
)
