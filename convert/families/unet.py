"""The layers of Stable Diffusion's U-Nets: paths in diffusers, names in the original code, adapted parts.

Source of the original names: CompVis/stable-diffusion and Stability-AI/generative-models.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from .blocks import LAYER
from .family import Coverage, Kind
from .tensor_slice import TensorSlice

PREFIX = "model.diffusion_model."  # the prefix of tensor names in original checkpoints
_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
# The suffixes of layers next to a normalisation layer, and the suffix of that normalisation layer.
_NORMS = (
    (".conv1", ".norm1"),
    (".conv2", ".norm2"),
    (".proj_in", ".norm"),
    (".attn1.to_q", ".norm1"),
    (".attn2.to_q", ".norm2"),
    (".ff.net.2", ".norm3"),
)
_RESNET_NORMS = {"norm1": "in_layers.0", "norm2": "out_layers.0"}
_NORM_OUT = {"conv_norm_out": "out.0"}
TIME = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
SIZE = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}  # SDXL and its refiner
# Layers outside of the blocks: LyCORIS and OneTrainer adapt them, kohya's trainer does not.
OUTER = {"conv_in": "input_blocks.0.0", "conv_out": "out.2", **TIME, **SIZE}

_PARTS = {
    "attention": frozenset({"Transformer2DModel"}),
    "resnet": frozenset({"ResnetBlock2D"}),
    "sampler": frozenset({"Downsample2D", "Upsample2D"}),
    "text": frozenset({"CLIPAttention", "CLIPSdpaAttention", "CLIPMLP"}),
}


def _coverage(title: str, *parts: str, large_convolutions: bool) -> Coverage:
    return Coverage(title, parts, frozenset(name for part in parts for name in _PARTS[part]), large_convolutions)


COVERAGE = {
    "lierla": _coverage("LierLa", "attention", "text", large_convolutions=False),
    "c3lier": _coverage("C3Lier", "attention", "resnet", "sampler", "text", large_convolutions=True),
}


def part_of(path: str) -> str:
    """The part of a U-Net that contains a layer: attention, resnet, sampler, or outer (outside of the blocks)."""
    match = LAYER.fullmatch(path)
    if match is None:
        return "outer"
    return {"attentions": "attention", "resnets": "resnet"}.get(match[3], "sampler")


def kind_of(path: str) -> Kind:
    """The kind of a layer. For proj_in and proj_out, which are linear in some versions, see `Version.projections`."""
    if path.endswith((".proj_in", ".proj_out", ".conv_shortcut")):
        return "conv1x1"
    return "conv3x3" if path.endswith((".conv1", ".conv2", ".conv")) or path in ("conv_in", "conv_out") else "linear"


class UNet(NamedTuple):
    """A U-Net with two layers in each block.

    Attributes:
        down_depths: The number of transformer layers in the attention of each down block; 0 without attention.
        mid_depth: The same for the middle block.
        outer: The layers outside of the blocks: the name in the original code by the path in diffusers.
    """

    down_depths: tuple[int, ...]
    mid_depth: int
    outer: Mapping[str, str]

    def paths(self) -> Iterator[str]:
        """The path of each layer that an adapter can change."""
        last = len(self.down_depths) - 1
        halves = (("down", 2, self.down_depths, "downsamplers"), ("up", 3, self.down_depths[::-1], "upsamplers"))
        for half, layers, depths, sampler in halves:
            for block, depth in enumerate(depths):
                prefix = f"{half}_blocks.{block}"
                for layer in range(layers):
                    yield from (f"{prefix}.resnets.{layer}.{part}" for part in _RESNET)
                    if depth:
                        yield from _transformer(f"{prefix}.attentions.{layer}", depth)
                if block != last:
                    yield f"{prefix}.{sampler}.0.conv"
        yield from (f"mid_block.resnets.{layer}.{part}" for layer in (0, 1) for part in _RESNET)
        yield from _transformer("mid_block.attentions.0", self.mid_depth)
        yield from self.outer

    def norms(self) -> Iterator[str]:
        """The path of each normalisation layer."""
        for path in self.paths():
            yield from (path.removesuffix(end) + norm for end, norm in _NORMS if path.endswith(end))
        yield from _NORM_OUT

    def original_name(self, path: str) -> str:
        """The dotted name of a layer in Stability's and CompVis' original code (`input_blocks.4.1...`)."""
        up_depths = self.down_depths[::-1]
        name = original_name(path, [str(block) for block, depth in enumerate(up_depths) if not depth])
        assert name, path
        return name

    def slices(self, path: str) -> tuple[TensorSlice, ...]:
        """The possible places of a layer's weight in an original checkpoint."""
        return (TensorSlice(f"{PREFIX}{self.original_name(path)}.weight"),)


def _transformer(prefix: str, depth: int) -> Iterator[str]:
    yield from (f"{prefix}.proj_in", f"{prefix}.proj_out")
    for layer in (f"{prefix}.transformer_blocks.{index}" for index in range(depth)):
        yield from (f"{layer}.{a}.{to}" for a in ("attn1", "attn2") for to in ("to_q", "to_k", "to_v", "to_out.0"))
        yield from (f"{layer}.ff.net.0.proj", f"{layer}.ff.net.2")


def original_name(path: str, without_attention: Collection[str], layers: int = 2) -> str | None:
    """The name of a layer of a U-Net in the original code.

    Args:
        path: The path of the layer in diffusers.
        without_attention: The numbers of the up blocks without attention.
        layers: The number of layers of a block.

    Returns:
        The name; None for a layer that the original code does not have.
    """
    if path in OUTER or path in _NORM_OUT:
        return {**OUTER, **_NORM_OUT}[path]
    match = LAYER.fullmatch(path)
    if match is None or (match[2] is None and match[1] != "mid"):
        return None
    half, block, kind, layer, rest = match.groups()
    if half == "mid":
        place = f"middle_block.{2 * int(layer) if kind == 'resnets' else 1}"
    elif kind == "downsamplers":
        return f"input_blocks.{(layers + 1) * (1 + int(block))}.0.op"
    elif kind == "upsamplers":
        number = 1 if block in without_attention else 2  # it follows the attention
        return f"output_blocks.{layers + (layers + 1) * int(block)}.{number}.conv"
    else:
        first = "input_blocks" if half == "down" else "output_blocks"
        index = (1 if half == "down" else 0) + (layers + 1) * int(block) + int(layer)
        place = f"{first}.{index}.{0 if kind == 'resnets' else 1}"
    rest = {**_RESNET, **_RESNET_NORMS}.get(rest, "") if kind == "resnets" else rest
    return f"{place}.{rest}" if rest else None
