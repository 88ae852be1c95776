"""The models that have adapters of this package, for what is handed tensors alone and has to find whose they are."""

import weakref

from torch import nn

_models: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


def remember(model: nn.Module) -> None:
    """Note a model that has an adapter of this package."""
    _models.add(model)


def remembered() -> list[nn.Module]:
    """The models that have adapters of this package, as far as they are still in memory."""
    return list(_models)
