"""Reading the delta of a module from its tensors, for all kinds of adapters."""

import math
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import NamedTuple

import torch

from lora_adapters.convert.deltas.low_rank import LowRank
from lora_adapters.convert.errors import AdapterError

from .base import Delta, Tensors, scalar_of, with_article
from .boft import BOFT
from .dora import DoRA, magnitude_of_vector
from .full import Full, WithBias
from .glora import GLoRA
from .hadamard import Hadamard
from .ia3 import IA3
from .input_butterfly import InputButterfly
from .input_rotation import InputRotation
from .kronecker import Kronecker
from .norm import Norm
from .oft import OFT
from .tucker import Tucker, read_lora


class Kind(NamedTuple):
    """The reader of a kind, which returns None for the tensors of other kinds, and the suffixes of its keys."""

    read: Callable[[Tensors], Delta | None]
    suffixes: tuple[str, ...]


KINDS = (  # in the order in which they are tried
    Kind(read_lora, Tucker.suffixes),
    Kind(Hadamard.read, Hadamard.suffixes),
    Kind(Kronecker.read, Kronecker.suffixes),
    Kind(Norm.read, Norm.suffixes),
    Kind(GLoRA.read, GLoRA.suffixes),
    Kind(IA3.read, IA3.suffixes),
    Kind(OFT.read, OFT.suffixes),
    Kind(BOFT.read, BOFT.suffixes),
    Kind(InputRotation.read, InputRotation.suffixes),
    Kind(InputButterfly.read, InputButterfly.suffixes),
    Kind(Full.read, Full.suffixes),
)

_ALIASES = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora_magnitude_vector.weight": "lora_magnitude_vector",
    "lora_B.bias": "lora_up.bias",
}
_BESIDE = ("alpha", "dora_scale", "lora_magnitude_vector", "scalar", "diff_b", "lora_up.bias")

# All key suffixes that `read_module` accepts.
SUFFIXES = frozenset([*_ALIASES, *_BESIDE, *(suffix for kind in KINDS for suffix in kind.suffixes)])


def split_suffix(key: str, suffixes: Collection[str] = SUFFIXES) -> tuple[list[str], str] | None:
    """Split a key at its longest suffix among `suffixes`: the parts before it, and the suffix; None without one."""
    parts = key.split(".")
    for length in (3, 2, 1):
        suffix = ".".join(parts[-length:])
        if len(parts) > length and suffix in suffixes:
            return parts[:-length], suffix
    return None


def read_module(tensors: Tensors, rs_lora: bool = False) -> Delta:
    """Read the change of a module from its tensors, which are not copied.

    In addition to the tensors of its kind, a module may have `dora_scale` or PEFT's `lora_magnitude_vector` (DoRA),
    `diff_b` (a change of the bias) and `scalar` (a factor of the change, written by some versions of LyCORIS). A LoRA
    may have a bias of its up layer (PEFT's `lora_bias`).

    Args:
        tensors: The tensors by the suffix of their key, as kohya, LyCORIS and ComfyUI write them: "lora_up.weight",
            "hada_w1_a", "alpha".
        rs_lora: Whether LyCORIS trained the adapter with `rs_lora`, according to the metadata. This matters for GLoRA
            and for LoKr with two full factors, whose files do not contain the scale.

    Returns:
        The change.

    Raises:
        AdapterError: A tensor name is unknown, a tensor is missing, or shapes do not match. The message does not name
            the module.
    """
    own = _canonical(tensors)
    magnitude, of_peft = _take_magnitude(own)
    scalar, up_bias = own.pop("scalar", None), own.pop("lora_up.bias", None)
    bias = None if set(own) <= set(Full.suffixes) else own.pop("diff_b", None)
    change = _read_kind(own, tensors)
    if rs_lora:
        change = _rank_stabilised(change)
    if scalar is not None:
        change = change.scaled(scalar_of("scalar", scalar))
    if up_bias is not None:
        if not isinstance(change, LowRank):
            raise AdapterError(f"unexpected tensor in {with_article(change.kind)} module: lora_up.bias")
        change = WithBias(change, up_bias, multiplier=change.scale)
    if magnitude is not None:
        change = DoRA(change, magnitude, scales_change=of_peft)
    return change if bias is None else WithBias(change, bias)


def _canonical(tensors: Tensors) -> dict[str, torch.Tensor]:
    """The tensors under the names that kohya's and LyCORIS' files use."""
    own: dict[str, torch.Tensor] = {}
    for suffix, tensor in tensors.items():
        name = _ALIASES.get(suffix, suffix)
        if name in own:
            raise AdapterError(f"{suffix} and {name} stand for the same tensor: keep only one")
        own[name] = tensor
    return own


def _take_magnitude(own: dict[str, torch.Tensor]) -> tuple[torch.Tensor | None, bool]:
    """Pop the magnitude of a DoRA from the tensors (None without one); also return whether it is PEFT's."""
    vector, magnitude = own.pop("lora_magnitude_vector", None), own.pop("dora_scale", None)
    if vector is None:
        if magnitude is None or magnitude.ndim != 1:
            return magnitude, False
        vector, magnitude = magnitude, None  # PEFT's vector named dora_scale, as in converted PEFT files
    if magnitude is not None:
        raise AdapterError("dora_scale and lora_magnitude_vector stand for the same tensor: keep only one")
    return magnitude_of_vector(vector), True


def _read_kind(own: Tensors, tensors: Tensors) -> Delta:
    for kind in KINDS:
        change = kind.read(own)
        if change is not None:
            return change
    raise AdapterError(f"tensors match no known kind of adapter: {', '.join(sorted(tensors)) or 'none'}")


def _rank_stabilised(change: Delta) -> Delta:
    """Apply the scale that LyCORIS trains with under `rs_lora`, alpha / √rank.

    Files of most kinds already contain it, as an alpha multiplied by √rank. There are two exceptions: GLoRA writes its
    alpha unchanged, and a LoKr with two full factors is trained with the scale √dim but writes dim · √dim as alpha.
    """
    if isinstance(change, GLoRA):
        return replace(change, alpha=change.alpha * math.sqrt(change.rank))
    if isinstance(change, Kronecker) and change.rank is None:
        return replace(change, alpha=1.0).scaled(abs(change.alpha) ** (1 / 3))
    return change
