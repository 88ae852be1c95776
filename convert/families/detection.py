"""Which models an adapter is for: SD1.x, SD2.x or SDXL, and refusing to mix them."""

from collections.abc import Mapping
from dataclasses import replace

from lora_adapters.convert.adapter import Adapter
from lora_adapters.convert.deltas.low_rank import LowRank
from lora_adapters.convert.errors import AdapterError

from .names import ModuleName

_WIDTHS = {768: "SD1.x", 1024: "SD2.x"}  # of the text encoder's output, which the U-Net's attn2 reads
_VERSIONS = {"sd_v1": "SD1.x", "sd_v2": "SD2.x", "sd_v2_v": "SD2.x"}


def family_of(adapter: Adapter) -> str:
    """ "SD1.x", "SD2.x", "SDXL", or "SD" where neither widths nor metadata tell which."""
    if adapter.architecture == "sdxl":
        return "SDXL"
    for module, one in adapter.modules.items():
        if module.path.endswith(("attn2.to_k", "attn2.to_v", "self_attn.q_proj")) and one.out_in[1] in _WIDTHS:
            return _WIDTHS[one.out_in[1]]
    return _VERSIONS.get(adapter.metadata.get("ss_base_model_version", ""), "SD")


def in_own_shapes(adapter: Adapter) -> Adapter:
    """The adapter with proj_in and proj_out as its model has them: linear in SD2.x and SDXL, convolutions in SD1.x.

    kohya's trainer spells SD2's as convolutions, which stock diffusers and PEFT do not take. Where only the metadata
    tells the family, they stay as they are: small models of any version have either.
    """
    family = family_of(replace(adapter, metadata={})) if adapter.architecture == "sd" else "SDXL"
    if family == "SD":
        return adapter

    def shaped(module: ModuleName, one: LowRank) -> LowRank:
        if not module.path.endswith((".proj_in", ".proj_out")) or one.kernel != (1, 1):
            return one
        return one.shaped_like(one.out_in if family != "SD1.x" else (*one.out_in, 1, 1))

    return adapter.with_modules({module: shaped(module, one) for module, one in adapter.modules.items()})


def check_one_family(adapters: Mapping[str, Adapter]) -> None:
    """AdapterError, with their names, where two adapters are for different models."""
    families = {name: family_of(adapter) for name, adapter in adapters.items()}
    sdxl = "SDXL" in families.values()  # then one that is SD1.x or SD2.x is a stranger, whichever of them it is
    known = {name: family for name, family in families.items() if sdxl or family != "SD"}
    first = next(iter(known.items()), None)
    for name, family in known.items():
        if first is not None and family != first[1]:
            raise AdapterError(f"{first[0]} is for {first[1]}, but {name} is for {family}: they cannot be combined")
