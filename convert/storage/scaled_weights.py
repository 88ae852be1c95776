"""Weights with separate scale tensors: scaled fp8, which is supported, and other quantised weights, which are refused.

The value of a scaled weight is `weight * scale`, with one scale for the tensor or one for each row:

    <module>.scale_weight, <module>.scale_input, scaled_fp8      ComfyUI, kohya
    <module>.weight_scale, <module>.input_scale, comfy_quant     ComfyUI since 2025, compressed-tensors

bitsandbytes, quanto, GPTQ, block scales and others store other tensors beside a weight. An adapter must be added to the
dequantised values, so these weights are recognised and refused, rather than changed as if they were not quantised.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.parsing import json_value

MARKER = "scaled_fp8"  # an empty tensor, which marks files with scaled weights
METADATA_KEY = "_quantization_metadata"
_SCALES = ("scale_weight", "weight_scale")
_ACTIVATIONS = ("scale_input", "input_scale", "scale_output", "output_scale")  # scales of activations, not of weights
_RECIPE = "comfy_quant"
_WORTH_IT = 0.8  # a new scale is used only if it reduces the squared error at least to this share
_ANY, _INTEGER = "rescaled", "quantised integer"
_VAGUE = (_ANY, _INTEGER)  # replaced if another neighbour identifies the kind more precisely
_KINDS = (
    (r"absmax|quant_map|quant_state", "bitsandbytes 4-bit"),
    (r"SCB|weight_format|\bCB\b", "bitsandbytes 8-bit"),
    (r"qweight|qzeros|g_idx", "GPTQ or AWQ"),
    (r"weight\._(data|scale|shift|packed)|weight_qtype", "quanto"),
    (r"W_q", "HQQ"),
    (r"weight_scale_2|weight_global_scale|weight_packed", "4-bit"),
    (r"scale_inv|scale|zero_?point|zeros|quant|amax|smooth|code_?book|mask|weight_orig", _ANY),
)


class Neighbours(NamedTuple):
    """The tensors beside weights that change the weights' meaning.

    Attributes:
        scales: The key of the scale of each scaled weight, by the weight's key.
        extras: Keys of other tensors that are needed only with scaled weights.
        foreign: By the key of each unsupported quantised weight, the key of the neighbour that shows it, and the kind.
    """

    scales: dict[str, str]
    extras: frozenset[str]
    foreign: dict[str, tuple[str, str]]


def neighbours(tensors: Mapping[str, torch.Tensor]) -> Neighbours:
    """Find the tensors that change the meaning of weights."""
    scales: dict[str, str] = {}
    extras: set[str] = set()
    foreign: dict[str, tuple[str, str]] = {}
    for key, tensor in tensors.items():
        if key.rpartition(".")[2] == MARKER:
            extras.add(key)
            continue
        owner, name = _owner(key, tensors)
        if owner is None:
            continue
        weight = tensors.get(owner)
        plain = weight is not None and weight.is_floating_point() and weight.dtype.itemsize == 1
        if name in _ACTIVATIONS or (name == _RECIPE and plain and _recipe(tensor).startswith("float8")):
            extras.add(key)
        elif name in _SCALES and plain and tensor.is_floating_point() and owner not in scales:
            scales[owner] = key
        else:
            kind = _recipe(tensor) if name == _RECIPE else _kind(name, weight)
            if kind is not None and (owner not in foreign or foreign[owner][1] in _VAGUE):
                foreign[owner] = (key, kind)
    return Neighbours({key: scales[key] for key in scales if key not in foreign}, frozenset(extras), foreign)


def _owner(key: str, tensors: Mapping[str, torch.Tensor]) -> tuple[str | None, str]:
    """The key of the weight that a tensor may belong to (None for weights and biases), and the tensor's own name."""
    if match := re.fullmatch(r"(.+\.(?:\w+_)?weight)\.(.+)", key):  # to_q.weight.absmax
        return match[1], f"weight.{match[2]}"
    parent, _, name = key.rpartition(".")
    if not parent or name in ("weight", "bias", "in_proj_weight", "in_proj_bias"):
        return None, name
    if match := re.fullmatch(r"in_proj_(.+)", name):  # attn.in_proj_weight_scale
        return f"{parent}.in_proj_weight", match[1]
    for owner in (f"{parent}.weight", f"{parent}_weight"):
        if owner in tensors:
            return owner, name
    if match := re.fullmatch(r"(.+)\.weight_\w+", parent):  # to_q.weight_quantizer._amax
        return f"{match[1]}.weight", f"{parent.rpartition('.')[2]}.{name}"
    return f"{parent}.weight", name


