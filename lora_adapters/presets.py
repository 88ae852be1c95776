"""Presets: which layers of a model get an adapter, by the classes that contain them and by their names.

Names and contents are those of LyCORIS (`preset=` in its network arguments), plus B-LoRA's blocks of SDXL
(arXiv:2403.14572). A preset can also be a TOML file with LyCORIS' keys.
"""

import fnmatch
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from lora_adapters.convert.errors import AdapterError, first_line
from lora_adapters.convert.families.names import nearest
from lora_adapters.convert.parsing import read_text, toml_table

_ATTENTION = "Transformer2DModel"
_CONV_BLOCKS = ("ResnetBlock2D", "Downsample2D", "Upsample2D")
_TEXT = ("CLIPAttention", "CLIPSdpaAttention", "CLIPMLP")
_TIME = (r"time_embedding\.linear_[12]$",)
_OUTER = ("conv_in$", "conv_out$")
# diffusers' names of classes that have other names in kohya's own U-Net.
_ALIASES = {"CrossAttention": "Attention", "SelfAttention": "Attention"}


class Override(NamedTuple):
    """Another algorithm, or other options, for layers inside of a class or with certain names.

    Attributes:
        pattern: The class, or a pattern of names.
        by_class: Whether `pattern` is a class.
        options: LyCORIS' network arguments, including `algo`.
    """

    pattern: str
    by_class: bool
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Preset:
    """The choice of layers that get an adapter.

    `classes` are module classes whose layers are all adapted. `names` are patterns for the paths of further layers,
    matched from the beginning (`re.match`), or like file names if `globs` is set. `conv` says whether convolutions
    larger than 1x1 are adapted. `exclude` are patterns of paths to leave out, with all layers inside of them.
    """

    classes: frozenset[str]
    names: tuple[str, ...] = ()
    conv: bool = True
    exclude: tuple[str, ...] = ()
    overrides: tuple[Override, ...] = ()
    globs: bool = field(default=False, kw_only=True)

    def matches(self, pattern: str, path: str) -> bool:
        """Whether a pattern of this preset matches the path."""
        if path == pattern:
            return True
        return fnmatch.fnmatchcase(path, pattern) if self.globs else re.match(pattern, path) is not None

    def names_path(self, path: str) -> bool:
        """Whether one of `names` matches the path."""
        return any(self.matches(pattern, path) for pattern in self.names)

    def excludes(self, path: str) -> bool:
        """Whether one of `exclude` matches the path."""
        return any(self.matches(pattern, path) for pattern in self.exclude)


class Chosen(NamedTuple):
    """A layer chosen by a preset: its path, the layer without PEFT's wrapper, and the options of an override."""

    path: str
    layer: nn.Module
    options: Mapping[str, Any]


def _preset(*classes: str, names: tuple[str, ...] = (), conv: bool = True, **rest: Any) -> Preset:
    return Preset(frozenset(classes), names, conv, **rest)


def _b_lora(attentions: str) -> Preset:
    """The attentions of the SDXL U-Net's blocks that determine an image's content or style."""
    path = rf"up_blocks\.0\.attentions\.{attentions}\.transformer_blocks\.\d+\.attn[12]\.to_(q|k|v|out\.0)$"
    return _preset(names=(path,), conv=False)


_ON_INPUT = ("mlp.fc2", "ff.net.2")
PRESETS = {
    "full": _preset(_ATTENTION, *_CONV_BLOCKS, *_TEXT, names=(*_OUTER, *_TIME)),
    "full-lin": _preset(_ATTENTION, "ResnetBlock2D", *_TEXT, names=_TIME, conv=False),
    "attn-mlp": _preset(_ATTENTION, *_TEXT, conv=False),
    "attn-only": _preset("Attention", "CLIPAttention", "CLIPSdpaAttention", conv=False),
    "unet-only": _preset(_ATTENTION, *_CONV_BLOCKS, names=(*_OUTER, *_TIME)),
    "unet-transformer-only": _preset(_ATTENTION, conv=False),
    "unet-convblock-only": _preset(*_CONV_BLOCKS, names=_OUTER),
    "ia3": _preset(
        names=tuple(f"*.{end}" for end in ("to_k", "to_v", "k_proj", "v_proj", *_ON_INPUT)),
        conv=False,
        overrides=tuple(Override(f"*.{end}", False, {"train_on_input": True}) for end in _ON_INPUT),
        globs=True,
    ),
    "b-lora": _b_lora("[01]"),
    "b-lora-content": _b_lora("0"),
    "b-lora-style": _b_lora("1"),
}


