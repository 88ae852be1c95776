"""Adapters as data: names, files, arithmetic, checkpoints and the file tools. Needs torch and safetensors only."""

from .adapter import Adapter
from .errors import AdapterError
from .low_rank import LowRank
from .metadata import DyLora
from .names import ModuleName

__all__ = ["Adapter", "AdapterError", "DyLora", "LowRank", "ModuleName"]
