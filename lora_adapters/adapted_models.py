"""The live models that have adapters of this package, and the lock for threads that change models."""

import os
import threading
import weakref

from torch import nn

_models: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
_lock = threading.Lock()  # pipelines may be loaded and saved in several threads

# While PEFT creates layers on the meta device, it patches torch.nn.Module itself: parameters that another thread sets
# meanwhile have no memory either, and of two such threads one may leave the patch behind. So only one thread at a time
# may add adapters.
CHANGING = threading.RLock()

if hasattr(os, "register_at_fork"):  # a process that is forked while the lock is held would wait for it forever
    os.register_at_fork(before=CHANGING.acquire, after_in_parent=CHANGING.release, after_in_child=CHANGING.release)
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def remember(model: nn.Module) -> None:
    """Note a model that has an adapter of this package."""
    with _lock:
        _models.add(model)


def remembered() -> list[nn.Module]:
    """The models with adapters of this package that are still in memory."""
    with _lock:
        return list(_models)