def find_preset(name: str) -> Preset:
    """Find a preset by name, or read it from a TOML file; AdapterError if it does not exist."""
    if name in PRESETS:
        return PRESETS[name]
    if not name.endswith(".toml"):
        raise AdapterError(f"unknown preset {name}{nearest(name, PRESETS)}: use {', '.join(PRESETS)} or a .toml file")
    return _read(Path(name).expanduser())


_LISTS = {
    "unet_target_module": (_ATTENTION, *_CONV_BLOCKS),
    "unet_target_name": (*_OUTER, *_TIME),
    "text_encoder_target_module": _TEXT,
    "text_encoder_target_name": (),
    "exclude_name": (),
}
_FLAGS = {"enable_conv": True, "use_fnmatch": False}
_MAPS = ("module_algo_map", "name_algo_map")


@cache
def _read(file: Path) -> Preset:
    """Read a preset in LyCORIS' TOML format; missing keys have the values of the preset "full", as in LyCORIS."""
    try:
        table = toml_table(read_text(file))
    except (OSError, ValueError) as error:
        raise AdapterError(f"preset {file} cannot be read ({first_line(error)})") from None
    known = [*_LISTS, *_FLAGS, *_MAPS]
    for key, value in table.items():
        if key not in known:
            raise AdapterError(f"preset {file}: unknown key {key}{nearest(key, known)}: use {', '.join(known)}")
        kind = list if key in _LISTS else bool if key in _FLAGS else dict
        items = value if kind is list else value.values() if kind is dict and isinstance(value, dict) else ()
        if not isinstance(value, kind) or not all(isinstance(item, str if kind is list else dict) for item in items):
            takes = {list: "a list of strings", bool: "true or false", dict: "a table of tables"}[kind]
            raise AdapterError(f"preset {file}: {key} takes {takes}")
    lists = {key: tuple(table.get(key, default)) for key, default in _LISTS.items()}
    flags = {key: table.get(key, default) for key, default in _FLAGS.items()}
    names = lists["unet_target_name"] + lists["text_encoder_target_name"]
    if not flags["use_fnmatch"]:
        for pattern in (*names, *lists["exclude_name"], *table.get("name_algo_map", ())):
            _check_pattern(file, pattern)
    classes = (_ALIASES.get(name, name) for name in lists["unet_target_module"] + lists["text_encoder_target_module"])
    overrides = [
        Override(_ALIASES.get(pattern, pattern) if key == _MAPS[0] else pattern, key == _MAPS[0], options)
        for key in _MAPS
        for pattern, options in table.get(key, {}).items()
    ]
    return Preset(
        frozenset(classes), names, flags["enable_conv"], lists["exclude_name"], tuple(overrides),
        globs=flags["use_fnmatch"],
    )  # fmt: skip


def _check_pattern(file: Path, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise AdapterError(f"preset {file}: {pattern} is not a regular expression ({error})") from None


def chosen(model: nn.Module, preset: Preset, norms: bool = False) -> Iterator[Chosen]:
    """The layers of a model that a preset chooses.

    Args:
        model: A U-Net or a text encoder.
        preset: The preset.
        norms: Whether normalisation layers inside of its classes are included.

    Returns:
        Linear layers, convolutions and normalisation layers, in the model's order, without duplicates.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    def walk(module: nn.Module, path: str, inside: bool, options: Mapping[str, Any]) -> Iterator[Chosen]:
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        if path and preset.excludes(path):
            return
        name = type(module).__name__
        named = preset.names_path(path)
        options = _of_override(preset, path, name, named, options)
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            small = isinstance(module, nn.Linear) or tuple(module.kernel_size) == (1, 1)
            if (inside or named) and (small or preset.conv or "dim" in options):
                yield Chosen(path, module, options)
            return
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
            if inside and norms and module.weight is not None:
                yield Chosen(path, module, options)
            return
        inside = inside or name in preset.classes
        for child, submodule in module.named_children():
            yield from walk(submodule, f"{path}.{child}" if path else child, inside, options)

    yield from walk(model, "", False, {})


def _of_override(preset: Preset, path: str, name: str, named: bool, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options for a module: those of an override for its name or class, or those of the module that contains it."""
    for override in preset.overrides:
        if override.by_class and override.pattern == name:
            return override.options
        if named and not override.by_class and preset.matches(override.pattern, path):
            return override.options
    return options
