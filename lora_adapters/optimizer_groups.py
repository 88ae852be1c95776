"""Optimizer groups of adapters: learning rates for the U-Net, its blocks, the text encoders, and LoRA+."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.names import ModuleName
from lora_adapters.convert.families.registry import by_modules
from lora_adapters.types.layers import layers
from lora_adapters.types.registry import parts_of

from .injection import unwrapped


def _unet_blocks(paths: list[str], weights: Sequence[float]) -> dict[str, int]:
    """The block of each path; AdapterError where there are not as many weights as blocks."""
    family = by_modules(ModuleName("unet", path) for path in paths)
    if len(weights) != family.blocks.count:
        raise AdapterError(
            f"block_lr_weights has {len(weights)} values, {family.title}'s U-Net has {family.blocks.count} blocks"
        )
    return {path: index for path in paths if (index := family.blocks.index(path)) is not None}


def _first(*ratios: float | None) -> float | None:
    return next((ratio for ratio in ratios if ratio is not None), None)


def _rates(
    model: nn.Module, adapter_name: str, name: str, lr: float, ratio: float | None, weights: Sequence[float] | None
) -> Iterator[tuple[str, float, nn.Module]]:
    """(group, learning rate, factor) for each factor of the adapter in one model, DoRA's magnitudes among them.

    A module outside of the blocks has the model's own group and rate.
    """
    found = list(layers(unwrapped(model), adapter_name))
    blocks = _unet_blocks([path for path, _ in found], weights) if weights is not None else {}
    for path, layer in found:
        group, rate = name, lr
        if weights is not None and path in blocks:
            group, rate = f"{name}_block{blocks[path]}", lr * weights[blocks[path]]
        plus = (group, rate) if ratio is None else (f"{group} plus", rate * ratio)
        for kind, part in parts_of(layer, adapter_name):
            yield (*plus, part) if kind == "up" else (group, rate, part)


def param_groups(
    unet: nn.Module | None = None,
    text_encoders: Sequence[nn.Module] = (),
    *,
    lr: float,
    unet_lr: float | None = None,
    text_encoder_lr: float | Sequence[float] | None = None,
    block_lr_weights: Sequence[float] | None = None,
    loraplus_lr_ratio: float | None = None,
    loraplus_unet_lr_ratio: float | None = None,
    loraplus_text_encoder_lr_ratio: float | None = None,
    adapter_name: str = "default",
) -> list[dict[str, Any]]:
    """Optimizer groups of one adapter's trainable parameters.

    Args:
        unet: The U-Net, or None if it is not trained.
        text_encoders: The text encoders that are trained.
        lr: The learning rate.
        unet_lr: The U-Net's learning rate; None is lr.
        text_encoder_lr: The text encoders' learning rate, or one for each; None is lr.
        block_lr_weights: A factor of unet_lr for each block (see `block_lr_weights`). Layers outside of the blocks
            (conv_in) keep unet_lr.
        loraplus_lr_ratio: The ratio of the learning rates of `up` and `down` (LoRA+, arXiv:2402.12354).
        loraplus_unet_lr_ratio: The same for the U-Net; it takes precedence.
        loraplus_text_encoder_lr_ratio: The same for the text encoders.
        adapter_name: The adapter's name in the models.

    Returns:
        Groups for any torch optimizer, each with "params", "lr" and "name": unet, unet_block<index>, text_encoder,
        text_encoder_2, and these with " plus" for the `up` matrices. Groups with a rate of 0 are left out.

    Raises:
        AdapterError: There is nothing to train, or the number of rates or weights does not fit.

    >>> import torch
    >>> from lora_adapters import LierLaConfig
    >>> from peft import inject_adapter_in_model
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 5))
    >>> model = inject_adapter_in_model(LierLaConfig(r=4, target_modules=["0"]), model)
    >>> for group in param_groups(model, lr=1e-4, loraplus_lr_ratio=16):
    ...     print(group["name"], group["lr"], [list(parameter.shape) for parameter in group["params"]])
    unet 0.0001 [[4, 3]]
    unet plus 0.0016 [[5, 4]]
    """
    if text_encoder_lr is None or isinstance(text_encoder_lr, (int, float)):
        text_encoder_lr = [lr if text_encoder_lr is None else text_encoder_lr] * len(text_encoders)
    if len(text_encoder_lr) != len(text_encoders):
        raise AdapterError(f"text_encoder_lr has {len(text_encoder_lr)} values for {len(text_encoders)} text encoders")
    parts: list[tuple] = []
    text_ratio = _first(loraplus_text_encoder_lr_ratio, loraplus_lr_ratio)
    for number, (model, rate) in enumerate(zip(text_encoders, text_encoder_lr, strict=True), start=1):
        name = "text_encoder" if number == 1 else f"text_encoder_{number}"
        parts.append((model, adapter_name, name, rate, text_ratio, None))
    if unet is not None:
        rate, ratio = lr if unet_lr is None else unet_lr, _first(loraplus_unet_lr_ratio, loraplus_lr_ratio)
        parts.append((unet, adapter_name, "unet", rate, ratio, block_lr_weights))
    groups: dict[str, dict[str, Any]] = {}
    for part in parts:
        for name, rate, factor in _rates(*part):
            params = [parameter for parameter in factor.parameters() if parameter.requires_grad]
            if rate and params:
                groups.setdefault(name, {"params": [], "lr": rate, "name": name})["params"] += params
    if not groups:
        raise AdapterError(f"adapter {adapter_name} has nothing to train: no such layers, or every rate is 0")
    return list(groups.values())
