"""Adapters as data: names, files, arithmetic, checkpoints and the file tools. Needs torch and safetensors only."""

from lora_adapters.convert.deltas.low_rank import LowRank
from lora_adapters.convert.families.names import ModuleName
from lora_adapters.convert.formats.metadata import DyLora

from .adapter import Adapter
from .errors import AdapterError

__all__ = ["Adapter", "AdapterError", "DyLora", "LowRank", "ModuleName"]
