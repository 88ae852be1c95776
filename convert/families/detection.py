"""Recognising the base model of an adapter, and refusing to mix adapters for different base models."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

from lora_adapters.convert.errors import AdapterError

from .family import ModelFamily, Version
from .names import ModuleName
from .registry import BASE_VERSION, FAMILIES, by_metadata, by_modules, version_named
from .released import SizedLayer, likeliest
from .spelling import fuses
from .unlisted import UNLISTED, check_alike

# Layers whose number of input channels is the width of the text encoder.
_READ_TEXT = (
    *("attn2.to_k", "attn2.to_v", "mlp.fc1"),
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
)


class Sized(Protocol):
    """The change of a module, of which only the size (out, in) is used here; None if it is not known."""

    @property
    def out_in(self) -> tuple[int, int] | None: ...


class AdapterData(Protocol):
    """The parts of an adapter that are used here."""

    @property
    def modules(self) -> Mapping[ModuleName, Sized]: ...

    @property
    def metadata(self) -> Mapping[str, str]: ...


def titles_of(modules: Mapping[ModuleName, Sized], metadata: Mapping[str, str]) -> str:
    """The base model of an adapter as text: "SD1.x", "Flux.1 or Chroma"."""
    candidates = candidates_of(modules, metadata)
    if len(candidates) == 1:
        return _base_model(candidates[0], modules, metadata).title
    return " or ".join(family.title for family in candidates)


class BaseModel(NamedTuple):
    """The base model of an adapter: a family, and its version if known."""

    family: ModelFamily
    version: Version | None

    @property
    def title(self) -> str:
        """The title of the version, or of the family if the version is unknown: "SD1.x", "SD2.x", "SDXL", "SD"."""
        return self.family.title if self.version is None else self.version.title


def family_of(modules: Mapping[ModuleName, Sized], metadata: Mapping[str, str]) -> ModelFamily:
    """Recognise the family of an adapter by its module names, metadata and widths.

    Args:
        modules: The changes by module; only `out_in` is used.
        metadata: The metadata of the file.

    Returns:
        The family. If several families have all of the modules, the metadata decide.

    Raises:
        AdapterError: No family has all of the modules.
    """
    return candidates_of(modules, metadata)[0]


def candidates_of(modules: Mapping[ModuleName, Sized], metadata: Mapping[str, str]) -> tuple[ModelFamily, ...]:
    """All families that an adapter may be for; see `family_of`.

    Args:
        modules: The changes by module; only `out_in` is used.
        metadata: The metadata of the file.

    Returns:
        The most likely family, followed by others that names, sizes and metadata do not rule out: several transformers
        have the same layer names.

    Raises:
        AdapterError: No family has all of the modules.
    """
    if modules and UNLISTED.has(modules):
        return (UNLISTED,)
    by_names = by_modules(modules)
    stated = by_metadata(metadata) if metadata.get(BASE_VERSION) else None
    if stated is not None and (by_names is FAMILIES[0] or stated.has(modules)):
        return (stated,)
    fitting = [family for family in FAMILIES if family.has(modules)]
    if fuses(by_names):
        return likeliest(
            fitting, lambda family: _has_own_width(family, modules), lambda family: _layers(family, modules)
        )
    if by_names is not FAMILIES[0] or metadata.get(BASE_VERSION):
        return (by_names,)
    others = (family for family in fitting[1:] if family.marks.width is not None)
    return (next((family for family in others if _has_own_width(family, modules)), by_names),)


def _layers(family: ModelFamily, modules: Mapping[ModuleName, Sized]) -> Iterator[SizedLayer]:
    denoiser = family.denoiser.name
    for module, change in modules.items():
        if module.component == denoiser:
            yield SizedLayer(module.path, change.out_in)


def _has_own_width(family: ModelFamily, modules: Mapping[ModuleName, Sized]) -> bool:
    is_own, denoiser = family.marks.width, family.denoiser.name
    return is_own is not None and any(
        module.component == denoiser and change.out_in is not None and is_own(module.path, change.out_in)
        for module, change in modules.items()
    )


def reads_other_text_than(family: ModelFamily, modules: Mapping[ModuleName, Sized]) -> bool:
    """Whether a denoiser layer reads text embeddings of a width that no version of the family has."""
    denoiser, widths = family.denoiser.name, {version.text_width for version in family.versions} - {None}
    layers = (
        change.out_in
        for module, change in modules.items()
        if module.component == denoiser and module.path.endswith(_READ_TEXT)
    )
    return bool(widths) and any(out_in is not None and out_in[1] not in widths for out_in in layers)


def base_model_of(modules: Mapping[ModuleName, Sized], metadata: Mapping[str, str]) -> BaseModel:
    """Recognise the family of an adapter and, from the modules' widths or else from the metadata, its version."""
    return _base_model(family_of(modules, metadata), modules, metadata)


def _base_model(family: ModelFamily, modules: Mapping[ModuleName, Sized], metadata: Mapping[str, str]) -> BaseModel:
    sizes = (change.out_in for module, change in modules.items() if module.path.endswith(_READ_TEXT))
    reading = (out_in[1] for out_in in sizes if out_in is not None)
    by_width = next((version for width in reading if (version := family.version(width)) is not None), None)
    if by_width is None and len(family.versions) == 1:
        by_width = family.versions[0]
    stated = version_named(metadata.get(BASE_VERSION, ""))
    return BaseModel(family, by_width or (stated if stated in family.versions else None))


def check_one_family(adapters: Mapping[str, AdapterData]) -> None:
    """Raise AdapterError, with the adapters' names, if two adapters are for different base models."""
    candidates = {name: candidates_of(adapter.modules, adapter.metadata) for name, adapter in adapters.items()}
    if candidates and all(families == (UNLISTED,) for families in candidates.values()):
        check_alike([(name, adapter.modules) for name, adapter in adapters.items()])
        return
    if any(len(families) > 1 for families in candidates.values()) and set.intersection(*map(set, candidates.values())):
        return
    models = {
        name: _base_model(candidates[name][0], adapter.modules, adapter.metadata) for name, adapter in adapters.items()
    }
    several = len({model.family.name for model in models.values()}) > 1  # then unknown versions are compared too
    known = {name: model.title for name, model in models.items() if several or model.version is not None}
    first = next(iter(known.items()), None)
    for name, title in known.items():
        if first is not None and title != first[1]:
            raise AdapterError(f"{first[0]} is for {first[1]}, but {name} is for {title}: they cannot be combined")
