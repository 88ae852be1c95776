"""Chroma: like Flux.1, but without modulation layers in its blocks and with T5 as its only text encoder.

Source of the original names: lodestone-rock/flow.
"""

from .blocks import StackBlocks
from .family import Component, Marks, ModelFamily, Version
from .flux import DOUBLE, DOUBLE_PROCESSORS, IN_OUT, SINGLE, SINGLE_PROCESSORS
from .transformer import T5, T5_NAMES, Stack, Transformer

_GUIDANCE = "distilled_guidance_layer"
_TRANSFORMER = Transformer(
    stacks=(
        Stack(
            "double_blocks",
            "transformer_blocks",
            19,
            "D",
            DOUBLE,
            aliases=DOUBLE_PROCESSORS,
        ),
        Stack(
            "single_blocks",
            "single_transformer_blocks",
            38,
            "S",
            SINGLE,
            aliases=SINGLE_PROCESSORS,
        ),
    ),
    outer={
        **IN_OUT,
        f"{_GUIDANCE}.in_proj": f"{_GUIDANCE}.in_proj",
        f"{_GUIDANCE}.out_proj": f"{_GUIDANCE}.out_proj",
        **{
            f"{_GUIDANCE}.layers.{number}.{name}": f"{_GUIDANCE}.layers.{number}.{path}"
            for number in range(16)
            for name, path in (("in_layer", "linear_1"), ("out_layer", "linear_2"))
        },
    },
)

CHROMA = ModelFamily(
    name="chroma",
    title="Chroma",
    versions=(
        Version(
            title="Chroma",
            long_title="Chroma",
            value="chroma",
            modelspec="chroma",
            resolution="1024x1024",
            repository="lodestones/Chroma1-HD",
            text_width=4096,
            prediction=None,
        ),
    ),
    metadata=("chroma",),
    components=(
        _TRANSFORMER.denoiser(),
        Component("text_encoder", "text_encoder", "lora_te3", T5, others=("lora_te_", "lora_te1_", *T5_NAMES)),
    ),
    blocks=StackBlocks(_TRANSFORMER.stacks),
    coverage=_TRANSFORMER.coverage(),
    part_of=_TRANSFORMER.part_of,
    kind_of=_TRANSFORMER.kind_of,
    marks=Marks(
        tensors=_TRANSFORMER.marks(f"{_GUIDANCE}."),
        widths=frozenset({3072}),
        classes=("ChromaTransformer2DModel",),
        mixins=("FluxLoraLoaderMixin",),
        keys=(f"{_GUIDANCE}.",),
    ),
    formats=frozenset({"kohya", "diffusers", "peft"}),
    implementation="https://huggingface.co/lodestones/Chroma",
    network_module="networks.lora_flux",
    options={},
    tag="chroma",
    single_file="ChromaPipeline",
)
