"""Finding the modules for names in files if the original code fuses layers: one name can stand for several modules.

A name is a key without the suffix for the tensor, either flat (`lora_unet_double_blocks_0...`) or dotted
(`diffusion_model.double_blocks.0...`). All spellings of a family are looked up in one table: the original code's,
diffusers', and the family's aliases; those of text encoders with and without `text_model.`.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cache
from typing import NamedTuple

from .family import ModelFamily
from .names import ModuleName
from .registry import BASE_VERSION, DENOISER, FAMILIES, by_metadata
from .released import SizedLayer, likeliest
from .tensor_slice import Part
from .transformer import Fused, Transformer

_PEFT_MODEL = "base_model.model."
_OF_DENOISER = ("lora_transformer_", "lycoris_", "diffusion_model.", "model.diffusion_model.", "transformer.", "")


class Target(NamedTuple):
    """A module that a name in a file stands for.

    Attributes:
        module: The module.
        part: The rows of the file's layer that belong to the module; None for all rows.
        swapped: See `TensorSlice`.
    """

    module: ModuleName
    part: Part | None = None
    swapped: bool = False


def fuses(family: ModelFamily) -> bool:
    """Whether the original code of a family fuses layers, so that this module is needed for its files."""
    return isinstance(family.denoiser.layout, Transformer)


@cache
def _transformers() -> tuple[ModelFamily, ...]:
    return tuple(family for family in FAMILIES if fuses(family))


@cache
def _beginnings(family: ModelFamily) -> tuple[tuple[str, str], ...]:
    """The prefixes of names and their components, longer prefixes first."""
    beginnings: dict[str, str] = {}
    for part in family.components:
        own = _OF_DENOISER if part.role == "denoiser" else (f"{part.name}.", f"lora_{part.name}_")
        for start in (f"{part.kohya}_", *part.others, *own):
            beginnings.setdefault(start, part.name)
    return tuple(sorted(beginnings.items(), key=lambda item: -len(item[0])))


@cache
def _targets(family: ModelFamily, component: str) -> Mapping[str, tuple[Target, ...]]:
    """The modules of a component by flat name."""
    part = family.component(component)
    assert part is not None
    targets: dict[str, tuple[Target, ...]] = {}
    targets |= {_flat(path): (Target(ModuleName(component, path)),) for path in family.paths(component)}
    if isinstance(part.layout, Transformer):
        for names in (part.layout.aliases, part.layout.originals):
            targets |= {_flat(name): _of(component, target) for name, target in names.items()}
        return targets
    return {name.removeprefix("text_model_"): of_name for name, of_name in targets.items()} | targets


def _of(component: str, target: Fused) -> tuple[Target, ...]:
    return tuple(
        Target(ModuleName(component, path), target.part(index), target.swapped)
        for index, path in enumerate(target.paths)
    )


def _flat(name: str) -> str:
    return name.replace(".", "_")


def without_wrapper(name: str) -> str:
    """The name without PEFT's `base_model.model.`, at the beginning or after the component."""
    component, wrapper, rest = name.partition(_PEFT_MODEL)
    return f"{component}{rest}" if wrapper and "." not in component.rstrip(".") else name


def split(family: ModelFamily, name: str) -> list[tuple[str, str]]:
    """Split a name into (component, rest), for each component that it may belong to."""
    name = without_wrapper(name)
    return [(part, name.removeprefix(start)) for start, part in _beginnings(family) if name.startswith(start)]


def targets_of(family: ModelFamily, name: str) -> tuple[Target, ...] | None:
    """The modules of a family that a name stands for; None if the family does not have the name."""
    candidates = (_targets(family, component).get(_flat(rest)) for component, rest in split(family, name))
    return next((targets for targets in candidates if targets is not None), None)


def known_names(family: ModelFamily) -> Iterable[str]:
    """The flat names of all modules of a family's denoiser."""
    return _targets(family, family.denoiser.name)


@cache
def _mark() -> re.Pattern[str]:
    """A pattern for the beginning of module names of these families."""
    starts = {f"{family.denoiser.kohya}_" for family in _transformers()} | set(_OF_DENOISER)
    names = {
        name
        for family in _transformers()
        for stack in family.denoiser.layout.stacks  # type: ignore[attr-defined]
        for name in (stack.original, stack.path)
    }
    starting, stacks = ("|".join(map(re.escape, sorted(each, key=len, reverse=True))) for each in (starts, names))
    return re.compile(rf"({starting})({re.escape(_PEFT_MODEL)})?({stacks})[._]\d|.*[._]encoder[._]block[._]\d")


def may_be_of_transformer(names: Collection[str], metadata: Mapping[str, str]) -> bool:
    """Whether a file with these names and metadata may be for one of these families."""
    stated = by_metadata(metadata)
    if stated is not None:
        return fuses(stated)
    return any(_mark().match(name) for name in names)


def denoiser_of(names: Collection[str]) -> str:
    """The denoiser's component (unet or transformer) for names of its modules without a component."""
    return _transformers()[0].denoiser.name if may_be_of_transformer(names, {}) else DENOISER


class Recognised(NamedTuple):
    """The result of `family_of_names`.

    Attributes:
        own: The family that has all of the file's modules; None if no family has them all.
        near: The same as `own`, or else the family with most of the modules; None if no family has more than half.
        is_alone: Whether no other family is possible.
    """

    own: ModelFamily | None
    near: ModelFamily | None
    is_alone: bool = False


def family_of_names(names: Mapping[str, tuple[int, int] | None], metadata: Mapping[str, str]) -> Recognised:
    """Recognise the family of a file by the names and sizes of its modules.

    It is the first family that has all of the modules, unless the metadata name another family that has them, the size
    of a layer occurs in only one family, or only other families have released models of these sizes.

    Args:
        names: The size (out, in) of each module, or None, by the name in the file.
        metadata: The metadata of the file.

    Returns:
        The family or the nearest one.
    """
    fitting = [family for family in _transformers() if all(targets_of(family, name) for name in names)]
    if not fitting:
        counts = {family: sum(targets_of(family, name) is not None for name in names) for family in _transformers()}
        best = max(counts, key=lambda family: counts[family])
        return Recognised(None, best if 2 * counts[best] > len(names) else None)
    stated = by_metadata(metadata) if metadata.get(BASE_VERSION) else None
    if stated in fitting:
        return Recognised(stated, stated)
    left = likeliest(fitting, lambda family: _has_own_width(family, names), lambda family: _layers(family, names))
    return Recognised(left[0], left[0], len(left) == 1)


def _layers(family: ModelFamily, names: Mapping[str, tuple[int, int] | None]) -> Iterator[SizedLayer]:
    """The layers of the denoiser; a layer that is part of a fused one is given with the size of the fused layer."""
    for name, out_in in names.items():
        targets = targets_of(family, name)
        if targets is not None and targets[0].module.component == family.denoiser.name:
            yield SizedLayer(targets[0].module.path, out_in)


def _has_own_width(family: ModelFamily, names: Mapping[str, tuple[int, int] | None]) -> bool:
    is_own, layout = family.marks.width, family.denoiser.layout
    assert isinstance(layout, Transformer)
    if is_own is None:
        return False
    for name, out_in in names.items():
        for component, rest in split(family, name):
            if out_in is not None and component == family.denoiser.name and is_own(_flat(rest), out_in):
                return True
    return False
