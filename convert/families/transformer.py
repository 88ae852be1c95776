"""The layers of diffusion transformers: paths in diffusers, names in the original code, which fuses some layers.

A fused layer of the original code consists of several layers of diffusers, concatenated along the rows: `img_attn.qkv`
is to_q, to_k and to_v. The number of rows of each follows from the shape of the layer, see `tensor_slice.Part`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import NamedTuple

from .family import Component, Coverage, Kind
from .tensor_slice import Part, TensorSlice
from .unet import PREFIX

_NAMED = 64  # the number of blocks of each stack in the tables of names: more than any model has
_TEXT_CLASSES = (
    "CLIPAttention",
    "CLIPSdpaAttention",
    "CLIPMLP",
    "T5Attention",
    "T5DenseGatedActDense",
    "T5DenseActDense",
)


class Fused(NamedTuple):
    """A layer of the original code and the layers of diffusers that it consists of.

    Attributes:
        paths: The paths of diffusers' layers, in the order of the rows.
        square: The number of first layers with as many rows as input channels; the others share the rest equally.
        others: The rows of each other layer divided by the input channels, if all models agree; otherwise 0.
        swapped: Whether diffusers swaps the two halves of the rows; see `TensorSlice.placed`.
    """

    paths: tuple[str, ...]
    square: int = 0
    others: int = 0
    swapped: bool = False

    def part(self, index: int) -> Part | None:
        """The rows of the layer with this index; None for all rows."""
        return Part(index, len(self.paths), self.square) if len(self.paths) > 1 else None

    def below(self, prefix: str) -> "Fused":
        """The same layer with a prefix added to the paths."""
        return self._replace(paths=tuple(f"{prefix}.{path}" for path in self.paths))


def fused(*paths: str, square: int = 0, others: int = 0) -> Fused:
    """A layer that consists of several layers of diffusers."""
    return Fused(paths, square, others)


def swapped(path: str) -> Fused:
    """A layer whose shift and scale are swapped in diffusers."""
    return Fused((path,), swapped=True)


Table = Mapping[str, str | Fused]  # diffusers' path (or paths) of each layer, by the name in the original code


def _entries(table: Table) -> Iterator[tuple[str, Fused]]:
    for name, target in table.items():
        yield name, target if isinstance(target, Fused) else Fused((target,))


class Stack(NamedTuple):
    """A stack of blocks of the same kind.

    Attributes:
        original: The name of the list of blocks in the original code.
        path: The name of the list of blocks in diffusers.
        depth: The number of blocks in the largest model.
        letter: The first letter of the blocks' labels.
        layers: The layers of each block.
        aliases: Other names of layers in files.
        outer: Prefixes of paths in a block that no adapter type adapts.
        norms: Tensors of a block that belong to no layer: diffusers' complete name by the original code's.
    """

    original: str
    path: str
    depth: int
    letter: str
    layers: Table
    aliases: Table = MappingProxyType({})
    outer: tuple[str, ...] = ()
    norms: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, eq=False, repr=False)
class Transformer:
    """A diffusion transformer.

    Attributes:
        stacks: The stacks of blocks.
        outer: The layers outside of the blocks.
        prefixes: The possible prefixes of tensor names in original checkpoints.
        convolutions: The paths of convolutions.
        adapted: Prefixes of paths outside of the blocks that kohya's trainer adapts too.
        tensors: The tensors outside of the blocks that belong to no layer, like `Stack.norms`.
    """

    stacks: tuple[Stack, ...]
    outer: Table
    prefixes: tuple[str, ...] = ("", PREFIX)
    convolutions: frozenset[str] = frozenset()
    adapted: tuple[str, ...] = ()
    tensors: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def originals(self) -> Mapping[str, Fused]:
        """The layers of diffusers for each layer of the original code."""
        targets = dict(_entries(self.outer))
        for stack in self.stacks:
            for number in range(_NAMED):
                for name, target in _entries(stack.layers):
                    targets[f"{stack.original}.{number}.{name}"] = target.below(f"{stack.path}.{number}")
        return targets

    @cached_property
    def aliases(self) -> Mapping[str, Fused]:
        """The layers of diffusers for other names that occur in files."""
        return {
            f"{stack.original}.{number}.{name}": target.below(f"{stack.path}.{number}")
            for stack in self.stacks
            for number in range(_NAMED)
            for name, target in _entries(stack.aliases)
        }

    @cached_property
    def _places(self) -> Mapping[str, TensorSlice]:
        """The layer of the original code, and the part of it, for each path in diffusers."""
        return {
            path: TensorSlice(name, target.part(index), swapped=target.swapped)
            for name, target in self.originals.items()
            for index, path in enumerate(target.paths)
        }

    @cached_property
    def single_tensors(self) -> Mapping[str, str]:
        """The tensors that belong to no layer: the name in the original code by the name in diffusers."""
        found = {path: name for name, path in self.tensors.items()}
        for stack in self.stacks:
            for number in range(_NAMED):
                for name, path in stack.norms.items():
                    found[f"{stack.path}.{number}.{path}"] = f"{stack.original}.{number}.{name}"
        return found

    def place(self, path: str) -> TensorSlice | None:
        """The place of a layer's weight in an original checkpoint without prefix; None if the path is not a layer."""
        place = self._places.get(path)
        return None if place is None else place._replace(key=f"{place.key}.weight")

    def paths(self) -> Iterator[str]:
        """The path of each layer that an adapter can change."""
        return iter(self._places)

    def norms(self) -> Iterator[str]:
        """Empty: adapters for these models do not change normalisation layers."""
        return iter(())

    def original_name(self, path: str) -> str:
        """The dotted name of a layer in the original code, or of the fused layer that contains it."""
        place = self._places.get(path)
        return path if place is None else place.key

    def slices(self, path: str) -> tuple[TensorSlice, ...]:
        """The possible places of a layer's weight in an original checkpoint."""
        place = self._places[path]
        return tuple(place._replace(key=f"{prefix}{place.key}.weight") for prefix in self.prefixes)

    def marks(self, *names: str) -> tuple[str, ...]:
        """Prefixes of tensor names in original checkpoints, combined with each of `prefixes`."""
        return tuple(f"{prefix}{name}" for name in names for prefix in self.prefixes)

    def part_of(self, path: str) -> str:
        """The part of the model that contains a layer: block or outer."""
        for stack in self.stacks:
            if path.startswith(f"{stack.path}."):
                inner = path.split(".", 2)[2]
                return "outer" if inner.startswith(stack.outer) and stack.outer else "block"
        return "block" if self.adapted and path.startswith(self.adapted) else "outer"

    def kind_of(self, path: str) -> Kind:
        """The kind of layer: linear, except for the convolutions."""
        return "conv3x3" if path in self.convolutions else "linear"

    def denoiser(self, kohya_original: bool = True) -> Component:
        """The component for this transformer; `kohya_original`: whether kohya's trainer writes the original names."""
        return Component(
            *("transformer", "denoiser", "lora_unet", self), original=self.original_name, kohya_original=kohya_original
        )

    def coverage(self, *text_classes: str) -> dict[str, Coverage]:
        """The layers that kohya's trainers adapt: all linear layers of the blocks and of the text encoders.

        Args:
            *text_classes: Classes of the text encoders' modules whose layers are adapted; by default CLIP's and T5's.

        Returns:
            The coverage of each adapter type.
        """
        containers = frozenset(text_classes or _TEXT_CLASSES)
        return {
            "lierla": Coverage("LierLa", ("block", "text"), containers, large_convolutions=False),
            "c3lier": Coverage("C3Lier", ("block", "text"), containers, large_convolutions=True),
        }


