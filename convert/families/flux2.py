"""Flux.2: double and single blocks like Flux.1, with gated feed-forward layers, and modulation outside of the blocks.

Source of the original names: black-forest-labs/flux2.
"""

from .blocks import StackBlocks
from .family import Marks, ModelFamily, Version
from .flux import DOUBLE, IN_OUT, embedder
from .transformer import Stack, Table, Transformer, swapped

_DOUBLE: Table = {
    **DOUBLE,
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
}
_SINGLE: Table = {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"}
_MODULATIONS = ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
_TRANSFORMER = Transformer(
    stacks=(
        Stack("double_blocks", "transformer_blocks", 8, "D", _DOUBLE),
        Stack("single_blocks", "single_transformer_blocks", 48, "S", _SINGLE),
    ),
    outer={
        **IN_OUT,
        **embedder("time_in", "time_guidance_embed.timestep_embedder"),
        **embedder("guidance_in", "time_guidance_embed.guidance_embedder"),
        **{f"{name}.lin": f"{name}.linear" for name in _MODULATIONS},
        "final_layer.adaLN_modulation.1": swapped("norm_out.linear"),
    },
)


def _is_own_width(name: str, out_in: tuple[int, int]) -> bool:
    """Whether a layer has the size of a gated MLP, unlike Flux.1 and Chroma, whose MLPs are 4 times as wide."""
    out, width = out_in
    if name.endswith("linear1"):
        return out != 7 * width
    if name.endswith("linear2"):
        return width != 5 * out
    if name.endswith(("img_mlp_2", "txt_mlp_2")):
        return width != 4 * out
    return name.endswith(("img_mlp_0", "txt_mlp_0")) and out != 4 * width


FLUX2 = ModelFamily(
    name="flux2",
    title="Flux.2",
    versions=(
        Version(
            title="Flux.2",
            long_title="Flux.2",
            value="flux_2_dev",
            modelspec="Flux.2-dev",
            resolution="1024x1024",
            repository="black-forest-labs/FLUX.2-dev",
            text_width=15360,
            prediction=None,
        ),
    ),
    metadata=("flux_2", "flux2"),
    components=(_TRANSFORMER.denoiser(),),
    blocks=StackBlocks(_TRANSFORMER.stacks),
    coverage=_TRANSFORMER.coverage(),
    part_of=_TRANSFORMER.part_of,
    kind_of=_TRANSFORMER.kind_of,
    marks=Marks(
        tensors=_TRANSFORMER.marks("double_stream_modulation_img."),
        widths=frozenset({3072, 4096, 6144}),
        classes=("Flux2Transformer2DModel",),
        mixins=("Flux2LoraLoaderMixin",),
        keys=("double_stream_modulation_img.",),
        width=_is_own_width,
    ),
    formats=frozenset({"kohya", "diffusers", "peft"}),
    implementation="https://github.com/black-forest-labs/flux2",
    network_module="networks.lora_flux_2",
    options={},
    tag="flux-2",
)
