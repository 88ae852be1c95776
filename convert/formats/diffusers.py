"""diffusers' file formats: the current PEFT-like keys with `lora_adapter_metadata`, and the older processor names.

    unet.<path>.lora_A.weight                                     current
    unet.<path>.lora.down.weight                                  up to 2024
    unet.<path to attention>.processor.to_q_lora.down.weight      2023, with and without `unet.`

In all of them the scale is 1 (alpha = rank) unless the metadata says otherwise. These variants are read too:

    unet.<path>.lora_A.<adapter>.weight                           a model's state dict, saved by the user
    unet.base_model.model.<path>.lora_A.weight                    the state dict of a PeftModel
    unet.<path>.lora_down.weight, .lora_up.weight, .alpha         diffusers' paths with kohya's suffixes (OneTrainer)
    diffusion_model.<sgm path>..., text_encoders.clip_l.transformer.text_model...      ComfyUI
"""

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch

from lora_adapters.convert.deltas.base import scalar_of
from lora_adapters.convert.deltas.casting import cast_pairs
from lora_adapters.convert.deltas.low_rank import LowRank
from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.kohya_names import DOTTED, check_known
from lora_adapters.convert.families.names import COMPONENTS, Lookup, ModuleName, text_path
from lora_adapters.convert.families.registry import DENOISER, role_of
from lora_adapters.convert.parsing import json_value

from .contents import Contents, WriteOptions
from .metadata import dylora_metadata, dylora_of, dylora_of_config, network_args
from .projections import in_own_shapes
from .writing import bundled, write_file

NAME = "diffusers"
METADATA_KEY = "lora_adapter_metadata"
_CONFIGS = (METADATA_KEY, "peft_config", "adapter_config")  # metadata entries that contain a PEFT config
_CHANGE_THE_BASE = ("pissa", "olora", "corda")  # values of init_lora_weights that also change the base weights
_PROCESSOR = re.compile(r"(.+?)(?:\.processor)?\.(to_[qkv]|to_out)_lora\.(down|up)\.weight")
_COMPONENTS = {  # key prefixes and their components
    **{f"{component}.": component for component in COMPONENTS},
    **DOTTED,
    "clip_l.": "text_encoder",
    "clip_g.": "text_encoder_2",
}
# Prefixes of kohya's and LyCORIS' flat names, and of components of other models.
_OTHERS = ("lora_", "lycoris_", "transformer.", "prior.", "decoder.", "text_encoder_3.", "text_encoders.")
_OF_TRANSFORMERS = ("transformer.", "text_encoder_3.")  # components of models whose files `spelled` reads
_PEFT_MODEL = "base_model.model."
_NAMED_HALF = re.compile(r"(.+)\.lora_([AB])\.([^.]+)\.weight")
_HALVES = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".alpha": "alpha",
}
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def split_key(key: str) -> tuple[ModuleName, str] | None:
    """The module and tensor ("down", "up" or "alpha") of a key in any of the formats; None for any other key."""
    component, rest = DENOISER, key
    for start, of in _COMPONENTS.items():
        if key.startswith(start):
            component, rest = of, key.removeprefix(start)
            break
    if rest.startswith(_OTHERS):
        return None
    rest = rest.removeprefix(_PEFT_MODEL)
    if match := _NAMED_HALF.fullmatch(rest):
        return ModuleName(component, _path(component, match[1])), "down" if match[2] == "A" else "up"
    if match := _PROCESSOR.fullmatch(rest):
        attention, name, half = match.groups()
        name = "to_out.0" if name == "to_out" and role_of(component) == "denoiser" else name
        return ModuleName(component, _path(component, f"{attention}.{name}")), half
    for ending, half in _HALVES.items():
        if rest.endswith(ending):
            return ModuleName(component, _path(component, rest.removesuffix(ending))), half
    return None


