"""The modules that kohya's LoRA types adapt, and their ranks and alphas."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.family import ModelFamily
from lora_adapters.convert.families.registry import FAMILIES, by_class, by_modules, by_name, in_denoiser
from lora_adapters.convert.formats.diffusers import pattern_value

from .module_patterns import first_match, left_out, names_in
from .presets import chosen, find_preset

_CONTAINERS = {
    kind: frozenset[str]().union(*(family.coverage[kind].containers for family in FAMILIES))
    for kind in ("lierla", "c3lier")
}


class Ranks(Protocol):
    """The fields of a config that determine ranks and alphas."""

    r: int
    lora_alpha: float
    conv_dim: int | None
    conv_alpha: float | None
    block_dims: list[int] | None
    block_alphas: list[float] | None
    conv_block_dims: list[int] | None
    conv_block_alphas: list[float] | None
    include_patterns: list[str] | None
    exclude_patterns: list[str] | None
    reg_dims: dict[str, int] | None
    reg_alphas: dict[str, float] | None
    rank_pattern: dict[Any, Any] | None  # PEFT's type
    alpha_pattern: dict[Any, Any] | None


@dataclass(frozen=True)
class RankAlpha:
    """A module's rank (0 if it is not adapted) and alpha."""

    rank: int
    alpha: float


def base_layers(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """All linear layers and convolutions of a model. For layers wrapped by PEFT, the original layer is returned.

    Args:
        model: The model.

    Yields:
        (path, class of the innermost covered container or "", layer).
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    def walk(module: nn.Module, path: str, container: str) -> Iterator[tuple[str, str, nn.Module]]:
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            yield path, container, module
            return
        name = type(module).__name__
        inner = name if name in _CONTAINERS["c3lier"] else container
        for child, submodule in module.named_children():
            yield from walk(submodule, f"{path}.{child}" if path else child, inner)

    yield from walk(model, "", "")


def is_kxk(layer: nn.Module) -> bool:
    """Whether a layer is a convolution larger than 1x1, which C3Lier adapts with the rank conv_dim."""
    return isinstance(layer, nn.Conv2d) and tuple(layer.kernel_size) != (1, 1)


def covered(model: nn.Module, conv: bool, preset: str | None = None) -> list[str]:
    """The modules of a denoiser or text encoder that kohya's LoRA adapts, or those of a preset.

    LierLa adapts the linear layers and 1x1 convolutions of attention blocks, and attention and MLP of text encoders.
    C3Lier adds all layers of ResNet blocks, downsamplers and upsamplers. In a transformer both adapt the linear layers
    of its blocks.

    Args:
        model: The model.
        conv: True for C3Lier, False for LierLa.
        preset: The name or file of a LyCORIS preset; None for kohya's modules.

    Returns:
        The paths.

    Raises:
        AdapterError: The model has none of these modules.
    """
    if preset is not None:
        paths = [layer.path for layer in chosen(model, find_preset(preset))]
        if not paths:
            raise AdapterError(f"{type(model).__name__} has none of the modules of preset {preset}")
        return paths
    family = by_class(model)
    if family is not None:
        parts = family.coverage["c3lier" if conv else "lierla"].parts
        return [
            path
            for path, _, layer in base_layers(model)
            if family.part_of(path) in parts and (conv or not is_kxk(layer))
        ]
    containers = _CONTAINERS["c3lier" if conv else "lierla"]
    paths = [
        path for path, container, layer in base_layers(model) if container in containers and (conv or not is_kxk(layer))
    ]
    if not paths:
        raise AdapterError(
            f"{type(model).__name__} has none of the blocks that kohya's LoRA adapts "
            f"({', '.join(sorted(containers))}): give target_modules"
        )
    return paths


def check_block_list(name: str, values: Sequence[float] | None, architecture: str) -> None:
    """Raise AdapterError if a list does not have one value for each block (25; SDXL: 23), or has a negative value."""
    if values is None:
        return
    family = by_name(architecture)
    if len(values) != family.blocks.count:
        kind = " and ".join(family.titles)
        raise AdapterError(f"{name} has {len(values)} values, {kind} has {family.blocks.count} blocks")
    if min(values) < 0:
        raise AdapterError(f"{name} has the negative value {min(values)}")


class RankRule:
    """Decides rank and alpha of the modules of a model by a config; `family` is the transformer's, by its class."""

    def __init__(self, ranks: Ranks, model_paths: Sequence[str], family: ModelFamily | None = None):
        self.ranks = ranks
        self.names = names_in(model_paths)
        blocks = [path for path in model_paths if path.startswith(("down_blocks.", "mid_block.", "up_blocks."))]
        self.family: ModelFamily | None = None
        lists = ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")
        if (blocks or family is not None) and any(getattr(ranks, name) is not None for name in lists):
            self.family = family or by_modules(in_denoiser(blocks))
            for name in lists:
                check_block_list(name, getattr(ranks, name), self.family.name)

    def __call__(self, path: str, layer: nn.Module) -> RankAlpha:
        """The rank and alpha of the layer at `path`; block lists apply to denoisers only, as in kohya's trainer.

        Patterns in reg_dims take precedence over block lists, and PEFT's rank_pattern and alpha_pattern, which are for
        single modules, over all others.
        """
        ranks, names = self.ranks, self.names(path)
        if left_out(ranks.include_patterns, ranks.exclude_patterns, names):
            return RankAlpha(0, 0)
        block = self.family.blocks.index(path) if self.family else None
        if is_kxk(layer):
            dims, alphas, rank, alpha = ranks.conv_block_dims, ranks.conv_block_alphas, ranks.conv_dim, ranks.conv_alpha
            if alpha is None:
                alpha = ranks.lora_alpha if rank is None and dims is None else 1
            rank = ranks.r if rank is None and dims is None else (rank or 0)
        else:
            dims, alphas, rank, alpha = ranks.block_dims, ranks.block_alphas, ranks.r, ranks.lora_alpha
        if block is not None:
            rank = dims[block] if dims is not None else rank
            alpha = alphas[block] if alphas is not None else alpha
        pattern = first_match(ranks.reg_dims or (), names)
        if ranks.reg_dims and pattern is not None:
            rank, alpha = ranks.reg_dims[pattern], (ranks.reg_alphas or {}).get(pattern, ranks.lora_alpha)
        return RankAlpha(
            pattern_value(ranks.rank_pattern or {}, path, rank),  # type: ignore[arg-type]
            pattern_value(ranks.alpha_pattern or {}, path, alpha),
        )
