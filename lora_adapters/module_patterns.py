"""Regular expressions that choose modules, their ranks and their learning rates, as in kohya's network_args.

A pattern must match a whole name (`re.fullmatch`). A module has several names, any of which may match: its path in
diffusers or transformers, with `text_model.` in text encoders, and its name in the original code, which kohya's trainer
uses for SDXL (`input_blocks.4.1.transformer_blocks.0.attn1.to_q`).
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.names import text_path
from lora_adapters.convert.families.registry import FAMILIES, in_denoiser

_BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")
_TEXT = "encoder.layers."  # text encoders, without `text_model.`, which transformers 5 omits
Names = Callable[[str], tuple[str, ...]]  # all names of the module at a path


def check_patterns(name: str, patterns: Iterable[str] | None) -> None:
    """Raise AdapterError if a pattern of the option `name` is not a regular expression."""
    for pattern in patterns or ():
        if not isinstance(pattern, str):
            raise AdapterError(f"{name} has the value {pattern!r}, expected a string")
        try:
            re.compile(pattern)
        except re.error as error:
            raise AdapterError(f"{name} {pattern} is not a regular expression ({error})") from None


def names_in(paths: Collection[str]) -> Names:
    """A function from the path of a module to all of its names, for a model whose layers have these paths."""
    blocks = in_denoiser(path for path in paths if path.startswith(_BLOCKS))
    family = next((family for family in FAMILIES if family.has(blocks)), None) if blocks else None
    denoiser = "" if family is None else family.denoiser.name
    known = frozenset() if family is None else family.paths(denoiser) | family.norms(denoiser)

    def names(path: str) -> tuple[str, ...]:
        if path.startswith(_TEXT):
            return path, text_path(path)
        if family is None or path not in known:
            return (path,)
        return tuple(dict.fromkeys((path, family.denoiser.original(path))))

    return names


def first_match(patterns: Iterable[str], names: Sequence[str]) -> str | None:
    """The first pattern that matches one of a module's names; None if no pattern matches."""
    return next((pattern for pattern in patterns if any(re.fullmatch(pattern, name) for name in names)), None)


def left_out(include: Sequence[str] | None, exclude: Sequence[str] | None, names: Sequence[str]) -> bool:
    """Whether patterns exclude a module.

    Args:
        include: Regular expressions. Together with `exclude`, they are exceptions from it, as in kohya's trainer. Alone
            (where kohya's trainer ignores them), they exclude all other modules.
        exclude: Regular expressions of modules to exclude.
        names: The names of the module, any of which may match.

    Returns:
        True if the module gets no adapter.
    """
    if first_match(include or (), names) is not None:
        return False
    return bool(include) if not exclude else first_match(exclude, names) is not None


def tally(patterns: Mapping[str, object] | Sequence[str], names: Iterable[Sequence[str]]) -> dict[str, int]:
    """The number of modules for which each pattern is the first to match; `names` are all names of each module."""
    counts = dict.fromkeys(patterns, 0)
    for own in names:
        if (pattern := first_match(patterns, own)) is not None:
            counts[pattern] += 1
    return counts
