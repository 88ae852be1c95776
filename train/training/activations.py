"""Estimates the activation memory of a training step with a forward pass on the meta device.

On PyTorch's meta device tensors have shapes but no data. The bytes that autograd saves for the backward pass are
counted, each storage once. Assumptions:

- attention saves queries, keys, values, its output and one number per query, as the fused kernels of
  scaled_dot_product_attention do on GPUs;
- under mixed precision, linear layers and convolutions run in the lower precision and normalisation in fp32
  (autocast's rules);
- with gradient checkpointing, the inputs of every block are saved, and all activations of the largest block.

Not included: kernel workspaces, gradients of activations, fragmentation and the driver's own memory.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from lora_adapters.train.models.memory import weight_type
from lora_adapters.train.models.quantised import on_shapes
from lora_adapters.train.models.text_encoding import Encoded
from lora_adapters.train.training.setup import Run
from lora_adapters.train.training.sorting import before_sorting

_LOW = (torch.nn.functional.linear, torch.nn.functional.conv2d)
_FULL = (torch.nn.functional.group_norm, torch.nn.functional.layer_norm)


def largest_batch(run: Run) -> tuple[int, tuple[int, int]]:
    """(images, (width, height) in pixels) of the batch with the most pixels."""
    images = run.data.images
    batches = ((images.datasets[owner].batch_size, bucket) for owner, bucket in images.group_buckets)
    return max(batches, key=lambda batch: batch[0] * batch[1][0] * batch[1][1])


def activation_bytes(run: Run) -> int:
    """Bytes that autograd saves in a step on the largest batch; the module's docstring lists the assumptions."""
    count, (width, height) = largest_batch(run)
    batch = next(run.data.batches(0))
    dtype = weight_type(run.settings.mixed_precision)
    run.training_mode()
    try:
        with before_sorting(run):
            text, text_bytes = _text(run, dtype)
        conditions = run.models.family.conditions(batch, run.models)
        factor = run.models.latent_space.factor
        shape = (count, run.models.latent_space.channels, height // factor, width // factor)
        inputs = [
            torch.empty(shape, device="meta"),
            torch.zeros(count, dtype=torch.long, device="meta"),
            Encoded(
                _meta(text.hidden, count, text_bytes > 0),
                _meta(text.pooled, count, False),
                _meta(text.mask, count, False),
            ),
            _meta(conditions, count, False),
        ]
        with before_sorting(run):
            return text_bytes * count + _denoiser_bytes(run, inputs, dtype)
    finally:
        run.training_mode(False)


class _Tally:
    """Counts the bytes that autograd saves, each storage once, except the storages in `known`."""

    def __init__(self, known: set[int]):
        self.seen, self.kept, self.bytes = set(known), list[torch.UntypedStorage](), 0

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.kept.append(storage)  # keeps it alive: otherwise a new storage could get the same address
            self.bytes += storage.nbytes()
        return tensor

    def hooks(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self.add, lambda tensor: tensor)


class _Attention(torch.autograd.Function):
    """Saves the tensors that a fused attention kernel saves, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out


class _OnAGpu(TorchFunctionMode):
    """Replaces attention by `_Attention`, and applies autocast's dtype rules if `dtype` is not fp32."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.nn.functional.scaled_dot_product_attention:
            return _Attention.apply(*args, *(kwargs[name] for name in ("query", "key", "value") if name in kwargs))
        if self.dtype != torch.float32 and function in (*_LOW, *_FULL):
            dtype = self.dtype if function in _LOW else torch.float32
            args = [_cast(value, dtype) for value in args]
            kwargs = {name: _cast(value, dtype) for name, value in kwargs.items()}
        return function(*args, **kwargs)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _meta(tensor: torch.Tensor | None, count: int, with_gradient: bool) -> Any:
    """An empty meta tensor with the shape of `tensor`, but batch size `count`; None stays None."""
    if tensor is None:
        return None
    made = torch.empty((count, *tensor.shape[1:]), dtype=tensor.dtype, device="meta")
    return made.requires_grad_(with_gradient)


def _text(run: Run, dtype: torch.dtype) -> tuple[Encoded, int]:
    """The text encoders' output for one caption, and the bytes that autograd saves; they are small enough to run."""
    tokens = run.models.tokenize(["a"], run.loss.options.chunks, False)
    tally = _Tally({parameter.untyped_storage()._cdata for parameter in run.plain.parameters()})
    with tally.hooks(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        encoded = run.plain.encode(tokens)
    return encoded, tally.bytes if run.plain.train_text else 0


def _denoiser_bytes(run: Run, inputs: list[Any], dtype: torch.dtype) -> int:
    denoiser = run.models.denoiser
    weights = {name: _empty(p).requires_grad_(p.requires_grad) for name, p in denoiser.named_parameters()}
    buffers = {name: _empty(buffer) for name, buffer in denoiser.named_buffers()}

    def called(*args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(denoiser, {**weights, **buffers}, args, kwargs)

    tally = _Tally({weight.untyped_storage()._cdata for weight in weights.values()})
    with on_shapes(denoiser, dtype), _counted_checkpoints(denoiser, tally) as largest, tally.hooks(), _OnAGpu(dtype):
        noisy, *rest = inputs
        prediction = run.models.family.predict(called, noisy.to(dtype), *rest)
    del prediction
    return tally.bytes + max(largest, default=0)


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, device="meta")


@contextmanager
def _counted_checkpoints(model: Any, outer: _Tally) -> Iterator[list[int]]:
    """A context in which checkpointed blocks add their inputs to `outer`; yields the list of bytes saved in each block.

    Diffusers' models call `_gradient_checkpointing_func(block, *inputs)` where checkpointing is on.
    """
    largest: list[int] = []

    def checkpoint(block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor):
                outer.add(value)
        inner = _Tally(outer.seen)
        with inner.hooks():
            result = block(*args, **kwargs)
        largest.append(inner.bytes)
        return result

    replaced: Mapping[Any, Any] = {
        module: module._gradient_checkpointing_func
        for module in model.modules()
        if getattr(module, "_gradient_checkpointing_func", None) is not None
    }
    for module in replaced:
        module._gradient_checkpointing_func = checkpoint
    try:
        yield largest
    finally:
        for module, before in replaced.items():
            module._gradient_checkpointing_func = before
