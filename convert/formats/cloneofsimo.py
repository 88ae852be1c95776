"""The format of cloneofsimo/lora: keys are positions, `unet:<n>:up`, `text_encoder:<n>:down`, and tokens, `<s1>`.

Position n is the n-th layer of the model in definition order, counting only layers inside of modules of the classes
that the file's metadata lists for the component. Files with convolutions contain 4-D pairs; as in the original loader,
layers are skipped until the number of dimensions matches the next pair. The metadata also contains the rank of each
position and marks embeddings of new tokens (textual inversion). There is no alpha: the scale is 1.
"""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import torch

from lora_adapters.convert.deltas.casting import cast_pairs
from lora_adapters.convert.deltas.low_rank import LowRank
from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.names import Lookup, ModuleName
from lora_adapters.convert.families.registry import by_name, of_format, role_of
from lora_adapters.convert.families.text_encoder import LAYERS
from lora_adapters.convert.parsing import json_value

from .contents import Contents, WriteOptions
from .kinds import warn_of_embeddings
from .writing import write_file

NAME = "cloneofsimo"
EMBEDDING = "<embed>"
_KEY = re.compile(r"(unet|text_encoder):([0-9]{1,5}):(up|down)")
_UNET_PARTS = {
    "CrossAttention": ("attn1", "attn2"),
    "Attention": ("attn1", "attn2"),  # the later name of CrossAttention in diffusers
    "GEGLU": ("ff.net.0.proj",),
    "FeedForward": ("ff.",),
    "Transformer2DModel": ("attn1", "attn2", "ff.", "proj_in", "proj_out"),
    "ResnetBlock2D": ("resnets",),
    "Downsample2D": ("downsamplers",),
    "Upsample2D": ("upsamplers",),
}
_TEXT_PARTS = {"CLIPAttention": ("self_attn",), "CLIPMLP": ("mlp",)}
_WRITTEN_UNET = (
    ("CrossAttention", "Attention", "GEGLU"),
    ("Transformer2DModel",),
    ("Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"),
)
_WRITTEN_TEXT = (("CLIPAttention",), ("CLIPAttention", "CLIPMLP"))


def matches(keys: Collection[str]) -> bool:
    """Whether every key is a position or a token, with at least one position."""
    positions = {key for key in keys if _KEY.fullmatch(key)}
    return bool(positions) and all(key.startswith("<") for key in set(keys) - positions)


def read(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], lookup: Lookup | None = None) -> Contents:
    """Read a file in cloneofsimo's format; see `read_modules`. `lookup` is unused, since positions have no names."""
    return Contents(read_modules(tensors, metadata), other_metadata(metadata))


def write(path: Path, contents: Contents, options: WriteOptions) -> None:
    """Write a file in cloneofsimo's format, with the embeddings of `options.tokens`."""
    pairs = {module: pair.without_alpha() for module, pair in contents.pairs().items()}
    pairs = cast_pairs(pairs, options.dtype, keep_alpha=True)
    warn_of_embeddings(contents.embeddings, "cloneofsimo's format")
    write_file(path, *to_tensors(pairs, contents.architecture, options.tokens))


def _walk_unet() -> Iterator[str]:
    """The U-Net's layers in diffusers' definition order: down, up, middle; attn1, feed-forward, attn2."""
    blocks = [f"down_blocks.{n}" for n in range(4)] + [f"up_blocks.{n}" for n in range(4)] + ["mid_block"]
    block_parts = ["proj_in"]
    block_parts += [f"transformer_blocks.0.attn1.{to}" for to in ("to_q", "to_k", "to_v", "to_out.0")]
    block_parts += ["transformer_blocks.0.ff.net.0.proj", "transformer_blocks.0.ff.net.2"]
    block_parts += [f"transformer_blocks.0.attn2.{to}" for to in ("to_q", "to_k", "to_v", "to_out.0")] + ["proj_out"]
    family = of_format(NAME)
    known = family.paths(family.denoiser.name)
    for block in blocks:
        paths = [f"{block}.attentions.{n}.{part}" for n in range(3) for part in block_parts]
        for resnet in (f"{block}.resnets.{n}" for n in range(3)):
            paths += [f"{resnet}.{part}" for part in ("conv1", "time_emb_proj", "conv2")]
            paths += [f"{resnet}.conv_shortcut"] if _widens(resnet) else []
        paths += [f"{block}.{sampler}.0.conv" for sampler in ("downsamplers", "upsamplers")]
        yield from (path for path in paths if path in known)


def _widens(resnet: str) -> bool:
    """Whether a ResNet block changes the number of channels and therefore has a conv_shortcut."""
    return resnet.startswith("up_blocks") or resnet in ("down_blocks.1.resnets.0", "down_blocks.2.resnets.0")


def _walk_text() -> Iterator[str]:
    for layer in (f"text_model.encoder.layers.{n}" for n in range(LAYERS)):
        yield from (f"{layer}.self_attn.{part}_proj" for part in ("k", "v", "q", "out"))
        yield from (f"{layer}.mlp.{part}" for part in ("fc1", "fc2"))


def _is_denoiser(component: str) -> bool:
    return role_of(component) == "denoiser"


def _walk(component: str, targets: Iterable[str]) -> list[str]:
    """The layers of a component inside of modules of the target classes, in order."""
    table = _UNET_PARTS if _is_denoiser(component) else _TEXT_PARTS
    targets = list(targets)
    unknown = [target for target in targets if target not in table]
    if unknown:
        raise AdapterError(f"unknown class {unknown[0]} in the metadata for {component}: expected {', '.join(table)}")
    parts = {part for target in targets for part in table[target]}
    walked = _walk_unet() if _is_denoiser(component) else _walk_text()
    return [path for path in walked if any(f".{part}" in path for part in parts)]