def _path(component: str, path: str) -> str:
    """The module's path from that in a key: old files name the text encoders' layers like the U-Net's."""
    if role_of(component) == "denoiser":
        return path
    head, dot, tail = text_path(path).rpartition(".")
    return f"{head}{dot}{_OLD_TEXT.get(tail, tail)}"


def matches(keys: Collection[str]) -> bool:
    """Whether every key belongs to a low-rank pair in one of diffusers' formats."""
    return bool(keys) and all(split_key(key) is not None and not key.startswith(_OF_TRANSFORMERS) for key in keys)


def read(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], lookup: Lookup | None = None) -> Contents:
    """Read a file in one of diffusers' formats; see `read_modules`."""
    return Contents(read_modules(tensors, metadata, lookup), kohya_metadata(metadata))


def write(path: Path, contents: Contents, options: WriteOptions) -> None:
    """Write a file that all versions of diffusers read correctly; see `to_tensors`."""
    pairs = {module: pair.without_alpha() for module, pair in contents.pairs().items()}
    pairs = cast_pairs(pairs, options.dtype, keep_alpha=True)
    contents = replace(contents, modules=in_own_shapes(pairs, contents.metadata))
    tensors, own = to_tensors(contents.pairs())
    metadata = {**contents.full_metadata(options.modelspec), **own, "ss_network_alpha": str(float(contents.rank))}
    write_file(path, {**tensors, **bundled(contents.embeddings)}, metadata)


def checked(config: Any, where: str) -> dict[str, Any]:
    """Validate a PEFT config from a file; AdapterError if a field that is used here does not have PEFT's type."""
    if not isinstance(config, dict):
        raise AdapterError(f"{where} is not a JSON object")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(_CHANGE_THE_BASE):
        raise AdapterError(f"{where}: init_lora_weights={start} is not supported: it changes the base weights too")
    kinds: dict[str, Any] = {
        "lora_alpha": (int, float),
        "alpha_pattern": dict,
        "rank_pattern": dict,
        "auto_mapping": dict,
    }
    for key, kind in kinds.items():
        value = config.get(key)
        if value is not None and not isinstance(value, kind):
            raise AdapterError(f"{where}: {key} is {value!r}")
    for key, value in (config.get("alpha_pattern") or {}).items():
        try:
            re.compile(key)
        except re.error as error:
            raise AdapterError(f"{where}: alpha_pattern has {key!r}, which is not a pattern ({error})") from None
        if not isinstance(value, (int, float)):
            raise AdapterError(f"{where}: alpha_pattern has {value!r} for {key}")
    facts = (config.get("auto_mapping") or {}).get("lora_adapters") or {}
    stored = facts.get("metadata") or {} if isinstance(facts, dict) else None
    if not isinstance(stored, dict) or not all(isinstance(text, str) for text in stored.values()):
        raise AdapterError(f"{where}: auto_mapping's lora_adapters is {str(facts)[:80]}")
    try:
        dylora_of_config(config)
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{where}: {error}") from None
    return config


def config_of(metadata: Mapping[str, str], component: str) -> dict[str, Any]:
    """The PEFT config of a component in the metadata of a file; {} if it is missing.

    Args:
        metadata: The metadata. diffusers' pipelines write the configs of all components into one table, each field
            prefixed by the component's name; models (`save_lora_adapter`) write the fields of a single config.
        component: The component.

    Returns:
        The fields of the config.

    Raises:
        AdapterError: The config is not JSON, a field does not have PEFT's type, or the base weights are changed too.
    """
    entry = next((key for key in _CONFIGS if key in metadata), None)
    if entry is None:
        return {}
    try:
        table = json_value(metadata[entry])
    except ValueError as error:
        raise AdapterError(f"{entry} is not JSON ({error})") from None
    if not isinstance(table, dict):
        raise AdapterError(f"{entry} is not a JSON object")
    start = f"{component}."
    mine = {key.removeprefix(start): value for key, value in table.items() if key.startswith(start)}
    return checked(table if "peft_type" in table else mine, f"{entry} of {component}")


