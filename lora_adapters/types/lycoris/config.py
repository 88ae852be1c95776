"""Adapters of any kinds: LoHa, LoKr, DoRA, full, norms, GLoRA, IA3, OFT, BOFT, and mixes of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from peft.tuners.lora.layer import LoraLayer
from torch import nn

from lora_adapters.convert.deltas.base import Delta, with_tensors
from lora_adapters.convert.errors import AdapterError
from lora_adapters.types.adapter_type import AdapterType
from lora_adapters.types.base import AdapterConfig
from lora_adapters.types.layers import layers

from .layer import DeltaVariant, held
from .norm_layer import NormLayer
from .operations import NORMS


@dataclass
class LycorisConfig(AdapterConfig):
    """An adapter whose modules may each be changed in another way: by LoHa, LoKr, DoRA, full, norm and others.

    What a module's change is, stands in the layer, not here: `layer.hold` puts it there. Modules without a change of
    their own are plain LoRA. Source: LyCORIS (arXiv:2309.14859).
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._register_custom_module(dict.fromkeys(NORMS, NormLayer))


class LycorisType(AdapterType):
    """Changes of any kinds, with plain LoRA for the pairs among them."""

    name, title, config = "Lycoris", "LyCORIS", LycorisConfig
    variant = DeltaVariant

    def detach(self, model: nn.Module, adapter_name: str) -> None:
        """Drop the variants of an adapter that is no longer in its layers, which old releases of PEFT leave."""
        for layer in model.modules():
            if not isinstance(layer, LoraLayer) or not isinstance(layer.lora_variant.get(adapter_name), DeltaVariant):
                continue
            if held(layer, adapter_name) is None:
                del layer.lora_variant[adapter_name]

    def delta(self, layer: Any, adapter_name: str, stabilized: bool = False) -> Delta:
        """The change that the layer holds; its tensors are the live parameters, without gradients."""
        return with_tensors(layer.lora_A[adapter_name].change, lambda _, tensor: tensor.detach())

    def parts(self, layer: Any, adapter_name: str) -> Iterator[tuple[str, nn.Module]]:
        """All tensors of the change are of the kind "change"."""
        yield "change", layer.lora_A[adapter_name]

    @contextmanager
    def as_used(self, model: nn.Module, adapter_names: list[str]) -> Iterator[None]:
        """AdapterError where an adapter has a change that is no pair: factors alone cannot stand for it."""
        for name in adapter_names:
            for path, layer in layers(model, name):
                if (weights := held(layer, name)) is not None:
                    kind = weights.change.kind
                    raise AdapterError(f"adapter {name} has a {kind} in {path}, which no low-rank pair stands for")
        yield


TYPE = LycorisType()
