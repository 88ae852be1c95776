"""--quantize_base: the denoiser's linear layers in 4 or 8 bits, by bitsandbytes; the adapter is not quantised.

The layers are put in after loading, on the training device, so that it goes for checkpoint files and for CPUs too:
diffusers quantises while it loads a folder, and on GPUs alone.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN

from lora_adapters.train.errors import TrainingError
from lora_adapters.train.models.base import BaseModels

_CPU_WIDTH = 64  # bitsandbytes' kernel for 4 bits on the CPU wants widths that are multiples of it


def bitsandbytes() -> Any:
    """The package. TrainingError if it is not installed."""
    try:
        import bitsandbytes
    except ImportError:
        raise TrainingError(
            '--quantize_base: bitsandbytes is not installed: pip install "lora-adapters[8bit]", or give --fp8_base'
        ) from None
    return bitsandbytes


def layers(model: torch.nn.Module) -> list[Any]:
    """The quantised layers of a model; [] of one that `quantise` has not had."""
    if not (getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)):
        return []
    bnb = bitsandbytes()
    return [layer for layer in model.modules() if isinstance(layer, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))]


def scale_bytes(model: torch.nn.Module) -> int:
    """Bytes of the scales beside the quantised weights: one of each 64 numbers in 4 bits, one of each row in 8."""
    size = 0
    for layer in layers(model):
        state = getattr(layer.weight, "quant_state", None)
        size += 4 * layer.out_features if state is None else state.absmax.numel() * state.absmax.element_size()
    return size


class _NothingKept(torch.autograd.Function):
    """A frozen layer on shapes alone: its backward pass needs the weight, and nothing of this call."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
        return x.new_empty((*x.shape[:-1], width), dtype=dtype)


@contextmanager
def on_shapes(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """In the block the quantised layers give outputs of the right shape, in `dtype`, and compute nothing."""
    quantised = layers(model)
    for layer in quantised:
        layer.forward = lambda x, width=layer.out_features: _NothingKept.apply(x, width, dtype)
    try:
        yield
    finally:
        for layer in quantised:
            del layer.forward


def quantise(models: BaseModels, kind: str | None, dtype: torch.dtype, device: torch.device) -> None:
    """Put bitsandbytes' layers in place of the denoiser's linear ones, on the device, where they compute in `dtype`.

    Norms, embeddings of positions, and the first and last layer stay as they are, and so do convolutions, and on a CPU
    in 4 bits layers whose width is no multiple of 64. Call it before adapters are added, so that PEFT puts its layers
    for these on them.

    Args:
        models: The base model.
        kind: nf4 or int8; None leaves everything as it is.
        dtype: Of the weights and results while a layer in 4 bits computes.
        device: Where the layers are to be.

    Raises:
        TrainingError: bitsandbytes is not installed, or no layer can be quantised.
    """
    if kind is None:
        return
    bnb, model = bitsandbytes(), models.denoiser
    own = tuple(getattr(model, "_skip_layerwise_casting_patterns", None) or ())
    skipped = [re.compile(pattern) for pattern in (*DEFAULT_SKIP_MODULES_PATTERN, *own)]
    for path, layer in list(model.named_modules()):
        if type(layer) is not torch.nn.Linear or any(pattern.search(path) for pattern in skipped):
            continue
        if kind == "nf4" and device.type == "cpu" and layer.in_features % _CPU_WIDTH:
            continue
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, _quantised(bnb, layer, kind, dtype, device))
    if not any(isinstance(layer, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)) for layer in model.modules()):
        title = models.family.denoiser_title
        raise TrainingError(f"--quantize_base {kind}: the {title} has no layer that can be; leave it out, or give int8")
    setattr(model, "is_loaded_in_4bit" if kind == "nf4" else "is_loaded_in_8bit", True)


def _quantised(bnb: Any, layer: torch.nn.Linear, kind: str, dtype: torch.dtype, device: torch.device) -> Any:
    shape, bias = (layer.in_features, layer.out_features), layer.bias is not None
    if kind == "nf4":
        made = bnb.nn.Linear4bit(*shape, bias=bias, compute_dtype=dtype, quant_type="nf4", device="meta")
        made.support_avx512bf16_for_cpu = False  # its layout for inference on some CPUs is read wrongly by training
        made.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=made)
    else:
        made = bnb.nn.Linear8bitLt(*shape, bias=bias, has_fp16_weights=False, device="meta")
        made.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    made.bias = layer.bias
    return made.to(device).train(layer.training)
