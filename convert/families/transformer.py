"""The layers of diffusion transformers: paths in diffusers, names in the original code, which fuses some of them.

A fused layer of the original code is several in diffusers, one below the other in its rows: `img_attn.qkv` is to_q,
to_k and to_v. How many rows each has follows from the shape of the layer, see `tensor_slice.Part`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import NamedTuple

from .family import Component, Coverage, Kind
from .tensor_slice import Part, TensorSlice
from .unet import PREFIX

_NAMED = 64  # blocks of a stack whose names are known: more than any model has
_TEXT_CLASSES = (
    "CLIPAttention",
    "CLIPSdpaAttention",
    "CLIPMLP",
    "T5Attention",
    "T5DenseGatedActDense",
    "T5DenseActDense",
)


class Fused(NamedTuple):
    """A layer of the original code: the paths of the layers that it is in diffusers, in the order of its rows.

    square: how many of the first have as many rows as the input is wide; the others share the rest equally. others: the
    rows of each of the others by the width of the input, where that is the same in all models; 0 if it is not.
    swapped: whether the halves of its rows are in the other order in diffusers, see `TensorSlice.placed`.
    """

    paths: tuple[str, ...]
    square: int = 0
    others: int = 0
    swapped: bool = False

    def part(self, index: int) -> Part | None:
        """Which rows the layer of that index has; None for all of them."""
        return Part(index, len(self.paths), self.square) if len(self.paths) > 1 else None

    def below(self, prefix: str) -> "Fused":
        """The same with paths that begin with a prefix."""
        return self._replace(paths=tuple(f"{prefix}.{path}" for path in self.paths))


def fused(*paths: str, square: int = 0, others: int = 0) -> Fused:
    """A layer that is several in diffusers."""
    return Fused(paths, square, others)


def swapped(path: str) -> Fused:
    """A layer whose shift and scale are in the other order in diffusers."""
    return Fused((path,), swapped=True)


Table = Mapping[str, str | Fused]  # the name of a layer in the original code -> what it is in diffusers


def _entries(table: Table) -> Iterator[tuple[str, Fused]]:
    for name, target in table.items():
        yield name, target if isinstance(target, Fused) else Fused((target,))


class Stack(NamedTuple):
    """Blocks of one kind, one after the other.

    original, path: what the list of them is called in the original code and in diffusers. depth: how many the largest
    model has. letter: of their labels. layers: of each block. aliases: other names of layers in files. outer: the
    beginnings of the paths in a block that no adapter type adapts. norms: the tensors of a block that belong to no
    layer, by their whole names in the original code.
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
    """A diffusion transformer: stacks of blocks, and the layers outside of them by their names in the original code.

    prefixes: the beginnings of its tensors' names in original checkpoints. convolutions: the paths of those. adapted:
    the beginnings of paths outside of the blocks that kohya's trainer adapts too. tensors: those outside of the blocks
    that belong to no layer, as `Stack.norms`.
    """

    stacks: tuple[Stack, ...]
    outer: Table
    prefixes: tuple[str, ...] = ("", PREFIX)
    convolutions: frozenset[str] = frozenset()
    adapted: tuple[str, ...] = ()
    tensors: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def originals(self) -> Mapping[str, Fused]:
        """What each layer of the original code is in diffusers."""
        targets = dict(_entries(self.outer))
        for stack in self.stacks:
            for number in range(_NAMED):
                for name, target in _entries(stack.layers):
                    targets[f"{stack.original}.{number}.{name}"] = target.below(f"{stack.path}.{number}")
        return targets

    @cached_property
    def aliases(self) -> Mapping[str, Fused]:
        """What other names of layers mean that files have."""
        return {
            f"{stack.original}.{number}.{name}": target.below(f"{stack.path}.{number}")
            for stack in self.stacks
            for number in range(_NAMED)
            for name, target in _entries(stack.aliases)
        }

    @cached_property
    def _places(self) -> Mapping[str, TensorSlice]:
        """For each path the layer of the original code, and its part of it."""
        return {
            path: TensorSlice(name, target.part(index), swapped=target.swapped)
            for name, target in self.originals.items()
            for index, path in enumerate(target.paths)
        }

    @cached_property
    def single_tensors(self) -> Mapping[str, str]:
        """By the name in diffusers, the name in the original code of each tensor that belongs to no layer."""
        found = {path: name for name, path in self.tensors.items()}
        for stack in self.stacks:
            for number in range(_NAMED):
                for name, path in stack.norms.items():
                    found[f"{stack.path}.{number}.{path}"] = f"{stack.original}.{number}.{name}"
        return found

    def place(self, path: str) -> TensorSlice | None:
        """Where the weight of a layer is in an original checkpoint without prefix; None for what is no layer."""
        place = self._places.get(path)
        return None if place is None else place._replace(key=f"{place.key}.weight")

    def paths(self) -> Iterator[str]:
        """The path of each layer that an adapter can have."""
        return iter(self._places)

    def norms(self) -> Iterator[str]:
        """None: adapters of these models leave the normalisation layers alone."""
        return iter(())

    def original_name(self, path: str) -> str:
        """The dotted name of a layer in the original code, of the fused one where it is part of one."""
        place = self._places.get(path)
        return path if place is None else place.key

    def slices(self, path: str) -> tuple[TensorSlice, ...]:
        """Where the weight of a layer can be in an original checkpoint."""
        place = self._places[path]
        return tuple(place._replace(key=f"{prefix}{place.key}.weight") for prefix in self.prefixes)

    def marks(self, *names: str) -> tuple[str, ...]:
        """Beginnings of names in original checkpoints, with each of the prefixes."""
        return tuple(f"{prefix}{name}" for name in names for prefix in self.prefixes)

    def part_of(self, path: str) -> str:
        """The part of the model that a layer is in: block, or outer."""
        for stack in self.stacks:
            if path.startswith(f"{stack.path}."):
                inner = path.split(".", 2)[2]
                return "outer" if inner.startswith(stack.outer) and stack.outer else "block"
        return "block" if self.adapted and path.startswith(self.adapted) else "outer"

    def kind_of(self, path: str) -> Kind:
        """The kind of layer: linear, but for the few that are convolutions."""
        return "conv3x3" if path in self.convolutions else "linear"

    def denoiser(self, kohya_original: bool = True) -> Component:
        """The component that it is; kohya_original: whether kohya's trainer writes the original code's names."""
        return Component(
            *("transformer", "denoiser", "lora_unet", self), original=self.original_name, kohya_original=kohya_original
        )

    def coverage(self, *text_classes: str) -> dict[str, Coverage]:
        """The layers that kohya's trainers adapt: all linear layers of the blocks and of the text encoders.

        Args:
            *text_classes: Classes of the text encoder's live modules whose layers are adapted; none are those of CLIP.

        Returns:
            The coverage of each adapter type.
        """
        containers = frozenset(text_classes or _TEXT_CLASSES)
        return {
            "lierla": Coverage("LierLa", ("block", "text"), containers, large_convolutions=False),
            "c3lier": Coverage("C3Lier", ("block", "text"), containers, large_convolutions=True),
        }


class Encoder(NamedTuple):
    """A text encoder of transformers' whose layers are one list, T5's or a language model's.

    pattern: the path of a layer of its block, with the number of the block in it. names: what follows. prefixes: the
    beginnings of its tensors' names in original checkpoints.
    """

    pattern: str
    names: tuple[str, ...]
    prefixes: tuple[str, ...] = ()

    def paths(self) -> Iterator[str]:
        """The path of each layer that an adapter can have."""
        return (f"{self.pattern.format(number)}.{name}" for number in range(_NAMED) for name in self.names)

    def norms(self) -> Iterator[str]:
        """None."""
        return iter(())

    def slices(self, path: str) -> tuple[TensorSlice, ...]:
        """Where the weight of a layer can be in an original checkpoint."""
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
