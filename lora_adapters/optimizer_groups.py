"""Parameter groups of adapters: learning rates for the U-Net, its blocks, the text encoders, and LoRA+."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.registry import DENOISER, by_class, by_modules, in_denoiser
from lora_adapters.types.layers import layers
from lora_adapters.types.registry import parts_of

from .injection import unwrapped
from .module_patterns import first_match, names_in


def _blocks(model: nn.Module, paths: list[str], weights: Sequence[float]) -> dict[str, int]:
    """The block index of each path; AdapterError if the number of weights is not the number of blocks."""
    family = by_class(model) or by_modules(in_denoiser(paths))
    if len(weights) != family.blocks.count:
        raise AdapterError(
            f"block_lr_weights has {len(weights)} values, the denoiser of {family.title} has "
            f"{family.blocks.count} blocks"
        )
    return {path: index for path in paths if (index := family.blocks.index(path)) is not None}


def _first(*ratios: float | None) -> float | None:
    return next((ratio for ratio in ratios if ratio is not None), None)


def _rates(
    model: nn.Module,
    adapter_name: str,
    name: str,
    lr: float,
    ratio: float | None,
    weights: Sequence[float] | None,
    reg_lrs: Mapping[str, float],
) -> Iterator[tuple[str, float, nn.Module]]:
    """(group, learning rate, factor) for each factor of the adapter in one model, including DoRA's magnitudes.

    A module outside of the blocks is in the model's own group; a module that matches a pattern of `reg_lrs` is in a
    group for this pattern, with its rate.
    """
    model = unwrapped(model)
    adapted = list(layers(model, adapter_name))
    blocks = _blocks(model, [path for path, _ in adapted], weights) if weights is not None else {}
    names, patterns, has_up = names_in([path for path, _ in adapted]), list(reg_lrs), False
    for path, layer in adapted:
        group, rate = name, lr
        if weights is not None and path in blocks:
            group, rate = f"{name}_block{blocks[path]}", lr * weights[blocks[path]]
        if (pattern := first_match(patterns, names(path))) is not None:
            group, rate = f"{name}_reg{patterns.index(pattern)}", reg_lrs[pattern]
        plus = (group, rate) if ratio is None else (f"{group} plus", rate * ratio)
        for kind, part in parts_of(layer, adapter_name):
            has_up |= kind == "up"
            yield (*plus, part) if kind == "up" else (group, rate, part)
    if ratio is not None and adapted and not has_up:
        raise AdapterError("LoRA+'s ratio has no effect: no module of the adapter has an `up` or an equivalent factor")


def _text_rates(rates: float | Sequence[float] | None, lr: float, count: int) -> Sequence[float]:
    """A learning rate for each of `count` text encoders; AdapterError for a list of another length."""
    if rates is None or isinstance(rates, (int, float)):
        return [lr if rates is None else rates] * count
    if len(rates) != count:
        raise AdapterError(f"text_encoder_lr has {len(rates)} values for {count} text encoders")
    return rates


def _denoiser_name(model: nn.Module) -> str:
    family = by_class(unwrapped(model))
    return DENOISER if family is None else family.denoiser.name


def _grouped(parts: Sequence[tuple], adapter_name: str) -> list[dict[str, Any]]:
    """Parameter groups of the parts, each of which is the arguments of `_rates`; AdapterError if nothing is trained."""
    groups: dict[str, dict[str, Any]] = {}
    for part in parts:
        for name, rate, factor in _rates(*part):
            params = [parameter for parameter in factor.parameters() if parameter.requires_grad]
            if rate and params:
                groups.setdefault(name, {"params": [], "lr": rate, "name": name})["params"] += params
    if not groups:
        raise AdapterError(f"adapter {adapter_name} has nothing to train: it has no layers, or every rate is 0")
    return list(groups.values())


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
    reg_lrs: Mapping[str, float] | None = None,
    adapter_name: str = "default",
) -> list[dict[str, Any]]:
    """Create optimizer parameter groups of one adapter's trainable parameters.

    Args:
        unet: The U-Net or transformer, or None if it is not trained.
        text_encoders: The text encoders that are trained.
        lr: The learning rate.
        unet_lr: The U-Net's or transformer's learning rate; None is lr.
        text_encoder_lr: The text encoders' learning rate, or one for each; None is lr.
        block_lr_weights: A factor of unet_lr for each block. Layers outside the blocks (conv_in) keep unet_lr.
        loraplus_lr_ratio: The ratio of the learning rates of `up` and `down` (LoRA+, arXiv:2402.12354).
        loraplus_unet_lr_ratio: The same for the U-Net or transformer; it takes precedence.
        loraplus_text_encoder_lr_ratio: The same for the text encoders.
        reg_lrs: Learning rates by regular expression (see `module_patterns`), which take precedence over all others.
        adapter_name: The adapter's name in the models.

    Returns:
        Groups for any torch optimizer, each with "params", "lr" and "name": unet (or transformer), unet_block<index>,
        unet_reg<index>, text_encoder, text_encoder_2, and these with " plus" for `up`. No group has a rate of 0.

    Raises:
        AdapterError: There is nothing to train, the number of rates or weights does not match, or a ratio is given and
            no module has an `up` or its equivalent in other types of adapters.

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
    parts: list[tuple] = []
    text_ratio = _first(loraplus_text_encoder_lr_ratio, loraplus_lr_ratio)
    text_rates = _text_rates(text_encoder_lr, lr, len(text_encoders))
    for number, (model, rate) in enumerate(zip(text_encoders, text_rates, strict=True), start=1):
        name = "text_encoder" if number == 1 else f"text_encoder_{number}"
        parts.append((model, adapter_name, name, rate, text_ratio, None, reg_lrs or {}))
    if unet is not None:
        rate, ratio = lr if unet_lr is None else unet_lr, _first(loraplus_unet_lr_ratio, loraplus_lr_ratio)
        parts.append((unet, adapter_name, _denoiser_name(unet), rate, ratio, block_lr_weights, reg_lrs or {}))
    return _grouped(parts, adapter_name)
