"""The families of base models that can be trained and drawn with, by name. A new one is a module and a line here.

`drawn` has those that are drawn with only.
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

# In the order in which a model is tried: SD takes what has no mark of another family.
FAMILIES: dict[str, TrainingFamily] = {family.name: family for family in (SD3, FLUX, SDXL, SD)}

# By option of the command line: the kind that it declares.
KIND_FLAGS: dict[str, str] = {
    flag: kind for family in reversed(FAMILIES.values()) for flag, kind in family.flags.items()
}


def family_of_kind(kind: str) -> TrainingFamily:
    """The family that has this kind of base model (`BaseModels.kind`)."""
    return next(family for family in (*FAMILIES.values(), *DRAWN.values()) if kind in family.kinds)


def family_of_folder(index: Mapping[str, Any], name: str = "", draws: bool = False) -> TrainingFamily:
    """The family of a diffusers folder with this model_index.json.

    Args:
        index: The table.
        name: The folder or repository, for the error.
        draws: Whether families count that are drawn with and not trained.

    Returns:
        The family.

    Raises:
        TrainingError: Its denoiser is of no family.
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
    """The family and the kind of a loaded pipeline. TrainingError, which shows `name`, if it is of none."""
    for family in (*DRAWN.values(), *FAMILIES.values()):
        kind = family.kind_of(pipeline)
        if kind is not None:
            return family, kind
    raise not_known(name, type(pipeline).__name__)


def not_known(name: str, pipeline: str, draws: bool = False) -> TrainingError:
    """The error for a model, whose pipeline's class is `pipeline`, that is not trained (`draws`: nor drawn with)."""
    *most, last = (*known_titles(), *(family.title for family in DRAWN.values() if draws))
    return TrainingError(
        f"{name or 'the base model'} is a {pipeline}, not {', '.join(most)} or {last}: its own pipeline in diffusers "
        "draws with it, and takes adapters (import lora_adapters, pipe.load_lora_weights)"
    )


def known_titles() -> list[str]:
    """The titles of all kinds of base models, the oldest first."""
    return [title for family in reversed(FAMILIES.values()) for title in family.kinds.values()]


# How repositories of models of each family are called, in the order in which they are tried.
_REPOSITORIES = {
    SD3.name: re.compile(r"stable-diffusion-3|\bsd[-_]?3"),
    FLUX.name: re.compile(r"flux[-_.]?1|flux-dev|flux-schnell"),
    SDXL.name: re.compile(r"xl\b|xl[-_]|sdxl|pony|illustrious|noob"),
    SD.name: re.compile(r"stable-diffusion-(v?1|2)|sd[-_]?(v?1|2|turbo)|\bv1-5|v2-1"),
}


def name_by_repository(repository: str) -> str | None:
    """The name of the family that a model's repository or file name tells; None if it tells none."""
    return next((name for name, called in _REPOSITORIES.items() if called.search(repository.lower())), None)
