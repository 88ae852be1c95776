"""The families of base models for training and image generation, by name. A new one needs a module and a line here.

Families for image generation only are in `drawn`.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from lora_adapters.train.errors import TrainingError
from lora_adapters.train.models.drawn import DRAWN
from lora_adapters.train.models.family import TrainingFamily
from lora_adapters.train.models.flux import FLUX
from lora_adapters.train.models.sd import SD
from lora_adapters.train.models.sd3 import SD3
from lora_adapters.train.models.sdxl import SDXL

# In the order in which families are tried: SD is last because it matches every model.
FAMILIES: dict[str, TrainingFamily] = {family.name: family for family in (SD3, FLUX, SDXL, SD)}

# Command-line option -> the kind that it declares.
KIND_FLAGS: dict[str, str] = {
    flag: kind for family in reversed(FAMILIES.values()) for flag, kind in family.flags.items()
}


def family_of_kind(kind: str) -> TrainingFamily:
    """The family that has this kind of base model (`BaseModels.kind`)."""
    return next(family for family in (*FAMILIES.values(), *DRAWN.values()) if kind in family.kinds)


def family_of_folder(index: Mapping[str, Any], name: str = "", draws: bool = False) -> TrainingFamily:
    """The family of a Diffusers folder with this model_index.json.

    Args:
        index: The content of model_index.json.
        name: The folder or repository, for the error message.
        draws: Whether to include families for image generation only.

    Returns:
        The family.

    Raises:
        TrainingError: The model belongs to no known family.
    """
    for drawn in DRAWN.values() if draws else ():
        if drawn.in_folder(index):
            return drawn
    family = next(family for family in FAMILIES.values() if family.in_folder(index))
    if family.denoiser not in index and "transformer" in index:
        raise not_known(name, str(index.get("_class_name", "pipeline")), draws)
    return family


def family_of_checkpoint(keys: Collection[str]) -> TrainingFamily:
    """The family of an original checkpoint with these keys."""
    return next(family for family in FAMILIES.values() if family.in_checkpoint(keys))


def family_of_pipeline(pipeline: Any, name: str) -> tuple[TrainingFamily, str]:
    """The family and the kind of a loaded pipeline. TrainingError, which mentions `name`, if it has no known family."""
    for family in (*DRAWN.values(), *FAMILIES.values()):
        kind = family.kind_of(pipeline)
        if kind is not None:
            return family, kind
    raise not_known(name, type(pipeline).__name__)


def not_known(name: str, pipeline: str, draws: bool = False) -> TrainingError:
    """The error for an unsupported model with pipeline class `pipeline`. `draws`: list generation-only families too."""
    *most, last = (*known_titles(), *(family.title for family in DRAWN.values() if draws))
    return TrainingError(
        f"{name or 'the base model'} is a {pipeline}, not {', '.join(most)} or {last}: generate with its pipeline in "
        "diffusers, which can load adapters (import lora_adapters, pipe.load_lora_weights)"
    )


def known_titles() -> list[str]:
    """The titles of all kinds of base models, oldest first."""
    return [title for family in reversed(FAMILIES.values()) for title in family.kinds.values()]


# Patterns of repository names of each family, in the order in which they are tried.
_REPOSITORIES = {
    SD3.name: re.compile(r"stable-diffusion-3|\bsd[-_]?3"),
    FLUX.name: re.compile(r"flux[-_.]?1|flux-dev|flux-schnell"),
    SDXL.name: re.compile(r"xl\b|xl[-_]|sdxl|pony|illustrious|noob"),
    SD.name: re.compile(r"stable-diffusion-(v?1|2)|sd[-_]?(v?1|2|turbo)|\bv1-5|v2-1"),
}


def name_by_repository(repository: str) -> str | None:
    """Guess the family's name from a repository or file name; None if no pattern matches."""
    return next((name for name, called in _REPOSITORIES.items() if called.search(repository.lower())), None)
