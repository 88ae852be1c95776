"""`save_lora_weights` for adapters that are not only low-rank pairs: they are written in LyCORIS' format.

The callers pass tensors of a model's state dict. Their meaning (alphas, kinds) is only known to the model, so the
adapter is looked up in the live models.
"""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lora_adapters.convert.adapter import Adapter
from lora_adapters.convert.deltas.base import Delta, with_tensors
from lora_adapters.convert.deltas.low_rank import LowRank
from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.names import ModuleName
from lora_adapters.convert.formats.diffusers import split_key
from lora_adapters.convert.storage.sources import DIFFUSERS_NAME
from lora_adapters.types.registry import is_ours

from .adapted_models import remembered
from .injection import extract_changes, module_named

# A tensor of `types.lycoris.weights.DeltaWeights`, with PEFT's name in state dicts.
_FIELD = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_A\.(?!weight$)(\w+)")
_LAYERS = "_lora_layers"  # the suffix of the argument for a component
Tensors = dict[tuple[ModuleName, str], torch.Tensor]


def saved(arguments: Mapping[str, Any]) -> bool:
    """Write the file of `save_lora_weights` if tensors belong to other kinds than low-rank pairs.

    Args:
        arguments: The arguments of `save_lora_weights` by name.

    Returns:
        Whether the file was written; False for plain LoRA, which diffusers saves.

    Raises:
        AdapterError: The tensors do not belong to an adapter in memory, or the file cannot be written.
    """
    models_or_states = {
        name.removesuffix(_LAYERS): value for name, value in arguments.items() if name.endswith(_LAYERS) and value
    }
    states = {
        component: value.state_dict() if isinstance(value, torch.nn.Module) else value
        for component, value in models_or_states.items()
    }
    if not any(_FIELD.fullmatch(key) for state in states.values() for key in state):
        return False
    if not arguments.get("safe_serialization", True):
        raise AdapterError("adapters of other kinds than LoRA need safetensors: use safe_serialization=True")
    modules: dict[ModuleName, Delta] = {}
    for component, state in states.items():
        changes = _changes_with(component, _named(component, state))
        if changes is None:
            raise AdapterError(
                f"the {component}'s tensors do not belong to an adapter in memory, so their meaning is unknown: save "
                "with Adapter.from_pipeline(pipe, adapter_name).save(path)"
            )
        modules |= changes
    folder = Path(arguments["save_directory"])
    if folder.is_file():
        raise AdapterError(f"{folder} is a file: give a folder to save in")
    folder.mkdir(parents=True, exist_ok=True)
    Adapter(modules).save(folder / (arguments.get("weight_name") or DIFFUSERS_NAME))
    return True


def _named(component: str, state: Mapping[str, torch.Tensor]) -> Tensors:
    """The tensors by module and name of the field or factor."""
    tensors: Tensors = {}
    for key, tensor in state.items():
        match = _FIELD.fullmatch(key)
        place = (module_named(component, match[1]), match[2]) if match else split_key(f"{component}.{key}")
        if place is None:
            raise AdapterError(f"{component}.{key:.120} is not a tensor of an adapter")
        tensors[place] = tensor
    return tensors


def _changes_with(component: str, tensors: Tensors) -> dict[ModuleName, Delta] | None:
    """The changes of the adapter in memory that has these tensors; None if no adapter has them."""
    for model in remembered():
        for name in getattr(model, "peft_config", {}):
            if not is_ours(model, name):
                continue
            try:
                changes = extract_changes(model, component, name)
            except AdapterError:
                continue  # the adapter uses an unsupported PEFT feature
            if _are_equal(_tensors_of(changes), tensors):
                return changes
    return None


def _tensors_of(changes: Mapping[ModuleName, Delta]) -> Tensors:
    tensors: Tensors = {}
    for module, change in changes.items():
        if isinstance(change, LowRank):
            tensors[module, "down"], tensors[module, "up"] = change.down, change.up
        else:
            with_tensors(change, partial(_note, tensors, module))
    return tensors


def _note(tensors: Tensors, module: ModuleName, name: str, tensor: torch.Tensor) -> torch.Tensor:
    tensors[module, name] = tensor
    return tensor


def _are_equal(live: Tensors, tensors: Tensors) -> bool:
    """Whether the values are equal, after casting to the dtypes of the given tensors."""
    return live.keys() == tensors.keys() and all(
        not tensor.is_meta
        and tensor.numel() == tensors[place].numel()
        and torch.equal(tensor.to(tensors[place]).flatten(), tensors[place].flatten())
        for place, tensor in live.items()
    )