def pattern_value(pattern: Mapping[str, float], path: str, default: float) -> float:
    """Look up a module in a rank_pattern or alpha_pattern as PEFT does.

    Args:
        pattern: Values by regular expression; the first that matches the end of the path is used.
        path: The path of the module. It is also tried without `text_model.`, which depends on the version of
            transformers.
        default: The value if nothing matches.

    Returns:
        The value.
    """
    names = (path, path.removeprefix("text_model."))
    if all(key.startswith("^") and _literal(key) for key in pattern):  # written by this package: a dict lookup suffices
        anchored = {f"^{name}" for name in names} | {rf"^(text_model\.)?{names[1]}"}
        return next((pattern[key] for key in anchored & pattern.keys()), default)
    return next((value for key, value in pattern.items() if any(_pattern(key).match(name) for name in names)), default)


@cache
def _pattern(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})$")


@cache
def _literal(key: str) -> bool:
    """Whether an anchored key is a plain path, without special characters except dots."""
    return re.fullmatch(r"\^(\(text_model\\\.\)\?)?[\w.]+", key) is not None


def alpha_from_config(config: Mapping[str, Any], path: str, rank: int) -> float:
    """The alpha of one module in a PEFT config, or its rank without a config; for rsLoRA the equivalent LoRA alpha."""
    if not config:
        return float(rank)
    pattern, default = config.get("alpha_pattern") or {}, config.get("lora_alpha")
    default = rank if default is None else default
    if not isinstance(pattern, Mapping):
        raise AdapterError("alpha_pattern is not a JSON object")
    for key in pattern:
        _check_pattern(key)
    try:
        alpha = float(pattern_value(pattern, path, default))
    except (TypeError, ValueError, OverflowError):
        raise AdapterError("lora_alpha or a value of alpha_pattern is not a number") from None
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def alpha_of(metadata: Mapping[str, str], component: str, path: str, rank: int) -> float:
    """The alpha of one module in the metadata of a diffusers file; its rank if the metadata does not contain one."""
    return alpha_from_config(config_of(metadata, component), path, rank)


@cache
def _check_pattern(key: str) -> None:
    """Raise AdapterError for a key of alpha_pattern that is not a regular expression or may take forever to match.

    Keys are paths or short expressions. Python's `re` backtracks: its time can grow exponentially with repeated groups
    and with many optional or alternative parts, so the number of these is limited.
    """
    try:
        re.compile(rf"(.*\.)?({key})$")
    except (re.error, RecursionError, OverflowError):
        raise AdapterError(f"alpha_pattern has the key {key[:60]!r}, which is not a regular expression") from None
    repeated = len(re.findall(r"(?<!\\)[*+{]", key))
    chosen = len(re.findall(r"(?<![\\(])\?|\|", key))
    if len(key) > 500 or repeated > 2 or chosen > 8 or re.search(r"\)[*+{]", key):
        raise AdapterError(f"alpha_pattern has the key {key[:60]!r}, which is too complex a regular expression")


