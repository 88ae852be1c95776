"""Module names: kohya's flat ones, diffusers' dotted ones, and the blocks that they belong to.

A kohya name is `<prefix>_<module path with underscores>`, with the prefix `lora_unet`, `lora_te` (one text encoder),
`lora_te1` or `lora_te2` (two). Underscores stand for dots and for themselves, so names are looked up in tables of all
modules of SD1.x, SD2.x and SDXL, never guessed. SDXL files carry sgm's U-Net names (`input_blocks_4_1_...`) or
diffusers'; both are read, of SD1.x and SD2.x too. Paths here are diffusers' with `text_model.` kept in text encoders.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cache
from typing import NamedTuple

from lora_adapters.convert.errors import AdapterError, UnknownModuleError
from lora_adapters.convert.suggestions import closest

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
BLOCK_COUNT = {"sd": 25, "sdxl": 23}
TEXT_LAYERS = 32  # the deepest text encoder, SDXL's second; SD1.x uses 12 of them, SD2.x 23
_SGM_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_SDXL_OUTER = {  # of the size and crop conditioning, which SDXL and its refiner have
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
OUTER = {  # outside of the blocks, with sgm's names: kohya's trainer leaves these alone, LyCORIS and OneTrainer do not
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    **_SDXL_OUTER,
}
TEXT_PROJECTION = "text_projection"  # of SDXL's second text encoder, beside its `text_model`
_PLACE = re.compile(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


class ModuleName(NamedTuple):
    """One adapted module: `component` is unet, text_encoder or text_encoder_2, `path` its dotted name in diffusers.

    Text encoders' paths begin with `text_model.`, whatever the version of transformers, but for `text_projection`.

    >>> str(ModuleName("unet", "mid_block.attentions.0.proj_in"))
    'unet.mid_block.attentions.0.proj_in'
    """

    component: str
    path: str

    def __str__(self) -> str:
        return f"{self.component}.{self.path}"


# --- every module of every architecture ----------------------------------------------------------------------------


def _transformer(prefix: str, depth: int) -> Iterator[str]:
    yield from (f"{prefix}.proj_in", f"{prefix}.proj_out")
    for layer in (f"{prefix}.transformer_blocks.{index}" for index in range(depth)):
        yield from (f"{layer}.{a}.{to}" for a in ("attn1", "attn2") for to in ("to_q", "to_k", "to_v", "to_out.0"))
        yield from (f"{layer}.ff.net.0.proj", f"{layer}.ff.net.2")


def _unet(down_depths: tuple[int, ...], mid_depth: int) -> Iterator[str]:
    """Paths of a U-Net with two layers a block; a depth of 0 is a block without attention."""
    resnet_parts = ("conv1", "conv2", "time_emb_proj", "conv_shortcut")
    last = len(down_depths) - 1
    halves = (("down", 2, down_depths, "downsamplers"), ("up", 3, down_depths[::-1], "upsamplers"))
    for half, layers, depths, sampler in halves:
        for block, depth in enumerate(depths):
            prefix = f"{half}_blocks.{block}"
            for layer in range(layers):
                yield from (f"{prefix}.resnets.{layer}.{part}" for part in resnet_parts)
                if depth:
                    yield from _transformer(f"{prefix}.attentions.{layer}", depth)
            if block != last:
                yield f"{prefix}.{sampler}.0.conv"
    yield from (f"mid_block.resnets.{layer}.{part}" for layer in (0, 1) for part in resnet_parts)
    yield from _transformer("mid_block.attentions.0", mid_depth)


def _text_encoder() -> Iterator[str]:
    for layer in (f"text_model.encoder.layers.{index}" for index in range(TEXT_LAYERS)):
        yield from (f"{layer}.self_attn.{part}_proj" for part in ("q", "k", "v", "out"))
        yield from (f"{layer}.mlp.{part}" for part in ("fc1", "fc2"))


@cache
def _paths(architecture: str) -> frozenset[str]:
    """All U-Net paths of "sd" (SD1.x and SD2.x have the same) or "sdxl"."""
    if architecture == "sd":
        return frozenset([*_unet((1, 1, 1, 0), 1), *(path for path in OUTER if path not in _SDXL_OUTER)])
    return frozenset([*_unet((0, 2, 10), 10), *OUTER])


def unet_paths(architecture: str) -> frozenset[str]:
    """The paths of all U-Net modules that an adapter can have, of "sd" (SD1.x, SD2.x) or "sdxl"."""
    return _paths(architecture)


def text_encoder_paths() -> list[str]:
    """The paths of the modules in all layers of the deepest text encoder, layer by layer; no `text_projection`."""
    return list(_text_encoder())


def text_path(path: str) -> str:
    """A text encoder's path with the `text_model.` level that some formats and transformers 5 leave out.

    >>> text_path("encoder.layers.0.mlp.fc1"), text_path("text_projection")
    ('text_model.encoder.layers.0.mlp.fc1', 'text_projection')
    """
    return path if path.startswith("text_model.") or path == TEXT_PROJECTION else f"text_model.{path}"


def sgm_path(path: str, architecture: str = "sdxl") -> str:
    """The dotted name of a U-Net module in Stability's and CompVis' own code (`input_blocks.4.1...`)."""
    # The deepest block of SD1.x and SD2.x has no attention.
    found = sgm_path_in(path, without_attention=("0",) if architecture == "sd" else ())
    assert found, path
    return found


def sgm_path_in(path: str, without_attention: Collection[str], layers: int = 2) -> str | None:
    """As `sgm_path`, for any U-Net: the numbers of its up blocks without attention, and its layers a block.

    None for a module that the original code does not have.
    """
    if path in OUTER:
        return OUTER[path]
    match = _PLACE.fullmatch(path)
    if match is None or (match[2] is None and match[1] != "mid"):
        return None
    half, block, kind, layer, rest = match.groups()
    if half == "mid":
        place = f"middle_block.{2 * int(layer) if kind == 'resnets' else 1}"
    elif kind == "downsamplers":
        return f"input_blocks.{(layers + 1) * (1 + int(block))}.0.op"
    elif kind == "upsamplers":
        number = 1 if block in without_attention else 2  # it stands behind the attention
        return f"output_blocks.{layers + (layers + 1) * int(block)}.{number}.conv"
    else:
        first = "input_blocks" if half == "down" else "output_blocks"
        index = (1 if half == "down" else 0) + (layers + 1) * int(block) + int(layer)
        place = f"{first}.{index}.{0 if kind == 'resnets' else 1}"
    rest = _SGM_RESNET.get(rest, "") if kind == "resnets" else rest
    return f"{place}.{rest}" if rest else None


def _sgm_name(path: str) -> str:
    """sgm's flat name of an SDXL U-Net path."""
    return sgm_path(path).replace(".", "_")


