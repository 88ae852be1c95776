"""A LoRA layer for normalisations, which PEFT does not support."""

import warnings
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from lora_adapters.convert.errors import AdapterError


class NormLayer(nn.Module, LoraLayer):
    """A LayerNorm or GroupNorm whose adapters change its weight and bias; see `layer.DeltaVariant`.

    PEFT and diffusers treat it as a LoRA layer for naming, weighting, fusing and deleting adapters.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any):
        super().__init__()
        with warnings.catch_warnings():  # PEFT warns about layers without in_features
            warnings.simplefilter("ignore")
            LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name)

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Prepare the layer for an adapter; `layer.hold` then sets its change."""
        self.r[adapter_name], self.lora_alpha[adapter_name], self.scaling[adapter_name] = 1, 1, 1.0
        self.lora_bias[adapter_name] = False
        if hasattr(self, "use_rslora"):  # older versions of PEFT do not have this attribute
            self.use_rslora[adapter_name] = False
        self.lora_dropout[adapter_name] = nn.Identity()
        self.lora_A[adapter_name], self.lora_B[adapter_name] = nn.Identity(), nn.Identity()
        self.set_adapter(self.active_adapters)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Normalise x, (..., channels) or (batch, channels, ...), with the active adapters' changes."""
        if kwargs.pop("adapter_names", None) is not None:
            raise AdapterError("adapters that change normalisations do not support an adapter for each sample")
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        dtype = result.dtype
        for name in self.active_adapters:
            if name in self.lora_variant:
                result = self.lora_variant[name].forward(self, active_adapter=name, x=x, result=result)
        return result.to(dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fuse adapters into the base layer; by default the active ones."""
        base: Any = self.get_base_layer()
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.lora_variant:
                continue
            if safe_merge:
                base.weight.data = self.lora_variant[name].merge_safe(self, name, base.weight.data)
            else:
                self.lora_variant[name].merge_unsafe(self, name, base.weight)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Unfuse all fused adapters from the base layer."""
        base: Any = self.get_base_layer()
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.lora_variant:
                base.weight.data = self.lora_variant[name].unmerge(self, name, base.weight)

    def __repr__(self) -> str:
        return f"lora.{super().__repr__()}"
