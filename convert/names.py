"""Module names: kohya's flat ones, diffusers' dotted ones, and the blocks that they belong to.

A kohya name is `<prefix>_<module path with underscores>`, with the prefix `lora_unet`, `lora_te` (one text encoder),
`lora_te1` or `lora_te2` (two). Underscores stand for dots and for themselves, so names are looked up in tables of all
modules of SD1.x, SD2.x and SDXL, never guessed. SDXL files carry sgm's U-Net names (`input_blocks_4_1_...`) or
diffusers'; both are read, of SD1.x and SD2.x too. Paths here are diffusers' with `text_model.` kept in text encoders.
"""

import difflib
import re
from collections.abc import Iterable, Iterator
from functools import cache
from typing import NamedTuple

from .errors import AdapterError

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

    Text encoders' paths begin with `text_model.`, whatever the version of transformers; `text_projection` stands beside.

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
    """The paths of all layers' modules of the deepest text encoder, layer by layer; `text_projection` is not of them."""
    return list(_text_encoder())


def text_path(path: str) -> str:
    """A text encoder's path with the `text_model.` level that some formats and transformers 5 leave out.

    >>> text_path("encoder.layers.0.mlp.fc1"), text_path("text_projection")
    ('text_model.encoder.layers.0.mlp.fc1', 'text_projection')
    """
    return path if path.startswith("text_model.") or path == TEXT_PROJECTION else f"text_model.{path}"


def sgm_path(path: str, architecture: str = "sdxl") -> str:
    """The dotted name of a U-Net module in Stability's and CompVis' own code (`input_blocks.4.1...`)."""
    if path in OUTER:
        return OUTER[path]
    match = _PLACE.fullmatch(path)
    assert match, path
    half, block, kind, layer, rest = match.groups()
    if half == "mid":
        place = f"middle_block.{2 * int(layer) if kind == 'resnets' else 1}"
    elif kind == "downsamplers":
        return f"input_blocks.{3 + 3 * int(block)}.0.op"
    elif kind == "upsamplers":
        # It stands behind the attention, which the deepest block of SD1.x and SD2.x does not have.
        return f"output_blocks.{2 + 3 * int(block)}.{1 if architecture == 'sd' and block == '0' else 2}.conv"
    else:
        first = "input_blocks" if half == "down" else "output_blocks"
        index = (1 if half == "down" else 0) + 3 * int(block) + int(layer)
        place = f"{first}.{index}.{0 if kind == 'resnets' else 1}"
    return f"{place}.{_SGM_RESNET[rest] if kind == 'resnets' else rest}"


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

_PREFIXES = {
    "lora_unet_": "unet",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te_": "text_encoder",
}


def nearest(name: str, known: Iterable[str]) -> str:
    """`; the nearest known name is X`, or an empty string where nothing is near."""
    if len(name) > 200:  # no module's name, and difflib's time grows with its length
        return ""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; the nearest known name is {close[0]}" if close else ""


def from_kohya(name: str) -> ModuleName:
    """The module of a kohya name such as `lora_unet_mid_block_attentions_0_proj_in` (no tensor suffix).

    AdapterError, with the nearest known name, where no SD1.x, SD2.x or SDXL module is called that.
    """
    for prefix, component in _PREFIXES.items():
        if name.startswith(prefix):
            table = _by_flat_name(component)
            path = table.get(name.removeprefix(prefix))
            if path is None:
                raise AdapterError(
                    f"unknown module {name:.200}{nearest(name, (prefix + known for known in table))}; "
                    "SD1.x, SD2.x and SDXL modules are known"
                )
            return ModuleName(component, path)
    raise AdapterError(f"unknown module {name:.200}: a kohya name begins with {', '.join(_PREFIXES)}")


def to_kohya(module: ModuleName, architecture: str) -> str:
    """kohya's name of a module; SDXL's U-Net gets sgm's names, its text encoders `lora_te1` and `lora_te2`."""
    if module.component == "unet":
        flat = _sgm_name(module.path) if architecture == "sdxl" else module.path.replace(".", "_")
        return f"lora_unet_{flat}"
    number = {"text_encoder": "1", "text_encoder_2": "2"}[module.component] if architecture == "sdxl" else ""
    return f"lora_te{number}_{module.path.replace('.', '_')}"


def check_known(module: ModuleName) -> ModuleName:
    """The same module; AdapterError with the nearest known path where SD1.x, SD2.x and SDXL have no such module."""
    table = _by_flat_name(module.component)
    if module.path.replace(".", "_") not in table:
        raise AdapterError(f"unknown module {module!s:.200}{nearest(module.path, table.values())}")
    return module


def architecture_of(modules: Iterable[ModuleName]) -> str:
    """ "sdxl" if only SDXL has all of these modules, else "sd"; AdapterError where neither has them all."""
    unet = {module.path for module in modules if module.component == "unet"}
    two_encoders = any(module.component == "text_encoder_2" for module in modules)
    for architecture in ("sdxl",) if two_encoders else ("sd", "sdxl"):
        if unet <= _paths(architecture):
            return architecture
    strange = next(iter(unet - _paths("sd" if unet - _paths("sdxl") else "sdxl")))
    raise AdapterError(f"modules of different architectures in one adapter: {strange} is not in SDXL, others are")


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
