"""--blocks_to_swap: keeps frozen weights of transformer blocks in CPU memory, and copies them to the device for use.

During a block's forward pass its frozen parameters are replaced by copies on the device. Autograd saves the copies for
the backward pass. With gradient checkpointing it saves none in the first forward pass, and frees those of the
recomputation as the backward pass goes on. So copies are freed by reference counting, and no hook is needed to detect
the end of a block's backward pass.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from lora_adapters.train.errors import OptionError, TrainingError
from lora_adapters.train.models.base import BaseModels
from lora_adapters.train.options.settings import Settings
from lora_adapters.types.found_layers import outer_modules

log = logging.getLogger(__name__)

_APART = {
    "quantize_base": "bitsandbytes' weights stay on the device; give --fp8_base",
    "lowram": "it loads the whole model to the device; leave it out",
    "torch_compile": "compiled blocks keep references to their weights; leave it out",
}


def check_block_swap(settings: Settings) -> None:
    """Raise OptionError if --blocks_to_swap contradicts other options, TrainingError without a CUDA device."""
    if not settings.blocks_to_swap:
        return
    if not settings.gradient_checkpointing:
        raise OptionError(
            "--blocks_to_swap needs --gradient_checkpointing: without it all weights stay on the device until the "
            "backward pass"
        )
    for name, reason in _APART.items():
        if getattr(settings, name):
            raise OptionError(f"--blocks_to_swap cannot be combined with --{name}: {reason}")
    if not torch.cuda.is_available():
        raise TrainingError("--blocks_to_swap needs a CUDA device; leave it out")


def swapped_blocks(models: BaseModels, count: int | None) -> list[torch.nn.Module]:
    """The blocks to swap: the last blocks of each stack. The family decides how many of each stack.

    Args:
        models: The base model.
        count: --blocks_to_swap; None and 0 mean no block.

    Returns:
        The blocks.

    Raises:
        OptionError: The model has fewer blocks.
    """
    chosen: list[torch.nn.Module] = []
    for stack, number in models.family.blocks_to_swap(count or 0).items():
        blocks: Any = getattr(models.denoiser, stack)
        if number > len(blocks):
            raise OptionError(
                f"--blocks_to_swap {count} needs {number} {stack}, but this {models.family.denoiser_title} has "
                f"{len(blocks)}"
            )
        chosen += list(blocks)[len(blocks) - number :]
    return chosen


def bytes_away(models: BaseModels, count: int | None) -> int:
    """Bytes that --blocks_to_swap keeps off the device: those of all swapped blocks but the largest."""
    sizes = [
        sum(parameter.numel() * parameter.element_size() for _, _, parameter in _frozen(block))
        for block in swapped_blocks(models, count)
    ]
    return sum(sizes) - max(sizes, default=0)


class MainMemory:
    """Keeps frozen weights in pinned CPU memory, from which copies to the device are fast and asynchronous."""

    def __init__(self, device: torch.device):
        self.device = device

    def keep(self, weight: torch.Tensor) -> torch.Tensor:
        """Move a weight to pinned CPU memory."""
        try:
            return weight.cpu().pin_memory()
        except RuntimeError as error:
            raise TrainingError(
                "--blocks_to_swap: not enough CPU memory can be pinned; give a smaller number, or --fp8_base"
            ) from error

    def bring(self, kept: torch.Tensor) -> torch.Tensor:
        """Copy a tensor from `keep` to the device. The copy is asynchronous; later work on the device waits for it."""
        return kept.to(self.device, non_blocking=True)


def swap_blocks(models: BaseModels, wrapper: torch.nn.Module, count: int | None, memory: MainMemory) -> None:
    """Keep the frozen weights of the last blocks in CPU memory. Call it after freezing everything that is not trained,
    and before moving the model to the device: `to` then skips these weights.

    Args:
        models: The base model with the adapters, on the CPU; changed in place.
        wrapper: The module that contains the denoiser and is wrapped by DistributedDataParallel, which is told to
            ignore these weights.
        count: --blocks_to_swap.
        memory: Stores the weights.
    """
    blocks = swapped_blocks(models, count)
    if not blocks:
        return
    away = {id(parameter) for block in blocks for parameter in _SwappedBlock(block, memory).parameters}
    names = [name for name, parameter in wrapper.named_parameters() if id(parameter) in away]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(wrapper, names)
    log.info("the frozen weights of %d blocks are kept in CPU memory", len(blocks))


def _frozen(block: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str, torch.nn.Parameter]]:
    """(module, name, parameter) of a block's frozen weights, except adapters' weights, which stay on the device."""
    for _, module in outer_modules(block):
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                yield module, name, parameter


class _SwappedBlock:
    """A block whose frozen parameters are replaced by copies on the device during the forward pass."""

    def __init__(self, block: torch.nn.Module, memory: MainMemory):
        self.memory, self.present = memory, False
        self.places: dict[torch.nn.Module, dict[str, torch.nn.Parameter]] = {}
        for module, name, parameter in _frozen(block):
            self.places.setdefault(module, {})[name] = parameter
            parameter.data = memory.keep(parameter.data)
        for module, kept in self.places.items():
            module._apply = self._passing_by(module, kept)  # type: ignore[method-assign]
        self.compute = block.forward
        block.forward = self.forward

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for kept in self.places.values() for parameter in kept.values()]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for module, kept in self.places.items():
            for name, parameter in kept.items():
                copy = torch.nn.Parameter(self.memory.bring(parameter.data), requires_grad=False)
                module._parameters[name] = copy
        self.present = True
        try:  # checkpointing stops a recomputation early by raising an exception
            return self.compute(*args, **kwargs)
        finally:
            self.present = False
            for module, kept in self.places.items():
                module._parameters.update(kept)

    def _passing_by(
        self, module: torch.nn.Module, kept: Mapping[str, torch.nn.Parameter]
    ) -> Callable[..., torch.nn.Module]:
        """The module's `_apply`, which `to` and similar methods call, without the swapped weights."""
        apply = module._apply

        def passing_by(*args: Any, **kwargs: Any) -> torch.nn.Module:
            if self.present:
                return apply(*args, **kwargs)
            module._parameters.update(dict.fromkeys(kept))
            try:
                return apply(*args, **kwargs)
            finally:
                module._parameters.update(kept)

        return passing_by