@cache
def _unet_by_flat_name() -> dict[str, str]:
    flat = {path.replace(".", "_"): path for name in BLOCK_COUNT for path in _paths(name)}
    for name in BLOCK_COUNT:
        flat |= {sgm_path(path, name).replace(".", "_"): path for path in _paths(name)}
    return flat


@cache
def _text_by_flat_name(component: str) -> dict[str, str]:
    paths = [*_text_encoder(), *([TEXT_PROJECTION] if component == "text_encoder_2" else [])]
    return {path.replace(".", "_"): path for path in paths}


def _by_flat_name(component: str) -> dict[str, str]:
    return _unet_by_flat_name() if component == "unet" else _text_by_flat_name(component)


# --- from and to kohya's names -------------------------------------------------------------------------------------

PREFIXES = {
    "lora_unet_": "unet",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te_": "text_encoder",
    "lycoris_": "unet",  # what LyCORIS' own wrapper writes, of the one model that it wraps
}

# What finds a module that is in none of the tables: from a component and a name in it, with dots or flat, to its path.
# A name that it does not know either comes back as it is.
Lookup = Callable[[str, str], str]


def nearest(name: str, known: Iterable[str]) -> str:
    """`; the nearest known name is X`, or an empty string where nothing is near.

    Near is a slip in a word: a name with other numbers is another block's, whose mention would mislead.

    >>> nearest("mid_block.atentions.0.proj_in", ["mid_block.attentions.0.proj_in", "mid_block.attentions.1.proj_in"])
    '; the nearest known name is mid_block.attentions.0.proj_in'
    """
    if len(name) > 120:  # no module's name, and difflib's time grows with its length
        return ""
    numbers = re.findall(r"\d+", name)
    near = closest(name, (one for one in known if re.findall(r"\d+", one) == numbers), 0.8)
    return f"; the nearest known name is {near}" if near else ""


