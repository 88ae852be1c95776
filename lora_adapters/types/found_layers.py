"""Finding PEFT's layers in a model, with a cache that is valid until the model changes."""

import weakref
from collections.abc import Iterator
from typing import Any

from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


def outer_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model like `named_modules`, but without the adapters' modules inside of PEFT's layers.

    A layer with several adapters has dozens of these, but only PEFT's layers and the wrapped layers are needed.

    Args:
        model: The model.

    Yields:
        (path, module).
    """
    seen = set[int]()
    rest: list[tuple[str, nn.Module]] = [("", model)]
    while rest:
        path, module = rest.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        prefix = f"{path}." if path else ""
        rest.extend([(prefix + name, child) for name, child in reversed(_children(module)) if child is not None])


def _children(module: nn.Module) -> list[tuple[str, nn.Module | None]]:
    """The submodules of a module; for PEFT's layers only the wrapped layer."""
    inner = module._modules
    if isinstance(module, BaseTunerLayer) and "base_layer" in inner:
        return [("base_layer", inner["base_layer"])]
    return list(inner.items())


def _is_leaf(module: nn.Module) -> bool:
    """Whether a module is one of torch's layers, which never get submodules."""
    return type(module).__module__.startswith("torch.nn.modules.") and not isinstance(
        module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)
    )


class _Found:
    """The layers found in a model, and the information to check whether the model has changed."""

    def __init__(self, model: nn.Module):
        self.layers: list[tuple[str, weakref.ref[Any]]] = []
        self.structure: list[tuple[weakref.ref[nn.Module], tuple[int, ...]]] = []
        self.wrapped: list[tuple[weakref.ref[nn.Module], int]] = []
        for path, module in outer_modules(model):
            if isinstance(module, BaseTunerLayer):
                self.layers.append((path, weakref.ref(module)))
                self.wrapped.append((weakref.ref(module), id(module._modules.get("base_layer"))))
            elif module._modules or not _is_leaf(module):
                self.structure.append((weakref.ref(module), tuple(map(id, module._modules.values()))))

    def are_all(self) -> bool:
        """Whether the model has the same modules as at the time of the search."""
        for reference, children in self.structure:
            module = reference()
            if module is None or tuple(map(id, module._modules.values())) != children:
                return False
        for reference, child in self.wrapped:
            module = reference()
            if module is None or id(module._modules.get("base_layer")) != child:
                return False
        return True


_found: "weakref.WeakKeyDictionary[nn.Module, _Found]" = weakref.WeakKeyDictionary()


def tuner_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """(path, layer) of every PEFT layer of any type, with the paths of `named_modules`."""
    known = _found.get(model)
    if known is None or not known.are_all():
        known = _found[model] = _Found(model)
    return [(path, layer()) for path, layer in known.layers]


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(path, layer) of every LoRA layer; the path is the adapted layer's own."""
    for path, layer in tuner_layers(model):
        if isinstance(layer, LoraLayer):
            yield path.replace(".base_layer", ""), layer  # in a mixed model, it may be wrapped by another PEFT layer
