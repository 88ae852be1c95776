"""The formats that are known, in the order in which a file's keys are tried."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.names import Lookup

from . import cloneofsimo, diffusers, kohya, lycoris, peft
from .contents import Contents, Format
from .kinds import split_bundled, unread

FORMATS: tuple[Format, ...] = (kohya, peft, diffusers, cloneofsimo, lycoris)
NAMES = tuple(known.NAME for known in FORMATS)


def by_name(name: str) -> Format:
    """The format of that name; AdapterError where there is none."""
    found = next((known for known in FORMATS if name == known.NAME), None)
    if found is None:
        raise AdapterError(f"unknown format {name}: {', '.join(NAMES)} are known")
    return found


def read(
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    lookup: Lookup | None = None,
    only_pairs: bool = False,
) -> Contents:
    """What a file with these tensors and metadata holds.

    Args:
        tensors: as in the file; they are not copied.
        metadata: the file's.
        lookup: finds modules that no known family has, in a live model.
        only_pairs: whether formats that hold other kinds than low-rank pairs are refused too.

    Raises:
        AdapterError: lone halves of pairs, unknown modules, shapes that do not fit.
        UnknownFormatError: the keys are of no known format.
    """
    rest, embeddings = split_bundled(tensors)
    if not rest:
        raise AdapterError("there are no tensors in it")
    for known in FORMATS:
        if known.matches(rest) and (known.ONLY_PAIRS or not only_pairs):
            return replace(known.read(rest, metadata, lookup), embeddings=embeddings)
    mine = kohya if any(kohya.matches({key}) for key in rest) else diffusers
    strange = next((key for key in rest if not mine.matches({key})), next(iter(rest)))
    raise unread(rest, f"{strange:.120} is not a key of kohya's or diffusers' LoRA formats")
