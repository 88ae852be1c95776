"""Z-Image: a transformer with refiners of image and text before its layers.

diffusers uses the names of the original code, except for the attention, which ComfyUI's files fuse.
"""

from .blocks import StackBlocks
from .family import Marks, ModelFamily, Version
from .transformer import Stack, Table, Transformer, fused

_BLOCK: Table = {
    "attention.qkv": fused("attention.to_q", "attention.to_k", "attention.to_v", square=1),
    "attention.out": "attention.to_out.0",
    **{f"feed_forward.w{number}": f"feed_forward.w{number}" for number in (1, 2, 3)},
}
_MODULATED: Table = {**_BLOCK, "adaLN_modulation.0": "adaLN_modulation.0"}
_FINAL = "all_final_layer.2-1"
_TRANSFORMER = Transformer(
    stacks=(
        Stack("layers", "layers", 30, "L", _MODULATED, outer=("adaLN_modulation",)),
        Stack("noise_refiner", "noise_refiner", 2, "N", _MODULATED, outer=("",)),
        Stack("context_refiner", "context_refiner", 2, "C", _BLOCK, outer=("",)),
    ),
    outer={
        "x_embedder": "all_x_embedder.2-1",
        "cap_embedder.1": "cap_embedder.1",
        "t_embedder.mlp.0": "t_embedder.mlp.0",
        "t_embedder.mlp.2": "t_embedder.mlp.2",
        "final_layer.linear": f"{_FINAL}.linear",
        "final_layer.adaLN_modulation.1": f"{_FINAL}.adaLN_modulation.1",
    },
)


def _is_own_width(name: str, out_in: tuple[int, int]) -> bool:
    """Whether q, k and v have the same number of rows, unlike in Lumina2."""
    return name.endswith("attention_qkv") and out_in[0] == 3 * out_in[1]


ZIMAGE = ModelFamily(
    name="zimage",
    title="Z-Image",
    versions=(
        Version(
            title="Z-Image",
            long_title="Z-Image",
            value="z_image",
            modelspec="Z-Image",
            resolution="1024x1024",
            repository="Tongyi-MAI/Z-Image",
            text_width=2560,
            prediction=None,
        ),
    ),
    metadata=("z_image", "zimage"),
    components=(_TRANSFORMER.denoiser(kohya_original=False),),
    blocks=StackBlocks(_TRANSFORMER.stacks),
    coverage=_TRANSFORMER.coverage(),
    part_of=_TRANSFORMER.part_of,
    kind_of=_TRANSFORMER.kind_of,
    marks=Marks(
        tensors=_TRANSFORMER.marks("layers.0.adaLN_modulation.0."),
        widths=frozenset({3840}),
        classes=("ZImageTransformer2DModel",),
        mixins=("ZImageLoraLoaderMixin",),
        keys=("all_x_embedder.",),
        width=_is_own_width,
    ),
    formats=frozenset({"kohya", "diffusers", "peft"}),
    implementation="https://github.com/Tongyi-MAI/Z-Image",
    network_module="networks.lora_zimage",
    options={},
    tag="z-image",
    single_file="ZImagePipeline",
)
