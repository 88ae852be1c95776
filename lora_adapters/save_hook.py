"""Completes what diffusers saves of this package's adapters.

Training scripts get the tensors of a model (`get_peft_model_state_dict`), rename them
(`convert_state_dict_to_diffusers`) and pass them to `save_lora_weights`. Many do not pass the config, without which
alpha is assumed to be the rank and DyLoRA options are lost. Besides, only the attention's tensors are renamed, so that
a loader that recognises the format by the first name skips the others. So for adapters of this package, the config is
looked up in the models that the tensors come from, and all names are written in PEFT's form.
"""

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lora_adapters.convert.deltas.base import with_article
from lora_adapters.convert.deltas.low_rank import LowRank
from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.names import COMPONENTS, ModuleName
from lora_adapters.convert.formats.diffusers import split_key
from lora_adapters.types import layers as lora_layers  # as a module, which may be only partly loaded now

from .adapted_models import remembered

logger = logging.getLogger(__name__)
_FACTOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight")  # PEFT's names in files


def completed(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `save_lora_weights` to replace, for the components with adapters of this package."""
    changed: dict[str, Any] = {}
    for component in COMPONENTS:
        layers, name = arguments.get(f"{component}_lora_layers"), f"{component}_lora_adapter_metadata"
        if not layers:
            continue
        tensors = layers.state_dict() if isinstance(layers, nn.Module) else layers
        halves = {key: split_key(f"{component}.{key}") for key in tensors}
        configs = _configs(component, tensors, halves)
        if not configs:
            continue
        ranks = configs[0][1]
        changed[f"{component}_lora_layers"] = {
            _peft_name(key, *half): _cut(tensors[key], half[1], ranks[half[0]])
            for key, half in halves.items()
            if half is not None
        }
        if arguments.get(name) or not arguments.get("safe_serialization", True):  # pickles cannot store metadata
            continue
        if len(configs) == 1:
            changed[name] = configs[0][0]
        else:
            logger.warning("The %s's adapter is saved without alphas: several adapters in memory match it.", component)
    return changed


def _peft_name(key: str, module: ModuleName, half: str) -> str:
    """The tensor's name in PEFT's form, with `text_model.` if the key has it."""
    path = module.path if key.startswith("text_model.") else module.path.removeprefix("text_model.")
    return f"{path}.lora_{'A' if half == 'down' else 'B'}.weight"


def _cut(tensor: torch.Tensor, half: str, rank: int) -> torch.Tensor:
    """The tensor without the padding for hot-swapping."""
    return (tensor[:rank] if half == "down" else tensor[:, :rank]).contiguous()


def cutting(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Replacement for PEFT's `get_peft_model_state_dict`, which saves this package's adapters without their padding.

    Their configs have the ranks without padding.

    Args:
        stock: The original function.

    Returns:
        The replacement.
    """

    def get_peft_model_state_dict(
        model: Any, state_dict: Any = None, adapter_name: str = "default", *args: Any, **kwargs: Any
    ) -> Any:
        from lora_adapters.types.registry import is_ours

        from .injection import unwrapped

        tensors, inner = stock(model, state_dict, adapter_name, *args, **kwargs), unwrapped(model)
        if not is_ours(inner, adapter_name):
            return tensors
        check_pairs(inner, adapter_name, "PEFT")
        ranks = {path: layer.r[adapter_name] for path, layer in lora_layers.layers(inner, adapter_name)}
        cut = {}
        for key, tensor in tensors.items():
            match = _FACTOR.fullmatch(key)
            path, half = (match[1].replace(".base_layer", ""), match[2]) if match else ("", "")
            cut[key] = _cut(tensor, "down" if half == "A" else "up", ranks[path]) if path in ranks else tensor
        return cut

    return get_peft_model_state_dict


def check_pairs(model: nn.Module, adapter_name: str, writer: str) -> None:
    """Raise AdapterError if an adapter has changes that files of PEFT or diffusers cannot store."""
    from lora_adapters.types.lycoris.layer import held

    for path, layer in lora_layers.layers(model, adapter_name):
        if (weights := held(layer, adapter_name)) is not None:
            kind = with_article(weights.change.kind)
            raise AdapterError(
                f"adapter {adapter_name} has {kind} in {path}, which {writer}'s files cannot store: save it with "
                "Adapter.from_models"
            )


Found = tuple[dict[str, Any], dict[ModuleName, int]]  # a config, and the rank of each module


def _configs(component: str, tensors: Mapping[str, Any], halves: Mapping[str, Any]) -> list[Found]:
    """The different configs of adapters with these weights; only one if these are the adapter's own tensors.

    Tensors are compared by value, so that copies in another dtype or on another device match too.
    """
    if not all(halves.values()) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        return []
    widths = {half[0]: tensors[key].shape[0] for key, half in halves.items() if half[1] == "down"}
    places = {tensor.data_ptr() for tensor in tensors.values()}
    stored = {half: tensors[key] for key, half in halves.items()}
    alike: dict[str, Found] = {}
    for config, pairs, held in _adapters(component):
        if held == widths:
            config_and_ranks = config.to_dict(), {module: pair.rank for module, pair in pairs.items()}
            if any(pair.down.data_ptr() in places for pair in pairs.values()):
                return [config_and_ranks]
            if not all(_equal(pair, stored, module) for module, pair in pairs.items()):
                continue
            alike[json.dumps(config_and_ranks[0], sort_keys=True, default=sorted)] = config_and_ranks
    return list(alike.values())


def _equal(pair: LowRank, stored: Mapping[Any, torch.Tensor], module: ModuleName) -> bool:
    """Whether the pair equals the tensors given for the module, after casting to their dtype."""
    for half, live in (("down", pair.down), ("up", pair.up)):
        tensor = stored.get((module, half))
        if tensor is None or live.is_meta:  # offloaded weights cannot be compared
            return False
        tensor = _cut(tensor, half, pair.rank)
        if not torch.equal(live.to(tensor).reshape(-1), tensor.reshape(-1)):
            return False
    return True


def _adapters(component: str) -> Iterator[tuple[Any, dict[ModuleName, LowRank], dict[ModuleName, int]]]:
    """Config, pairs and padded ranks of this package's adapters in live models that consist only of pairs."""
    from lora_adapters.types.registry import is_ours

    from .injection import extract_changes, is_plain, widths

    for model in remembered():
        for name, config in getattr(model, "peft_config", {}).items():
            if is_ours(model, name) and is_plain(model, name):  # DoRA's tensors are saved by diffusers unchanged
                pairs: Any = extract_changes(model, component, name)
                yield config, pairs, widths(model, component, name)
