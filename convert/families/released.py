"""Telling families whose layers have the same names apart by the sizes of the layers."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from .family import ModelFamily
from .transformer import Transformer


class SizedLayer(NamedTuple):
    """A layer of a denoiser: its path in diffusers, and (out, in) of its weight, None if that is not known."""

    path: str
    out_in: tuple[int, int] | None


def likeliest(
    families: Sequence[ModelFamily],
    has_own_width: Callable[[ModelFamily], bool],
    layers_of: Callable[[ModelFamily], Iterable[SizedLayer]],
) -> tuple[ModelFamily, ...]:
    """The family that alone has a layer of such a width, or those that have a released model of such sizes.

    Args:
        families: The families that have all of the adapter's layers, by name.
        has_own_width: Whether a layer of the adapter is as wide as only this family's (`Marks.width`).
        layers_of: The layers of the denoiser that are adapted, as each family calls them.

    Returns:
        The families that are left, in the same order; all of them where no released model has these sizes, as of tiny
        models.

    The width and the number of a block tell: SD3's blocks are 1536 or 2432 wide, Flux.1's 3072, as Qwen-Image's, of
    which there are 60 and not 19.
    """
    if len(families) < 2:
        return tuple(families)
    own = next(filter(has_own_width, families), None)
    if own is not None:
        return (own,)
    fitting = tuple(family for family in families if _is_released(family, layers_of(family)))
    return fitting or tuple(families)


def _is_released(family: ModelFamily, layers: Iterable[SizedLayer]) -> bool:
    layout, widths = family.denoiser.layout, family.marks.widths
    assert isinstance(layout, Transformer)
    for path, out_in in layers:
        stack = next((stack for stack in layout.stacks if path.startswith(f"{stack.path}.")), None)
        if stack is None:  # outside of the blocks layers are as wide as what they read
            continue
        if int(path.removeprefix(f"{stack.path}.").partition(".")[0]) >= stack.depth:
            return False
        reads_the_stream = "norm" not in path and "mod" not in path  # or writes it, whose width is the block's
        if out_in is not None and reads_the_stream and widths.isdisjoint(out_in):
            return False
    return True