def _kind(name: str, weight: torch.Tensor | None) -> str | None:
    """The kind of quantisation indicated by the name of a neighbour; None if it indicates none."""
    kind = next((label for pattern, label in _KINDS if re.search(pattern, name)), None)
    if kind != _ANY:
        return kind
    if weight is None:  # another parameter whose name happens to match, such as CLIP's logit_scale
        return None
    return kind if weight.is_floating_point() else _INTEGER


def _recipe(tensor: torch.Tensor) -> str:
    """The format in a `comfy_quant` tensor, which contains JSON as bytes."""
    try:
        table = json_value(bytes(tensor.flatten().tolist()).decode())
        return str(table["format"])
    except (ValueError, TypeError, KeyError, UnicodeDecodeError):
        return "unknown"


def aligned(scale: torch.Tensor, weight: torch.Tensor, key: str) -> torch.Tensor:
    """Reshape a scale so that it broadcasts to the weight.

    Args:
        scale: One value, or one for each row; any dtype.
        weight: (out, ...), the quantised weight.
        key: The name of the scale, for error messages.

    Returns:
        The scale in float32, of shape () or (out, 1, ...).

    Raises:
        AdapterError: The scale has another shape (one for each block or column), or NaN or infinite values.
    """
    rows = len(weight) if weight.ndim else 1
    if scale.numel() != 1 and not (scale.ndim and len(scale) == scale.numel() == rows):
        raise AdapterError(
            f"{key} is a scale of {list(scale.shape)} for a weight of {list(weight.shape)}: scales of blocks or columns"
            " are not supported; use the model in fp16 or bf16"
        )
    wide = scale.to(torch.float32)
    if not bool(wide.isfinite().all()):
        raise AdapterError(f"{key} has NaN or infinite values")
    return wide.reshape(()) if scale.numel() == 1 else wide.reshape(rows, *(1 for _ in weight.shape[1:]))


def dequantised(weight: torch.Tensor, scale: torch.Tensor, key: str) -> torch.Tensor:
    """The values of a scaled weight in float32; `key` is the scale's, for error messages."""
    return weight.to(torch.float32, copy=True).mul_(aligned(scale, weight, key))


def requantised(
    value: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor, key: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a changed weight.

    The old scale is kept unless one that maps the largest value to the maximum of `dtype` is much more precise, as
    after an overflow. With one scale for each row, this is decided for each row.

    Args:
        value: (out, ...), the weight in float32.
        dtype: The float8 dtype to quantise to.
        scale: The old scale: one value, or one for each row.
        key: The name of the scale, for error messages.

    Returns:
        The quantised weight, and its scale in the dtype and shape of the old scale.

    Raises:
        AdapterError: The old scale is not supported; see `aligned`.
    """
    most = torch.finfo(dtype).max
    old = aligned(scale, value, key)
    rows = tuple(range(1, value.ndim))
    largest = value.abs().amax(rows, keepdim=True) if old.ndim else value.abs().amax()
    fresh = (largest / most).to(scale.dtype).to(torch.float32)
    best, chosen, least = None, old, None
    for candidate in (old, fresh):
        number = (value / torch.where(candidate == 0, 1.0, candidate)).clamp_(-most, most).to(dtype)
        missing = (number.to(torch.float32) * candidate).sub_(value).square_()
        lost = missing.sum(rows, keepdim=True, dtype=torch.float64) if old.ndim else missing.sum(dtype=torch.float64)
        if best is None or least is None:
            best, least = number, lost
            continue
        better = lost < _WORTH_IT * least
        chosen = torch.where(better, candidate, chosen)
        best = torch.where(better, number.view(torch.uint8), best.view(torch.uint8)).view(dtype)  # no float8 `where`
    assert best is not None
    return best, chosen.to(scale.dtype).reshape(scale.shape)


def without_scales(metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata for a file whose scaled weights were dequantised."""
    return {key: value for key, value in metadata.items() if key != METADATA_KEY}


def refuse(foreign: Mapping[str, tuple[str, str]], keys: Iterable[str], where: str) -> None:
    """Raise AdapterError if one of the weights is quantised in an unsupported way."""
    for key in keys:
        if key in foreign:
            neighbour, kind = foreign[key]
            raise AdapterError(
                f"{where}: {key} is a {kind} weight (see {neighbour}), which is not supported: use the model in fp16 "
                "or bf16"
            )
