"""The weights of a model that some kinds of changes depend on."""

from pathlib import Path

import torch

from lora_adapters.convert.adapter import Adapter
from lora_adapters.convert.deltas.scaled_bias import scales_bias, with_base_bias
from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.names import ModuleName, bias_of
from lora_adapters.convert.storage.checkpoint import Checkpoint


class BaseWeights:
    """The weights of a model in float32, read one at a time.

    Args:
        model: A checkpoint file or a Diffusers folder.

    Raises:
        AdapterError: It cannot be read.
    """

    def __init__(self, model: str | Path):
        self._checkpoint = Checkpoint.open(model)
        self._modules, self._parameters = self._checkpoint.modules, self._checkpoint.parameters

    @classmethod
    def of(cls, model: str | None) -> "BaseWeights | None":
        """Those of the model that `--sd_model` names; None if it names none."""
        return None if model is None else cls(model)

    def __call__(self, module: ModuleName) -> torch.Tensor:
        """The weight of a module; AdapterError if the model does not have it."""
        if module not in self._modules:
            raise AdapterError(f"{self._checkpoint.path} does not have it")
        return self._checkpoint.read(module, self._modules[module]).to(torch.float32)

    def with_biases(self, adapter: Adapter) -> Adapter:
        """The adapter for this model: what scales a bias that the model has, is a change of it; see `scaled_bias`."""
        modules = dict(adapter.modules)
        for module, change in adapter.modules.items():
            if not scales_bias(change) or (bias := bias_of(module)) not in self._parameters:
                continue
            weight, own = (self._checkpoint.weight(name, self._parameters[name]) for name in (module, bias))
            if change.fits(tuple(weight.shape)):
                modules[module] = with_base_bias(change, own)
        return adapter.with_modules(modules)
