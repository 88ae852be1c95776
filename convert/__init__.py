"""Adapters as data: names, files, arithmetic, checkpoints and the file tools. Needs torch and safetensors only."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .adapter import Adapter
    from .deltas.low_rank import LowRank
    from .errors import AdapterError
    from .families.names import ModuleName
    from .formats.metadata import DyLora

_PUBLIC = {
    "Adapter": "adapter",
    "AdapterError": "errors",
    "DyLora": "formats.metadata",
    "LowRank": "deltas.low_rank",
    "ModuleName": "families.names",
}
__all__ = ["Adapter", "AdapterError", "DyLora", "LowRank", "ModuleName"]


def __getattr__(name: str) -> object:
    """Load public names on first use, so that the programs can print --help without importing torch."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
