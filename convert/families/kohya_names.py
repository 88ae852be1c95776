"""kohya's flat module names.

A kohya name is `<prefix>_<module path with underscores>`, with the prefix `lora_unet`, `lora_te` (one text encoder),
`lora_te1` or `lora_te2` (two). An underscore can stand for a dot or for itself, so names are looked up in tables of all
modules of all families. SDXL files use the original code's U-Net names (`input_blocks_4_1_...`) or diffusers' names;
both are read, also for SD1.x and SD2.x. Paths here are diffusers', with `text_model.` in text encoders.
"""

from collections.abc import Mapping
from functools import cache

from lora_adapters.convert.errors import UnknownModuleError

from .names import Lookup, ModuleName, nearest
from .registry import DENOISER, FAMILIES, role_of, titles

_UNETS = [family for family in FAMILIES if family.denoiser.name == DENOISER]  # for the others see `spelling`
# The prefixes of flat and of dotted names, and their components.
PREFIXES = {
    **{f"{part.kohya}_": part.name for family in _UNETS for part in family.components},
    **{f"lycoris_{part.kohya.removeprefix('lora_')}_": part.name for family in _UNETS for part in family.components},
    "lycoris_": DENOISER,  # written by LyCORIS' own wrapper for the model that it wraps
    "oft_unet_": DENOISER,  # kohya's networks.oft
}
DOTTED = {
    **{f"{part.name}.": part.name for family in _UNETS for part in family.components},
    "diffusion_model.": DENOISER,  # ComfyUI
    "model.diffusion_model.": DENOISER,  # checkpoints
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "clip_l.transformer.": "text_encoder",
    "clip_g.transformer.": "text_encoder_2",
    "lora_unet.": DENOISER,  # OneTrainer
    "lora_te.": "text_encoder",
    "lora_te1.": "text_encoder",
    "lora_te2.": "text_encoder_2",
}
_OF_TEXT_ENCODERS = ("text_model_", "encoder_layers_", "text_projection", "final_layer_norm")


def component_of(prefix: str, rest: str, prefixes: Mapping[str, str] = PREFIXES) -> str:
    """The component of a name with one of the prefixes; LyCORIS' wrapper uses the same prefix for all components."""
    if prefix == "lycoris_" and rest.startswith(_OF_TEXT_ENCODERS):
        return "text_encoder"
    return prefixes[prefix]


@cache
def paths_by_flat_name(component: str, norms: bool = False) -> dict[str, str]:
    """The paths of the modules of all known families by their names with underscores instead of dots.

    Args:
        component: The name of the component.
        norms: Include normalisation layers, and names of text encoders without `text_model.`, as in transformers 5.
            LyCORIS' files have both, kohya's have neither.

    Returns:
        Paths by name. If two families use the same name, a path in diffusers takes precedence over an original name.
    """
    spelled = [pair for family in FAMILIES for pair in family.spellings(component, norms)]
    if norms and role_of(component) == "text_encoder":
        spelled += [(name.removeprefix("text_model."), path) for name, path in spelled]
    spelled.sort(key=lambda pair: pair[0] == pair[1])  # paths last, so that they overwrite original names
    return {name.replace(".", "_"): path for name, path in spelled}


def from_kohya(name: str, lookup: Lookup | None = None) -> ModuleName:
    """Find the module for a name in kohya's files, such as `lora_unet_mid_block_attentions_0_proj_in`.

    Args:
        name: The name, without the suffix of the tensor.
        lookup: Called with the component and the rest of the name if no known family has the module; returns its path
            or None.

    Returns:
        The module.

    Raises:
        UnknownModuleError: The module is unknown; the message suggests the nearest known name.
    """
    for prefix in PREFIXES:
        if name.startswith(prefix):
            flat = name.removeprefix(prefix)
            component = component_of(prefix, flat)
            table = paths_by_flat_name(component)
            path = table.get(flat)
            if path is None and role_of(component) == "text_encoder":
                path = table.get(f"text_model_{flat}")  # trained with transformers 5, which removed `text_model.`
            if path is None and lookup is not None:
                path = lookup(component, flat)
            if path is None:
                raise UnknownModuleError(
                    f"unknown module {name:.120}{nearest(name, (prefix + known for known in table))}; "
                    f"{titles()} modules are known"
                )
            return ModuleName(component, path)
    raise UnknownModuleError(f"unknown module {name:.120}: a kohya name begins with {', '.join(PREFIXES)}")


def check_known(module: ModuleName, lookup: Lookup | None = None) -> ModuleName:
    """Find the module for a path, which may be the original code's (`input_blocks.4.1...`).

    Args:
        module: The component and the path.
        lookup: Called with both if no known family has the module; returns its path in diffusers or None.

    Returns:
        The module with its path in diffusers.

    Raises:
        UnknownModuleError: The module is unknown; the message suggests the nearest known name.
    """
    table = paths_by_flat_name(module.component)
    path = table.get(module.path.replace(".", "_"))
    if path is None and lookup is not None:
        path = lookup(module.component, module.path)
    if path is None:
        raise UnknownModuleError(f"unknown module {module!s:.120}{nearest(module.path, table.values())}")
    return module if path == module.path else ModuleName(module.component, path)
