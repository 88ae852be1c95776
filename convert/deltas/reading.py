"""The delta in a module's tensors, whatever kind it is."""

from collections.abc import Callable

from lora_adapters.convert.errors import AdapterError

from .base import Delta, Tensors, scalar_of
from .boft import BOFT
from .dora import DoRA, magnitude_of_vector
from .full import Full, WithBias
from .glora import GLoRA
from .hadamard import Hadamard
from .ia3 import IA3
from .kronecker import Kronecker
from .norm import Norm
from .oft import OFT
from .tucker import read_lora

# In the order in which they are tried: each finds its own kind in a module's tensors, or None.
KINDS: tuple[Callable[[Tensors], Delta | None], ...] = (
    read_lora,
    Hadamard.read,
    Kronecker.read,
    Norm.read,
    GLoRA.read,
    IA3.read,
    OFT.read,
    BOFT.read,
    Full.read,
)

_ALIASES = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora_magnitude_vector.weight": "lora_magnitude_vector",
}


def read_module(tensors: Tensors) -> Delta:
    """The change that a module's tensors describe.

    Any kind may have a `dora_scale` or PEFT's `lora_magnitude_vector` (DoRA), a `diff_b` (a change of the bias) and a
    `scalar` (a factor of the change, which some versions of LyCORIS wrote) beside its own tensors. They are not copied.

    Args:
        tensors: the module's tensors by the ends of their keys, as kohya, LyCORIS and ComfyUI write them:
            "lora_up.weight", "hada_w1_a", "alpha".

    Raises:
        AdapterError: names that no kind has, a kind with tensors missing, or shapes that do not fit. The message does
            not name the module.
    """
    own = _canonical(tensors)
    vector, magnitude = own.pop("lora_magnitude_vector", None), own.pop("dora_scale", None)
    if vector is not None and magnitude is not None:
        raise AdapterError("dora_scale and lora_magnitude_vector stand for the same tensor")
    scalar, bias = own.pop("scalar", None), None
    if not set(own) <= {"diff", "diff_b"}:
        bias = own.pop("diff_b", None)
    change = _read_kind(own, tensors)
    if scalar is not None:
        change = change.scaled(scalar_of("scalar", scalar))
    if vector is not None:
        magnitude = magnitude_of_vector(vector)
    if magnitude is not None:
        change = DoRA(change, magnitude)
    return change if bias is None else WithBias(change, bias)


def _canonical(tensors: Tensors) -> dict:
    own = {}
    for suffix, tensor in tensors.items():
        name = _ALIASES.get(suffix, suffix)
        if name in own:
            raise AdapterError(f"{suffix} and {name} stand for the same tensor")
        own[name] = tensor
    return own


def _read_kind(own: Tensors, tensors: Tensors) -> Delta:
    for read in KINDS:
        change = read(own)
        if change is not None:
            return change
    raise AdapterError(f"no known kind of adapter has just these tensors: {', '.join(sorted(tensors)) or 'none'}")
