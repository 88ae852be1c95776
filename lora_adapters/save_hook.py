"""Completes what diffusers saves of this package's adapters.

Training scripts take the tensors out of a model (`get_peft_model_state_dict`), rename them
(`convert_state_dict_to_diffusers`) and give them to `save_lora_weights`. Many leave the config out, without which alpha
is taken to be the rank and a DyLoRA is forgotten. And only the attention's tensors are renamed, of which a loader that
looks at the first name alone then reads a part and leaves the rest. So for adapters of this package the config is
looked up in the models that the tensors come from, and the names are PEFT's throughout.
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
from lora_adapters.types import layers as lora_layers  # whole: it may be half loaded here

from .adapted_models import remembered

logger = logging.getLogger(__name__)
_FACTOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight")  # as PEFT names it in files


def completed(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `save_lora_weights` that are to be others, for the components with adapters of this package."""
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
        if arguments.get(name) or not arguments.get("safe_serialization", True):  # pickles have no metadata
            continue
        if len(configs) == 1:
            changed[name] = configs[0][0]
        else:
            logger.warning("The %s's adapter is saved without its alphas: several in memory look like it.", component)
    return changed


def _peft_name(key: str, module: ModuleName, half: str) -> str:
    """The tensor's name in PEFT's form, with the `text_model.` level where it has that."""
    path = module.path if key.startswith("text_model.") else module.path.removeprefix("text_model.")
    return f"{path}.lora_{'A' if half == 'down' else 'B'}.weight"


def _cut(tensor: torch.Tensor, half: str, rank: int) -> torch.Tensor:
    """The tensor without the zeros that an adapter is padded with to be swapped for larger ones."""
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
    """AdapterError if an adapter has changes that have no place in the files of PEFT or diffusers."""
    from lora_adapters.types.lycoris.layer import held

    for path, layer in lora_layers.layers(model, adapter_name):
        if (weights := held(layer, adapter_name)) is not None:
            kind = with_article(weights.change.kind)
            raise AdapterError(
                f"adapter {adapter_name} has {kind} in {path}, for which {writer}'s files have no place: save it with "
                "Adapter.from_models"
            )


Found = tuple[dict[str, Any], dict[ModuleName, int]]  # a config, and the rank of each module


def _configs(component: str, tensors: Mapping[str, Any], halves: Mapping[str, Any]) -> list[Found]:
    """The different configs of adapters with these weights; the one whose very tensors these are, if it is among them.

    Copies, also in another dtype or on another device, have an adapter's weights; equal widths alone say nothing.
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
    """Whether the pair is what is given for the module, as far as the given dtype can tell."""
    for half, live in (("down", pair.down), ("up", pair.up)):
        tensor = stored.get((module, half))
        if tensor is None or live.is_meta:  # offloaded weights are nowhere to be compared
            return False
        tensor = _cut(tensor, half, pair.rank)
        if not torch.equal(live.to(tensor).reshape(-1), tensor.reshape(-1)):
            return False
    return True


def _adapters(component: str) -> Iterator[tuple[Any, dict[ModuleName, LowRank], dict[ModuleName, int]]]:
    """Config, pairs and widths (ranks with padding) of this package's adapters that are pairs alone, in live models."""
    from lora_adapters.types.registry import is_ours

    from .injection import extract_changes, is_plain, widths

    for model in remembered():
        for name, config in getattr(model, "peft_config", {}).items():
            if is_ours(model, name) and is_plain(model, name):  # DoRA's tensors go to diffusers as they are
                pairs: Any = extract_changes(model, component, name)
                yield config, pairs, widths(model, component, name)
