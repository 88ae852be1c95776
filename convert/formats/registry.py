"""The known formats, in the order in which they are tried for the keys of a file."""

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module

import torch

from lora_adapters.convert import choices
from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.family import ModelFamily
from lora_adapters.convert.families.names import NEAREST, Lookup
from lora_adapters.convert.families.unlisted import UNLISTED

from . import diffusers, kohya, spelled, unlisted
from .contents import Contents, Format
from .kinds import split_bundled, unread, without_strays

FORMATS: tuple[Format, ...] = tuple(import_module(f"{__package__}.{name}") for name in choices.FORMATS)  # type: ignore

_HINT = f"; for an unknown model, use --base_model {UNLISTED.name}"


def by_name(name: str) -> Format:
    """Find a format by name; AdapterError if it is unknown."""
    format_ = next((candidate for candidate in FORMATS if name == candidate.NAME), None)
    if format_ is None:
        raise AdapterError(f"unknown format {name}: choose one of {', '.join(choices.FORMATS)}")
    return format_


def to_write(name: str | None, contents: Contents) -> Format:
    """Choose the format to write an adapter in.

    Args:
        name: The user's choice. None means the file's own spelling if the model is not known, otherwise kohya's format,
            or LyCORIS' if some changes are not low-rank pairs.
        contents: The adapter.

    Returns:
        The format.

    Raises:
        AdapterError: The name is unknown, or the format requires a known model.
    """
    if contents.modules and contents.family is UNLISTED:
        if name is not None:
            raise AdapterError(
                f"cannot write the format {name}, which needs a known model: the adapter was read with "
                f"--base_model {UNLISTED.name}"
            )
        return unlisted  # type: ignore[return-value]
    return by_name(name or ("kohya" if contents.has_only_pairs else "lycoris"))


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
        lookup: Finds modules that no known family has in a live model.
        family: The family of the live model, or the user's choice; None recognises it from the file.

    Returns:
        The changes, metadata and embeddings.

    Raises:
        AdapterError: A module is unknown, a pair is incomplete, or shapes do not match.
        UnknownFormatError: The keys belong to no known format.
    """
    rest, embeddings = split_bundled(without_strays(tensors))
    if not rest:
        raise AdapterError("contains no tensors")
    if family is UNLISTED:
        return replace(unlisted.read(rest, metadata), embeddings=embeddings)
    try:
        return replace(_read(rest, metadata, lookup, family), embeddings=embeddings)
    except AdapterError as error:
        is_typo = NEAREST in str(error)
        if family is None and lookup is None and not is_typo and not unlisted.is_of_known_model(rest):
            error.args = (f"{error}{_HINT}",)
        raise


def _read(
    rest: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    lookup: Lookup | None,
    family: ModelFamily | None,
) -> Contents:
    of_transformer = spelled.read(rest, metadata, lookup, family)
    if of_transformer is not None:
        return of_transformer
    for known in FORMATS:
        if known.matches(rest):
            return known.read(rest, metadata, lookup)
    mine = kohya if any(kohya.matches({key}) for key in rest) else diffusers
    strange = next((key for key in rest if not mine.matches({key})), next(iter(rest)))
    raise unread(rest, f"{strange:.120} is not a key of kohya's or diffusers' LoRA formats")
