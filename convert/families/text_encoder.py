"""The layers of CLIP text encoders: their paths in transformers, and their tensors in original checkpoints.

Checkpoints use the layout of transformers (`text_model.encoder.layers.0...`) or of open_clip (`resblocks.0...`), where
q, k and v are one tensor and the projection is transposed.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from .names import TEXT_PROJECTION
from .tensor_slice import Share, TensorSlice

LAYERS = 32  # in the deepest one, SDXL's second; SD1.x has 12, SD2.x uses 23
_LAYER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.(.+)")
_OPEN_CLIP = {
    "self_attn.q_proj": ("attn.in_proj_weight", Share(0, 1, 3)),
    "self_attn.k_proj": ("attn.in_proj_weight", Share(1, 2, 3)),
    "self_attn.v_proj": ("attn.in_proj_weight", Share(2, 3, 3)),
    "self_attn.out_proj": ("attn.out_proj.weight", None),
    "mlp.fc1": ("mlp.c_fc.weight", None),
    "mlp.fc2": ("mlp.c_proj.weight", None),
    "layer_norm1": ("ln_1.weight", None),
    "layer_norm2": ("ln_2.weight", None),
}
_LAST_NORM = "text_model.final_layer_norm"


def layer_paths() -> Iterator[str]:
    """The paths of all layers of the deepest text encoder, block by block, without `text_projection`."""
    for layer in (f"text_model.encoder.layers.{index}" for index in range(LAYERS)):
        yield from (f"{layer}.self_attn.{part}_proj" for part in ("q", "k", "v", "out"))
        yield from (f"{layer}.mlp.{part}" for part in ("fc1", "fc2"))


class TextEncoder(NamedTuple):
    """A text encoder in original checkpoints.

    Attributes:
        clip: The prefixes of its tensors' names in the layout of transformers; the first is used for writing.
        open_clip: The same in the layout of open_clip.
        projection: Whether it has a `text_projection`.
        unused_layer: The last layer in open_clip's files, if the pipeline does not use it.
    """

    clip: tuple[str, ...] = ()
    open_clip: tuple[str, ...] = ()
    projection: bool = False
    unused_layer: int | None = None

    def paths(self) -> Iterator[str]:
        """The path of each layer that an adapter can change."""
        yield from layer_paths()
        if self.projection:
            yield TEXT_PROJECTION

    def norms(self) -> Iterator[str]:
        """The path of each normalisation layer."""
        for layer in (f"text_model.encoder.layers.{index}" for index in range(LAYERS)):
            yield from (f"{layer}.layer_norm1", f"{layer}.layer_norm2")
        yield _LAST_NORM

    def slices(self, path: str) -> tuple[TensorSlice, ...]:
        """The possible places of a layer's weight in an original checkpoint."""
        if path == TEXT_PROJECTION:
            return tuple(TensorSlice(f"{start}text_projection", transposed=True) for start in self.open_clip)
        inner = path.removeprefix("text_model.")
        slices = [TensorSlice(f"{start}{spelled}.weight") for start in self.clip for spelled in (path, inner)]
        if path == _LAST_NORM:
            return (*slices, *(TensorSlice(f"{start}ln_final.weight") for start in self.open_clip))
        match = _LAYER.fullmatch(path)
        assert match, path
        part, rows = _OPEN_CLIP[match[2]]
        slices += [TensorSlice(f"{start}transformer.resblocks.{match[1]}.{part}", rows) for start in self.open_clip]
        return tuple(slices)

    def is_unused(self, path: str, place: TensorSlice) -> bool:
        """Whether a layer that was found at a place is the unused layer."""
        in_open_clip = place.key.startswith(self.open_clip)
        return in_open_clip and self.unused_layer is not None and f".layers.{self.unused_layer}." in path
