"""The formats that are known, in the order in which a file's keys are tried."""

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module

import torch

from lora_adapters.convert import choices
from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.family import ModelFamily
from lora_adapters.convert.families.names import Lookup

from . import diffusers, kohya, spelled
from .contents import Contents, Format
from .kinds import split_bundled, unread, without_strays

FORMATS: tuple[Format, ...] = tuple(import_module(f"{__package__}.{name}") for name in choices.FORMATS)  # type: ignore


def by_name(name: str) -> Format:
    """The format of that name; AdapterError if there is none."""
    format_ = next((candidate for candidate in FORMATS if name == candidate.NAME), None)
    if format_ is None:
        raise AdapterError(f"unknown format {name}: {', '.join(choices.FORMATS)} are known")
    return format_


def read(
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    lookup: Lookup | None = None,
    family: ModelFamily | None = None,
) -> Contents:
    """Read a file of any known format.

    Args:
        tensors: The tensors of the file; they are not copied.
        metadata: The metadata of the file.
        lookup: Finds modules that no known family has, in a live model.
        family: The family of the live model; None recognises that of the file.

    Returns:
        The changes, metadata and embeddings.

    Raises:
        AdapterError: A module is unknown, one half of a pair is missing, or shapes do not match.
        UnknownFormatError: The keys belong to no known format.
    """
    rest, embeddings = split_bundled(without_strays(tensors))
    if not rest:
        raise AdapterError("there are no tensors in it")
    of_transformer = spelled.read(rest, metadata, lookup, family)
    if of_transformer is not None:
        return replace(of_transformer, embeddings=embeddings)
    for known in FORMATS:
        if known.matches(rest):
            return replace(known.read(rest, metadata, lookup), embeddings=embeddings)
    mine = kohya if any(kohya.matches({key}) for key in rest) else diffusers
    strange = next((key for key in rest if not mine.matches({key})), next(iter(rest)))
    raise unread(rest, f"{strange:.120} is not a key of kohya's or diffusers' LoRA formats")
