"""The weights of the base model, on which some kinds of changes depend."""

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
        AdapterError: The model cannot be read.
    """

    def __init__(self, model: str | Path):
        self._checkpoint = Checkpoint.open(model)
        self._modules, self._parameters = self._checkpoint.modules, self._checkpoint.parameters

    @classmethod
    def of(cls, model: str | None) -> "BaseWeights | None":
        """The weights of the model given by `--sd_model`; None if no model is given."""
        return None if model is None else cls(model)

    def __call__(self, module: ModuleName) -> torch.Tensor:
        """The weight of a module; AdapterError if the model does not have it."""
        if module not in self._modules:
            raise AdapterError(f"{self._checkpoint.path} does not have this module")
        return self._checkpoint.read(module, self._modules[module]).to(torch.float32)

    def with_biases(self, adapter: Adapter) -> Adapter:
        """The adapter with changes that scale a bias replaced by additive ones for this model; see `scaled_bias`."""
        modules = dict(adapter.modules)
        for module, change in adapter.modules.items():
            if not scales_bias(change) or (bias := bias_of(module)) not in self._parameters:
                continue
            weight, own = (self._checkpoint.weight(name, self._parameters[name]) for name in (module, bias))
            if change.fits(tuple(weight.shape)):
                modules[module] = with_base_bias(change, own)
        return adapter.with_modules(modules)
