"""--blocks_to_swap: frozen weights of transformer blocks wait in main memory, and are on the device while needed.

While a block computes, copies on the device stand in place of its frozen parameters; then the parameters are put back.
What autograd keeps for the backward pass are the copies. Of a checkpointed block it keeps nothing in the first forward
pass, and lets go of the recomputation's copies as the backward pass uses them up. So a copy lives as long as something
needs it, and nothing has to find out when the backward pass of a block has ended.
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
    "torch_compile": "compiled blocks keep hold of their weights; leave it out",
}


def check_block_swap(settings: Settings) -> None:
    """Raise OptionError for what --blocks_to_swap cannot be beside, and TrainingError where there is no CUDA device."""
    if not settings.blocks_to_swap:
        return
    if not settings.gradient_checkpointing:
        raise OptionError(
            "--blocks_to_swap needs --gradient_checkpointing: without it all weights wait for the backward pass on the "
            "device"
        )
    for name, reason in _APART.items():
        if getattr(settings, name):
            raise OptionError(f"--blocks_to_swap does not go with --{name}: {reason}")
    if not torch.cuda.is_available():
        raise TrainingError("--blocks_to_swap needs a CUDA device; leave it out")


def swapped_blocks(models: BaseModels, count: int | None) -> list[torch.nn.Module]:
    """The blocks whose frozen weights wait: the last of each stack, as many as the family makes of the number.

    Args:
        models: The base model.
        count: --blocks_to_swap; None and 0 mean no block.

    Returns:
        The blocks.

    Raises:
        OptionError: There are not so many.
    """
    chosen: list[torch.nn.Module] = []
    for stack, number in models.family.blocks_to_swap(count or 0).items():
        blocks: Any = getattr(models.denoiser, stack)
        if number > len(blocks):
            raise OptionError(
                f"--blocks_to_swap {count}: that is {number} {stack} of this {models.family.denoiser_title}, and it "
                f"has {len(blocks)}"
            )
        chosen += list(blocks)[len(blocks) - number :]
    return chosen


def bytes_away(models: BaseModels, count: int | None) -> int:
    """Bytes of the denoiser that --blocks_to_swap keeps off the device: of the swapped blocks, all but the largest."""
    sizes = [
        sum(parameter.numel() * parameter.element_size() for _, _, parameter in _frozen(block))
        for block in swapped_blocks(models, count)
    ]
    return sum(sizes) - max(sizes, default=0)


class MainMemory:
    """Where frozen weights wait: pinned memory, from which a device copies without staging."""

    def __init__(self, device: torch.device):
        self.device = device

    def keep(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight as it waits."""
        try:
            return weight.cpu().pin_memory()
        except RuntimeError as error:
            raise TrainingError(
                "--blocks_to_swap: too little main memory can be pinned; give a smaller number, or --fp8_base"
            ) from error

    def bring(self, kept: torch.Tensor) -> torch.Tensor:
        """A copy on the device of what `keep` returned. What computes with it there waits for the copy."""
        return kept.to(self.device, non_blocking=True)


def swap_blocks(models: BaseModels, wrapper: torch.nn.Module, count: int | None, memory: MainMemory) -> None:
    """Let the frozen weights of the last blocks wait in main memory. Call it with everything frozen that is not
    trained, and before the model goes to the device, which then passes them by.

    Args:
        models: The base model with the adapters, in main memory; changed in place.
        wrapper: The module with the denoiser in it, which DistributedDataParallel gets: it is told to pass these
            weights by, too.
        count: --blocks_to_swap.
        memory: Where the weights wait.
    """
    blocks = swapped_blocks(models, count)
    if not blocks:
        return
    away = {id(parameter) for block in blocks for parameter in _SwappedBlock(block, memory).parameters}
    names = [name for name, parameter in wrapper.named_parameters() if id(parameter) in away]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(wrapper, names)
    log.info("%d blocks wait in main memory", len(blocks))


def _frozen(block: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str, torch.nn.Parameter]]:
    """(module, name in it, parameter) of a block's frozen weights but those of adapters, which stay on the device."""
    for _, module in outer_modules(block):
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                yield module, name, parameter


class _SwappedBlock:
    """A block whose frozen parameters are replaced by copies on the device while it computes."""

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
        try:  # a recomputation ends by an exception as soon as it has what the backward pass needs
            return self.compute(*args, **kwargs)
        finally:
            self.present = False
            for module, kept in self.places.items():
                module._parameters.update(kept)

    def _passing_by(
        self, module: torch.nn.Module, kept: Mapping[str, torch.nn.Parameter]
    ) -> Callable[..., torch.nn.Module]:
        """The module's `_apply`, which `to` and its like call, without the weights that wait."""
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
