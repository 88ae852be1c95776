"""Whether the numbers of an adapter are numbers."""

from collections.abc import Mapping

from lora_adapters.convert.deltas.low_rank import LowRank, finite
from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.names import ModuleName


def check_finite(modules: Mapping[ModuleName, LowRank], where: str = "") -> None:
    """AdapterError, with the module, where a number is NaN or infinite."""
    for module, pair in modules.items():
        for half, factor in (("down", pair.down), ("up", pair.up)):
            if not finite(factor):
                raise AdapterError(f"{where}{module}: {half} has NaN or infinite numbers")