def kohya_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Convert the metadata of a diffusers file to that of kohya's files.

    Args:
        metadata: The metadata of the file.

    Returns:
        The entries without the PEFT configs, whose alphas are already in the modules, and with the DyLoRA options that
        this package stores in its configs.
    """
    kept = {key: value for key, value in metadata.items() if key not in (*_CONFIGS, "format")}
    options = (dylora_of_config(config_of(metadata, component)) for component in COMPONENTS)
    dylora = next((candidate for candidate in options if candidate is not None), None)
    if dylora is None or dylora_of(kept) is not None:
        return kept
    return {**kept, **dylora_metadata(dylora, network_args(kept))}


def read_modules(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], lookup: Lookup | None = None
) -> dict[ModuleName, LowRank]:
    """The modules of tensors in diffusers' format.

    Args:
        tensors: The tensors of the file; they are not copied.
        metadata: The metadata of the file, which may contain alphas. An alpha tensor takes precedence; 0 means the
            rank, as in kohya's format.
        lookup: See `check_known`.

    Returns:
        The pairs.

    Raises:
        AdapterError: A module is unknown, a pair is incomplete, shapes do not match, or the file contains several
            adapters.
    """
    names = {match[3] for key in tensors if (match := _NAMED_HALF.fullmatch(key))}
    if len(names) > 1:
        raise AdapterError(f"contains several adapters ({', '.join(sorted(names))[:120]}): only one is supported")
    halves: dict[ModuleName, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        split = split_key(key)
        if split is None:
            raise AdapterError(f"{key:.120} is not a key of diffusers' LoRA formats")
        pair = halves.setdefault(check_known(split[0], lookup), {})
        if split[1] in pair:
            raise AdapterError(f"{key:.120} and another key stand for the same matrix")
        pair[split[1]] = tensor
    configs = {component: config_of(metadata, component) for component in COMPONENTS}
    modules = {}
    for module, pair in halves.items():
        for half in ("down", "up"):
            if half not in pair:
                raise AdapterError(f"{module} is incomplete: its {half} matrix is missing")
        rank = pair["down"].shape[0] if pair["down"].ndim else 0
        try:
            alpha = scalar_of("alpha", pair["alpha"]) if "alpha" in pair else 0.0
            alpha = alpha or alpha_from_config(configs[module.component], module.path, rank)
            modules[module] = LowRank(pair["down"], pair["up"], alpha)
        except AdapterError as error:
            raise type(error)(f"{module}: {error}") from None
    return modules


class Scaled(Protocol):
    """An object with a rank and an alpha."""

    @property
    def rank(self) -> int: ...

    @property
    def alpha(self) -> float: ...


def lora_config(modules: Mapping[str, Scaled], rank: int | None = None, alpha: float | None = None) -> dict[str, Any]:
    """The fields of a PEFT config that give each module its rank and alpha.

    Patterns are anchored (`^`), since one path may be the suffix of another. Patterns of text encoders match with and
    without `text_model.`, which transformers 5 removed from one of its two CLIP text models.

    Args:
        modules: Objects with the rank and alpha of each module, by path.
        rank: The value of `r`; None for the most common rank.
        alpha: The value of `lora_alpha`; None for the most common alpha.

    Returns:
        r, lora_alpha, target_modules, rank_pattern and alpha_pattern.
    """
    if rank is None:
        rank = Counter(pair.rank for pair in modules.values()).most_common(1)[0][0]
    if alpha is None:
        alpha = Counter(pair.alpha for pair in modules.values()).most_common(1)[0][0]

    def anchored(path: str) -> str:
        inner = path.removeprefix("text_model.")
        return f"^{path}" if inner == path else rf"^(text_model\.)?{inner}"

    return {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(path.removeprefix("text_model.") for path in modules),
        "rank_pattern": {anchored(path): pair.rank for path, pair in modules.items() if pair.rank != rank},
        "alpha_pattern": {anchored(path): pair.alpha for path, pair in modules.items() if pair.alpha != alpha},
    }


def to_tensors(modules: Mapping[ModuleName, LowRank]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and metadata of a file that all versions of diffusers read correctly, even without the metadata.

    Alphas are multiplied into `up`, so that the scale is 1 with and without the metadata.

    Args:
        modules: The pairs.

    Returns:
        The tensors, and the metadata.
    """
    tensors, table = {}, {}
    for component in COMPONENTS:
        mine = {
            module.path: pair.with_alpha(float(pair.rank)) if pair.alpha else pair
            for module, pair in modules.items()
            if module.component == component
        }
        for path, pair in mine.items():
            up = pair.up if pair.alpha else torch.zeros_like(pair.up)
            tensors[f"{component}.{path}.lora_A.weight"] = pair.down.contiguous()
            tensors[f"{component}.{path}.lora_B.weight"] = up.contiguous()
        if mine:
            table.update({f"{component}.{key}": value for key, value in lora_config(mine).items()})
    return tensors, {METADATA_KEY: json.dumps(table, indent=2, sort_keys=True), "format": "pt"}
