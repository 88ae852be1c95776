"""The known families, and functions that find a family by name, metadata, or names of modules and tensors."""

from collections.abc import Collection, Iterable, Mapping
from functools import cache

from lora_adapters.convert.errors import AdapterError

from .chroma import CHROMA
from .family import Kind, ModelFamily, Role, Version
from .flux import FLUX
from .flux2 import FLUX2
from .lumina2 import LUMINA2
from .names import ModuleName
from .qwen_image import QWEN_IMAGE
from .sd import SD
from .sd3 import SD3
from .sdxl import SDXL
from .unlisted import UNLISTED
from .zimage import ZIMAGE

# In the order in which they are tried: the first that fits is used; the first of all is the fallback.
FAMILIES = (SD, SDXL, FLUX, CHROMA, SD3, FLUX2, LUMINA2, ZIMAGE, QWEN_IMAGE)
BASE_VERSION = "ss_base_model_version"
DENOISER = FAMILIES[0].denoiser.name  # the component of names without a component: the U-Net


def titles(word: str = "and") -> str:
    """The titles of all known versions as text: "SD1.x, SD2.x, SDXL, ... and Qwen-Image"."""
    *first, last = [title for family in FAMILIES for title in family.titles]
    return f"{', '.join(first)} {word} {last}"


def by_name(name: str) -> ModelFamily:
    """Find a family by name ("other" for an unknown model); AdapterError if the name is unknown."""
    family = next((known for known in (*FAMILIES, UNLISTED) if known.name == name), None)
    if family is None:
        names = " and ".join(f"{known.name} ({', '.join(known.titles)})" for known in FAMILIES)
        raise AdapterError(f"unknown architecture {name!r}: expected {names}")
    return family


def denoisers() -> tuple[str, ...]:
    """The component names of denoisers: unet, transformer."""
    return tuple(dict.fromkeys(family.denoiser.name for family in FAMILIES))


def by_metadata(metadata: Mapping[str, str]) -> ModelFamily | None:
    """The family named in the metadata of a file; None if they do not name a known family."""
    stated = metadata.get(BASE_VERSION, "")
    return next((family for family in FAMILIES if stated.startswith(family.metadata)), None)


def version_named(value: str) -> Version | None:
    """The version with this ss_base_model_version; None if it is unknown."""
    return next((version for family in FAMILIES for version in family.versions if version.value == value), None)


def is_v2(value: str) -> bool:
    """Whether an ss_base_model_version belongs to kohya's --v2, so that ss_v2 is written as True."""
    return asked_by("v2", value)


def asked_by(option: str, value: str) -> bool:
    """Whether an ss_base_model_version belongs to a flag of kohya's trainer (v2, v_parameterization, sdxl)."""
    return any(option in family.options and value.startswith(family.options[option]) for family in FAMILIES)


def by_modules(modules: Iterable[ModuleName]) -> ModelFamily:
    """The first family that has all of these modules; AdapterError if no family has them all."""
    modules = list(modules)
    fitting = next((family for family in FAMILIES if family.has(modules)), None)
    if fitting is not None:
        return fitting
    layers = sorted(module for module in modules if role_of(module.component) == "denoiser")
    unknown = [module for module in layers if not any(family.has([module]) for family in FAMILIES)]
    if unknown:
        raise AdapterError(f"{unknown[0]!s:.120} is not a module of {titles('or')}")
    denoiser = layers[0].component if layers else DENOISER
    alike = [family for family in reversed(FAMILIES) if family.denoiser.name == denoiser]
    most = max(alike, key=lambda family: sum(family.has([module]) for module in modules))
    strange = next(module for module in modules if not most.has([module]))
    raise AdapterError(
        f"modules of different architectures in one adapter: {strange} is not in {most.title}, but others are"
    )


def in_denoiser(paths: Iterable[str]) -> list[ModuleName]:
    """The layers of a denoiser with these paths, as modules of the first family that has one of the paths."""
    paths = list(paths)
    has_one = (
        family for family in FAMILIES for name in [family.denoiser.name] if not family.paths(name).isdisjoint(paths)
    )
    family = next(has_one, FAMILIES[0])
    return [ModuleName(family.denoiser.name, path) for path in paths]


def by_kohya_names(names: Iterable[str]) -> ModelFamily | None:
    """The family identified by names in kohya's files that no other family has; None if there is no such name."""
    names = list(names)
    return next((family for family in FAMILIES if any(name.startswith(family.marks.kohya) for name in names)), None)


def by_live_models(components: Collection[str], config: object) -> ModelFamily | None:
    """The family identified by the components or the denoiser's config of a pipeline; None if they identify none."""
    return next((family for family in FAMILIES if family.is_told_by(components, config)), None)


def by_class(model: object) -> ModelFamily | None:
    """The family of a live denoiser, by its class; None for any other model."""
    names = [base.__name__ for base in type(model).__mro__]
    return next((family for family in FAMILIES if any(name in family.marks.classes for name in names)), None)


def of_format(name: str) -> ModelFamily:
    """The first family whose adapters a file format can store."""
    return next(family for family in FAMILIES if name in family.formats)


def kind_of(module: ModuleName) -> Kind:
    """The kind of a layer (linear, conv1x1 or conv3x3) in the first family with this component."""
    family = next((family for family in FAMILIES if family.denoiser.name == module.component), None)
    return "linear" if family is None else family.kind_of(module.path)


@cache
def role_of(component: str) -> Role | None:
    """The role of a component (denoiser or text encoder); None if no family has the component."""
    parts = (family.component(component) for family in FAMILIES)
    return next((part.role for part in parts if part is not None), None)
