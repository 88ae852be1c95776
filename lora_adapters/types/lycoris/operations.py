"""What layers compute with a weight and a bias, and what their own weight is."""

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
_RMS_NORMS = (  # those of libraries, by the modules that have them
    ("torch.nn", "RMSNorm"),
    ("diffusers.models.normalization", "RMSNorm"),
    ("transformers.models.t5.modeling_t5", "T5LayerNorm"),
)


def norms() -> tuple[type[nn.Module], ...]:
    """The classes of normalisations, of libraries that are imported already: a model's are."""
    homes = ((sys.modules.get(home), name) for home, name in _RMS_NORMS)
    return (*NORMS, *(getattr(home, name) for home, name in homes if hasattr(home, name)))


def layers() -> tuple[type[nn.Module], ...]:
    """The classes of layers whose weights can be changed."""
    return (nn.Linear, nn.Conv2d, *norms())


def weight_shape(layer: Any) -> tuple[int, ...]:
    """(out, in), (out, in, height, width) or (channels,), also of quantised layers, whose weights are packed."""
    if isinstance(layer, nn.Linear):
        return (layer.out_features, layer.in_features)
    return tuple(layer.weight.shape)


def base_weight(layer: nn.Module, device: torch.device) -> torch.Tensor:
    """The weight of a layer, also of one that is offloaded or quantised.

    Args:
        layer: The layer.
        device: The device of the result.

    Returns:
        The weight in its full shape and in floating point, without a gradient.

    Raises:
        AdapterError: It is quantised in a way that cannot be read.
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
    """A copy of the bias of a layer that has one, on the CPU, also of one that is offloaded."""
    with align_module_device(layer):
        copy: torch.Tensor = layer.bias.detach().to("cpu", copy=True)
    return copy


def computable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor; in float32 if it is in an 8-bit floating point, in which torch adds and multiplies nothing."""
    return tensor.to(torch.float32) if tensor.is_floating_point() and tensor.dtype.itemsize == 1 else tensor


def is_quantised(parameter: torch.Tensor) -> bool:
    """Whether a tensor of a class of its own holds codes in place of numbers (GGUF, torchao, quanto)."""
    return _is_gguf(parameter) or type(parameter).dequantize is not torch.Tensor.dequantize


def _is_gguf(parameter: torch.Tensor | None) -> bool:
    return type(parameter).__name__ == "GGUFParameter"


def _dequantised(layer: Any) -> torch.Tensor:
    """The weight in numbers. The layer keeps its own: PEFT puts a copy there, without the scales of 8-bit layers."""
    own = layer._parameters.get("weight")
    numbers: torch.Tensor
    if _is_gguf(own):  # which PEFT does not know, and the next kind neither
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
    """What the layer makes of x with another weight and bias; None is all zeros."""
    if weight is None:
        if bias is None:
            return 0.0
        channels_first = isinstance(layer, (nn.Conv2d, nn.GroupNorm))
        return bias.view(-1, *[1] * (x.ndim - 2)) if channels_first else bias
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    if isinstance(layer, nn.Conv2d):
        return layer._conv_forward(x, weight, bias)  # with the layer's way of padding
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)
    if isinstance(layer, nn.GroupNorm):
        return F.group_norm(x, layer.num_groups, weight, bias, layer.eps)
    if isinstance(layer, norms()):  # divided by the root of the mean square: each library has a precision of its own
        parts = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        return functional_call(layer, parts, (x,))
    raise TypeError(f"no operation of {type(layer).__name__} is known")
