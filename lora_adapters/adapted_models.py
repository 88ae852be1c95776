"""The live models that have adapters of this package."""

import weakref

from torch import nn

_models: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


def remember(model: nn.Module) -> None:
    """Note a model that has an adapter of this package."""
    _models.add(model)


def adapted() -> list[nn.Module]:
    """The models that are noted and still there."""
    return list(_models)
