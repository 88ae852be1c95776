"""The live models that have adapters of this package."""

import threading
import weakref

from torch import nn

_models: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
_lock = threading.Lock()  # pipelines may be loaded and saved in several threads


def remember(model: nn.Module) -> None:
    """Note a model that has an adapter of this package."""
    with _lock:
        _models.add(model)


def remembered() -> list[nn.Module]:
    """The models that have adapters of this package, as far as they are still in memory."""
    with _lock:
        return list(_models)