def from_kohya(name: str, lookup: Lookup | None = None) -> ModuleName:
    """The module of a kohya name such as `lora_unet_mid_block_attentions_0_proj_in` (no tensor suffix).

    lookup: asked where no SD1.x, SD2.x or SDXL module is called that; UnknownModuleError where there is none.
    """
    for prefix, component in PREFIXES.items():
        if name.startswith(prefix):
            table, flat = _by_flat_name(component), name.removeprefix(prefix)
            path = table.get(flat)
            if path is None and lookup is not None:
                path = lookup(component, flat)
            if path is None:
                raise UnknownModuleError(
                    f"unknown module {name:.120}{nearest(name, (prefix + known for known in table))}; "
                    "SD1.x, SD2.x and SDXL modules are known"
                )
            return ModuleName(component, path)
    raise UnknownModuleError(f"unknown module {name:.120}: a kohya name begins with {', '.join(PREFIXES)}")


def to_kohya(module: ModuleName, architecture: str) -> str:
    """kohya's name of a module; SDXL's U-Net gets sgm's names, its text encoders `lora_te1` and `lora_te2`."""
    if module.component == "unet":
        flat = _sgm_name(module.path) if architecture == "sdxl" else module.path.replace(".", "_")
        return f"lora_unet_{flat}"
    number = {"text_encoder": "1", "text_encoder_2": "2"}[module.component] if architecture == "sdxl" else ""
    return f"lora_te{number}_{module.path.replace('.', '_')}"


def check_known(module: ModuleName, lookup: Lookup | None = None) -> ModuleName:
    """The module under its own path, also where it is spelled in the original code's way (`input_blocks.4.1...`).

    lookup: asked where SD1.x, SD2.x and SDXL have no such module; UnknownModuleError where there is none.
    """
    table = _by_flat_name(module.component)
    path = table.get(module.path.replace(".", "_"))
    if path is None and lookup is not None:
        path = lookup(module.component, module.path)
    if path is None:
        raise UnknownModuleError(f"unknown module {module!s:.120}{nearest(module.path, table.values())}")
    return module if path == module.path else ModuleName(module.component, path)


def architecture_of(modules: Iterable[ModuleName]) -> str:
    """ "sdxl" if only SDXL has all of these modules, else "sd"; AdapterError where neither has them all."""
    unet = {module.path for module in modules if module.component == "unet"}
    two_encoders = any(module.component == "text_encoder_2" for module in modules)
    for architecture in ("sdxl",) if two_encoders else ("sd", "sdxl"):
        if unet <= _paths(architecture):
            return architecture
    unknown = sorted(unet - _paths("sd") - _paths("sdxl"))
    if unknown:
        raise AdapterError(f"unet.{unknown[0]:.120} is no module of SD1.x, SD2.x or SDXL")
    strange = min(unet - _paths("sd" if unet - _paths("sdxl") else "sdxl"))
    raise AdapterError(f"modules of different architectures in one adapter: {strange} is not in SDXL, others are")


def may_be_sdxl(modules: Iterable[ModuleName]) -> bool:
    """Whether SDXL has all of these modules; SD1.x and SD2.x may have them too."""
    return all(module.component != "unet" or module.path in _paths("sdxl") for module in modules)


# --- blocks --------------------------------------------------------------------------------------------------------


def block_index(path: str, architecture: str) -> int | None:
    """The index of a U-Net module in the 25 blocks of SD1/2 or the 23 of SDXL; None outside of the blocks.

    Source: SPEC of kohya's hierarchical learning rates; index 0 is the input convolution (and, in SDXL, the time
    embedding), which no adapter touches.
    """
    match = _PLACE.fullmatch(path)
    if match is None:
        return None
    half, block, kind, layer, _ = match.groups()
    if half == "mid":
        return 12 if architecture == "sd" else (10 + 2 * int(layer) if kind == "resnets" else 11)
    place = 3 * int(block) + (2 if kind in ("downsamplers", "upsamplers") else int(layer))
    if half == "up":
        return 13 + place
    return place + (1 if architecture == "sd" else 2)
