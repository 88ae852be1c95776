"""The live models that have adapters of this package, and what keeps threads that change models apart."""

import os
import threading
import weakref

from torch import nn

_models: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
_lock = threading.Lock()  # pipelines may be loaded and saved in several threads

# While PEFT makes layers without memory, torch.nn.Module itself is patched: a parameter that another thread sets in
# that time has no memory either, and of two such threads one may leave the patch behind. So adapters go in one by one.
CHANGING = threading.RLock()

if hasattr(os, "register_at_fork"):  # a process that is forked in the middle would wait for the thread forever
    os.register_at_fork(before=CHANGING.acquire, after_in_parent=CHANGING.release, after_in_child=CHANGING.release)
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def remember(model: nn.Module) -> None:
    """Note a model that has an adapter of this package."""
    with _lock:
        _models.add(model)


def remembered() -> list[nn.Module]:
    """The models that have adapters of this package, as far as they are still in memory."""
    with _lock:
        return list(_models)
