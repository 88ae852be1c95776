"""Checking that the values of an adapter are finite."""

from collections.abc import Mapping

from lora_adapters.convert.deltas.base import Delta
from lora_adapters.convert.deltas.low_rank import LowRank, finite
from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.names import ModuleName


def check_finite(modules: Mapping[ModuleName, Delta], where: str = "") -> None:
    """Raise AdapterError, which names the module, if a value is NaN or infinite."""
    for module, change in modules.items():
        if isinstance(change, LowRank):
            for half, factor in (("down", change.down), ("up", change.up)):
                if not finite(factor):
                    raise AdapterError(f"{where}{module}: {half} has NaN or infinite values")
        elif not change.is_finite():
            raise AdapterError(f"{where}{module}: the {change.kind} has NaN or infinite values")
