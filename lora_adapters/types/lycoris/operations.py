"""The operations of layers with a given weight and bias, and access to their own weights."""

import sys
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils.modeling import align_module_device
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from torch.func import functional_call

from lora_adapters.convert.errors import AdapterError, first_line

NORMS = (nn.LayerNorm, nn.GroupNorm)
_RMS_NORMS = (  # the RMS norms of libraries, by module
    ("torch.nn", "RMSNorm"),
    ("diffusers.models.normalization", "RMSNorm"),
    ("transformers.models.t5.modeling_t5", "T5LayerNorm"),
)


def norms() -> tuple[type[nn.Module], ...]:
    """The classes of normalisations of libraries that are already imported, as those of a model must be."""
    homes = ((sys.modules.get(home), name) for home, name in _RMS_NORMS)
    return (*NORMS, *(getattr(home, name) for home, name in homes if hasattr(home, name)))


def layers() -> tuple[type[nn.Module], ...]:
    """The classes of layers whose weights can be changed."""
    return (nn.Linear, nn.Conv2d, *norms())


def weight_shape(layer: Any) -> tuple[int, ...]:
    """(out, in), (out, in, height, width) or (channels,), also for quantised layers with packed weights."""
    if isinstance(layer, nn.Linear):
        return (layer.out_features, layer.in_features)
    return tuple(layer.weight.shape)


def base_weight(layer: nn.Module, device: torch.device) -> torch.Tensor:
    """The weight of a layer, which may be offloaded or quantised.

    Args:
        layer: The layer.
        device: The device of the result.

    Returns:
        The weight in its full shape and in floating point, without a gradient.

    Raises:
        AdapterError: The weight is quantised in an unsupported way.
    """
    with align_module_device(layer):
        try:
            weight = computable(_dequantised(layer).detach().to(device))
        except Exception as error:
            raise AdapterError(f"the weight of a {type(layer).__name__} cannot be read ({first_line(error)})") from None
    if not weight.is_floating_point() or tuple(weight.shape) != weight_shape(layer):
        raise AdapterError(f"the weight of a {type(layer).__name__} cannot be read: it is packed as {weight.dtype}")
    return weight


def base_bias(layer: Any) -> torch.Tensor:
    """A copy of a layer's bias on the CPU; the layer must have a bias, which may be offloaded."""
    with align_module_device(layer):
        copy: torch.Tensor = layer.bias.detach().to("cpu", copy=True)
    return copy


def computable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, cast to float32 if it is in an 8-bit dtype, for which torch has no arithmetic."""
    return tensor.to(torch.float32) if tensor.is_floating_point() and tensor.dtype.itemsize == 1 else tensor


def is_quantised(parameter: torch.Tensor) -> bool:
    """Whether a tensor is of a subclass that stores quantised codes instead of values (GGUF, torchao, quanto)."""
    return _is_gguf(parameter) or type(parameter).dequantize is not torch.Tensor.dequantize


def _is_gguf(parameter: torch.Tensor | None) -> bool:
    return type(parameter).__name__ == "GGUFParameter"


def _dequantised(layer: Any) -> torch.Tensor:
    """The dequantised weight. The layer's own is restored, since PEFT replaces it by a copy without 8-bit scales."""
    own = layer._parameters.get("weight")
    numbers: torch.Tensor
    if _is_gguf(own):  # PEFT supports neither this kind nor the next one
        from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

        numbers = dequantize_gguf_tensor(own)
        return numbers
    place = None if own is None else own.device
    numbers = dequantize_module_weight(layer)
    if own is not None and layer._parameters.get("weight") is not own and own.device == place:
        layer.weight = own
    return numbers.dequantize() if is_quantised(numbers) else numbers


def applied(
    layer: Any, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor | float:
    """The layer's output for x with another weight and bias; None stands for zeros."""
    if weight is None:
        if bias is None:
            return 0.0
        channels_first = isinstance(layer, (nn.Conv2d, nn.GroupNorm))
        return bias.view(-1, *[1] * (x.ndim - 2)) if channels_first else bias
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    if isinstance(layer, nn.Conv2d):
        return layer._conv_forward(x, weight, bias)  # with the layer's padding mode
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)
    if isinstance(layer, nn.GroupNorm):
        return F.group_norm(x, layer.num_groups, weight, bias, layer.eps)
    if isinstance(layer, norms()):  # RMS norms, for which each library uses another precision
        parts = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        return functional_call(layer, parts, (x,))
    raise TypeError(f"the operation of {type(layer).__name__} is not known")
