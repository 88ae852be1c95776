"""--quantize_base: quantises the denoiser's linear layers to 4 or 8 bits with bitsandbytes, but not the adapter.

Layers are replaced after loading, on the training device, so that checkpoint files and CPUs are supported too:
diffusers quantises only while it loads a folder, and only on GPUs.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN

from lora_adapters.train.errors import TrainingError
from lora_adapters.train.models.base import BaseModels

_CPU_WIDTH = 64  # bitsandbytes' 4-bit CPU kernel needs input widths that are multiples of 64


def bitsandbytes() -> Any:
    """Import bitsandbytes. TrainingError if it is not installed."""
    try:
        import bitsandbytes
    except ImportError:
        raise TrainingError(
            '--quantize_base: bitsandbytes is not installed: pip install "lora-adapters[8bit]", or give --fp8_base'
        ) from None
    return bitsandbytes


def layers(model: torch.nn.Module) -> list[Any]:
    """The quantised layers of a model; [] if it was not quantised."""
    if not (getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)):
        return []
    bnb = bitsandbytes()
    return [layer for layer in model.modules() if isinstance(layer, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))]


def scale_bytes(model: torch.nn.Module) -> int:
    """Bytes of the quantisation scales: one scale per 64 weights in 4 bits, one per row in 8 bits."""
    size = 0
    for layer in layers(model):
        state = getattr(layer.weight, "quant_state", None)
        size += 4 * layer.out_features if state is None else state.absmax.numel() * state.absmax.element_size()
    return size


class _NothingKept(torch.autograd.Function):
    """A frozen linear layer on the meta device. It saves nothing: its backward pass needs only the weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
        return x.new_empty((*x.shape[:-1], width), dtype=dtype)


@contextmanager
def on_shapes(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """A context in which quantised layers return empty outputs of the right shape in `dtype`, for the meta device."""
    quantised = layers(model)
    for layer in quantised:
        layer.forward = lambda x, width=layer.out_features: _NothingKept.apply(x, width, dtype)
    try:
        yield
    finally:
        for layer in quantised:
            del layer.forward


def quantise(models: BaseModels, kind: str | None, dtype: torch.dtype, device: torch.device) -> None:
    """Replace the denoiser's linear layers by quantised layers of bitsandbytes.

    Norms, position embeddings, the first and last layer and convolutions are not quantised, and with nf4 on a CPU
    neither are layers whose input width is not a multiple of 64. Call it before adapters are added, so that PEFT uses
    its adapter layers for bitsandbytes.

    Args:
        models: The base model.
        kind: nf4 or int8; None does nothing.
        dtype: The dtype in which 4-bit layers compute.
        device: The device of the quantised layers.

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
        raise TrainingError(f"--quantize_base {kind}: no layer of the {title} can be quantised; use int8 or no option")
    setattr(model, "is_loaded_in_4bit" if kind == "nf4" else "is_loaded_in_8bit", True)


def _quantised(bnb: Any, layer: torch.nn.Linear, kind: str, dtype: torch.dtype, device: torch.device) -> Any:
    shape, bias = (layer.in_features, layer.out_features), layer.bias is not None
    if kind == "nf4":
        made = bnb.nn.Linear4bit(*shape, bias=bias, compute_dtype=dtype, quant_type="nf4", device="meta")
        made.support_avx512bf16_for_cpu = False  # its weight layout for inference on some CPUs breaks training
        made.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=made)
    else:
        made = bnb.nn.Linear8bitLt(*shape, bias=bias, has_fp16_weights=False, device="meta")
        made.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    made.bias = layer.bias
    return made.to(device).train(layer.training)
