"""From a file's keys to its modules: each key is a module's name, in one of several spellings, and a tensor's."""

from collections.abc import Callable, Iterator, Mapping
from functools import cache

import torch

from lora_adapters.convert.deltas.base import Delta
from lora_adapters.convert.deltas.reading import SUFFIXES, read_module
from lora_adapters.convert.errors import AdapterError, UnknownModuleError
from lora_adapters.convert.families.family import ModelFamily
from lora_adapters.convert.families.names import ModuleName, nearest
from lora_adapters.convert.families.registry import FAMILIES
from lora_adapters.convert.families.text_encoder import layer_paths
from lora_adapters.convert.formats.metadata import network_args

# The beginnings of names, and the components that they are of.
_FLAT = {
    "lora_unet_": "unet",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te_": "text_encoder",
    "lycoris_": "unet",  # LyCORIS' own wrapper writes it, of the one model that it wraps
}
_DOTTED = {
    "diffusion_model.": "unet",  # ComfyUI
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
}
# Layers beside which a normalisation layer stands: the end of their path and of sgm's name, and the norm's.
_NORMS = (
    (".conv1", "in_layers.2", ".norm1", "in_layers.0"),
    (".conv2", "out_layers.3", ".norm2", "out_layers.0"),
    (".proj_in", "proj_in", ".norm", "norm"),
    (".attn1.to_q", "attn1.to_q", ".norm1", "norm1"),
    (".attn2.to_q", "attn2.to_q", ".norm2", "norm2"),
    (".ff.net.2", "ff.net.2", ".norm3", "norm3"),
    (".self_attn.q_proj", "", ".layer_norm1", ""),
    (".mlp.fc1", "", ".layer_norm2", ""),
)

# Finds a module that no table has in a live model: from a component and a name, dotted or flat, to its path or None.
Lookup = Callable[[str, str], str | None]


def split_key(key: str) -> tuple[str, str]:
    """The module's name in a key, flat or dotted, and the end of the key.

    >>> split_key("lora_unet_mid_block_attentions_0_proj_in.lora_up.weight")
    ('lora_unet_mid_block_attentions_0_proj_in', 'lora_up.weight')
    >>> split_key("diffusion_model.middle_block.1.proj_in.diff_b")
    ('diffusion_model.middle_block.1.proj_in', 'diff_b')

    Raises:
        AdapterError: it ends in no tensor of a known kind.
    """
    if key.startswith(tuple(_FLAT)):
        name, _, suffix = key.partition(".")
        return name, suffix  # `read_module` says whether there is such a tensor
    parts = key.split(".")
    for length in (2, 1):
        suffix = ".".join(parts[-length:])
        if len(parts) > length and suffix in SUFFIXES:
            return ".".join(parts[:-length]), suffix
    raise AdapterError(f"{key:.200} ends in no tensor of a known kind of adapter")


def group_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """A file's tensors by their module's name and the end of their key; see `split_key`."""
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, suffix = split_key(key)
        groups.setdefault(name, {})[suffix] = tensor
    return groups


def resolve(name: str, lookup: Lookup | None = None) -> ModuleName:
    """The module that a name, flat or dotted, in diffusers' or the original code's spelling, stands for.

    Args:
        name: as `split_key` returns it.
        lookup: asked where SD1.x, SD2.x and SDXL have no such module.

    Raises:
        UnknownModuleError: nobody knows it; the nearest known name is in the message.
    """
    prefixes = _FLAT | _DOTTED
    prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
    if prefix is None:
        raise UnknownModuleError(f"unknown module {name:.200}: a name begins with {', '.join(prefixes)}")
    component, rest = prefixes[prefix], name.removeprefix(prefix)
    flat, table = rest.replace(".", "_"), _paths_by_flat_name(component)
    path = table.get(flat) or (lookup(component, rest) if lookup is not None else None)
    if path is None:
        raise UnknownModuleError(f"unknown module {name:.200}{nearest(flat, table)}")
    return ModuleName(component, path)


def read_modules(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None, lookup: Lookup | None = None
) -> dict[ModuleName, Delta]:
    """The modules and their changes in a file's tensors, of any kinds side by side.

    Args:
        tensors: as in the file.
        metadata: the file's, which say whether LyCORIS trained it with `rs_lora`.
        lookup: as in `resolve`.

    Raises:
        AdapterError: unknown modules or tensors, shapes that do not fit; with the module's name in it.
    """
    rs_lora = network_args(metadata or {}).get("rs_lora", "").lower() in ("true", "1")
    modules: dict[ModuleName, Delta] = {}
    for name, group in group_tensors(tensors).items():
        module = resolve(name, lookup)
        if module in modules:
            raise AdapterError(f"{name} and another name stand for the same module {module}")
        try:
            modules[module] = read_module(group, rs_lora)
        except AdapterError as error:
            raise AdapterError(f"{name}: {error}") from None
    return modules


# --- the names of all modules --------------------------------------------------------------------------------------


@cache
def _paths_by_flat_name(component: str) -> dict[str, str]:
    """The path of each module of SD1.x, SD2.x and SDXL, by its names with underscores for dots."""
    if component == "unet":
        spelled = [pair for family in FAMILIES for pair in _unet_names(family)]
    else:
        spelled = [pair for path in _text_encoder_paths(component) for pair in _text_encoder_names(path)]
    return {name.replace(".", "_"): path for name, path in spelled}


def _unet_names(family: ModelFamily) -> Iterator[tuple[str, str]]:
    """(name, path) of each U-Net module: in diffusers and in the original code."""
    denoiser = family.denoiser
    for path in family.paths(denoiser.name):
        original = denoiser.original(path)
        yield from ((path, path), (original, path))
        for end, original_end, norm, original_norm in _NORMS:
            if path.endswith(end):
                beside = path.removesuffix(end) + norm
                yield from ((beside, beside), (original.removesuffix(original_end) + original_norm, beside))
    yield from (("conv_norm_out", "conv_norm_out"), ("out.0", "conv_norm_out"))


def _text_encoder_paths(component: str) -> Iterator[str]:
    for path in layer_paths():
        yield path
        yield from (path.removesuffix(end) + norm for end, _, norm, _ in _NORMS if path.endswith(end))
    yield "text_model.final_layer_norm"
    if component == "text_encoder_2":
        yield "text_projection"


def _text_encoder_names(path: str) -> Iterator[tuple[str, str]]:
    """(name, path) of a text encoder's module: with and without `text_model.`, which transformers 5 leaves out."""
    yield path, path
    yield path.removeprefix("text_model."), path