def _is_conv(path: str) -> bool:
    return path.endswith((".conv1", ".conv2", ".conv_shortcut", ".conv"))


def _may_be(path: str, dimensions: int) -> bool:
    """Whether a layer can have a weight of this many dimensions; proj_in and proj_out: 4-D in SD1.x, 2-D in SD2.x."""
    return path.endswith((".proj_in", ".proj_out")) or (dimensions == 4) == _is_conv(path)


def _targets(metadata: Mapping[str, str], component: str) -> list[str]:
    default = ["CrossAttention", "Attention", "GEGLU"] if _is_denoiser(component) else ["CLIPAttention"]
    try:
        listed = json_value(metadata.get(component, json.dumps(default)))
    except ValueError as error:
        raise AdapterError(f"the metadata for {component} is not JSON ({error})") from None
    if not isinstance(listed, list):
        raise AdapterError(f"the metadata for {component} is not a list of classes")
    return [str(name) for name in listed]


def read_modules(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> dict[ModuleName, LowRank]:
    """Read the modules; AdapterError for missing positions, incomplete pairs, and positions without a layer."""
    halves: dict[tuple[str, int], dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        if match := _KEY.fullmatch(key):
            halves.setdefault((match[1], int(match[2])), {})[match[3]] = tensor
    modules = {}
    for component in (part.name for part in of_format(NAME).components):
        numbers = sorted(number for part, number in halves if part == component)
        if not numbers:
            continue
        if numbers != list(range(len(numbers))):
            raise AdapterError(f"positions of {component} are missing: there are {len(numbers)}, up to {numbers[-1]}")
        paths = iter(_walk(component, _targets(metadata, component)))
        for number in numbers:
            pair = halves[component, number]
            if len(pair) != 2:
                raise AdapterError(f"{component}:{number} is incomplete: it has only {next(iter(pair))}")
            path = next((path for path in paths if _may_be(path, pair["down"].ndim)), None)
            if path is None:
                raise AdapterError(f"{component}:{number} matches no layer of SD1.x or SD2.x")
            try:
                module = ModuleName(component, path)
                modules[module] = LowRank(pair["down"], pair["up"], float(pair["down"].shape[0]))
            except AdapterError as error:
                raise AdapterError(f"{component}:{number}: {error}") from None
    return modules


def embeddings(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The embeddings of new tokens, by token."""
    return {key: tensor for key, tensor in tensors.items() if not _KEY.fullmatch(key)}


def other_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata without the entries of this format."""
    own = re.compile(r"(unet|text_encoder)(:\d+:rank)?")
    return {key: text for key, text in metadata.items() if not own.fullmatch(key) and text != EMBEDDING}


def _plan(component: str, present: Mapping[str, LowRank]) -> tuple[tuple[str, ...], list[str]]:
    """The smallest set of target classes that covers all adapted layers of a component, and their layers in order."""
    for targets in _WRITTEN_UNET if _is_denoiser(component) else _WRITTEN_TEXT:
        walked = _walk(component, targets)
        if present.keys() <= set(walked):
            break
    else:
        raise AdapterError(f"cloneofsimo's format cannot store {component}.{min(present.keys() - set(walked))}")
    if not _is_denoiser(component):  # SD1.x has 12 layers, SD2.x has 23: only go to the last adapted one
        last = max(int(path.split(".")[3]) for path in present)
        walked = [path for path in walked if int(path.split(".")[3]) <= last]
    missing = [path for path in walked if path not in present]
    if missing:
        raise AdapterError(
            f"cloneofsimo's format identifies layers by position and cannot skip {component}.{missing[0]}"
        )
    return targets, walked


def to_tensors(
    modules: Mapping[ModuleName, LowRank], architecture: str, embeddings: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and metadata of a file in cloneofsimo's format; alphas are multiplied into `up`.

    Args:
        modules: The pairs.
        architecture: The name of the family.
        embeddings: Token embeddings by token.

    Returns:
        The tensors, and the metadata.

    Raises:
        AdapterError: The format does not support the family, or a layer that it cannot skip has no pair.
    """
    family = by_name(architecture)
    if NAME not in family.formats:
        supported = " and ".join(of_format(NAME).titles)
        raise AdapterError(f"cloneofsimo's format is for {supported}; this adapter is for {family.title}")
    tensors = {token: tensor.contiguous() for token, tensor in embeddings.items()}
    metadata = dict.fromkeys(embeddings, EMBEDDING)
    for component in (part.name for part in of_format(NAME).components):
        mine = {module.path: pair for module, pair in modules.items() if module.component == component}
        if not mine:
            continue
        targets, paths = _plan(component, mine)
        metadata[component] = json.dumps(targets)
        for number, path in enumerate(paths):
            pair = mine[path]
            if pair.alpha == 0:
                pair = LowRank(pair.down, torch.zeros_like(pair.up), float(pair.rank))
            pair = pair.with_alpha(float(pair.rank))
            tensors[f"{component}:{number}:up"] = pair.up.contiguous()
            tensors[f"{component}:{number}:down"] = pair.down.contiguous()
            metadata[f"{component}:{number}:rank"] = str(pair.rank)
    return tensors, metadata
