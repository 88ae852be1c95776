"""Low-Rank Adaptation for Stable Diffusion, native to diffusers and PEFT.

Importing this package is cheap: diffusers and peft are extended only when they are imported.
"""

from importlib import import_module
from pathlib import Path

__version__ = "0.1.0"

# In a checkout, convert/ and train/ are next to this folder. Python started there finds this folder before the
# installed package, so they are added to its path.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "convert").is_dir() and (_checkout / "pyproject.toml").is_file() and str(_checkout) not in __path__:
    __path__.append(str(_checkout))

from lora_adapters import plugin, types  # noqa: E402

plugin.plug_in()

_PUBLIC = {
    "Adapter": "convert.adapter",
    "AdapterError": "convert.errors",
    "LowRank": "convert.deltas.low_rank",
    "ModuleName": "convert.families.names",
    "add_adapter": "injection",
    "block_lr_weights": "block_lr",
    "network_options": "kohya_options",
    "param_groups": "optimizer_groups",
    "scale_component_rates": "component_rates",
    "sort_components": "sorting",
    **{name: f"types.{module}" for name, module in types.PUBLIC.items()},
}
__all__ = [*sorted(_PUBLIC), "__version__"]


def __getattr__(name: str) -> object:
    """Load public names on first use, so that `import lora_adapters` is cheap."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