class Encoder(NamedTuple):
    """A text encoder of transformers that is a single stack of blocks: T5 or a language model.

    Attributes:
        pattern: The path of a block, with {} for its number.
        names: The names of the layers in a block.
        prefixes: The possible prefixes of tensor names in original checkpoints.
    """

    pattern: str
    names: tuple[str, ...]
    prefixes: tuple[str, ...] = ()

    def paths(self) -> Iterator[str]:
        """The path of each layer that an adapter can change."""
        return (f"{self.pattern.format(number)}.{name}" for number in range(_NAMED) for name in self.names)

    def norms(self) -> Iterator[str]:
        """Empty: adapters do not change normalisation layers."""
        return iter(())

    def slices(self, path: str) -> tuple[TensorSlice, ...]:
        """The possible places of a layer's weight in an original checkpoint."""
        return tuple(TensorSlice(f"{prefix}{path}.weight") for prefix in self.prefixes)


_COMFY_T5 = "text_encoders.t5xxl.transformer."
COMFY_CLIP_L, COMFY_CLIP_G = "text_encoders.clip_l.transformer.", "text_encoders.clip_g.transformer."
T5 = Encoder(
    "encoder.block.{}",
    (
        *(f"layer.0.SelfAttention.{name}" for name in "qkvo"),
        *(f"layer.1.DenseReluDense.{name}" for name in ("wi", "wi_0", "wi_1", "wo")),
    ),
    (_COMFY_T5,),
)
T5_NAMES = (_COMFY_T5, "t5xxl.", "t5.")
LANGUAGE_MODEL = Encoder(
    "layers.{}",
    (
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    ),
)
