"""Distinguishing families with the same layer names by the sizes of the layers."""

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
    """Narrow down families: to the one with a characteristic layer size, or to those with released models of this size.

    Args:
        families: The families that have all of the adapter's layers, by name.
        has_own_width: Whether a layer of the adapter has a size that occurs only in this family (`Marks.width`).
        layers_of: The adapted layers of the denoiser, with the family's names.

    Returns:
        The remaining families, in the same order; all families if no released model has these sizes, as for tiny
        models.

    Released models differ in the width and the number of their blocks: SD3's blocks are 1536 or 2432 wide, those of
    Flux.1 and Qwen-Image 3072, but Flux.1 has 19 blocks and Qwen-Image 60.
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
        if stack is None:  # the size of layers outside of the blocks depends on their inputs
            continue
        if int(path.removeprefix(f"{stack.path}.").partition(".")[0]) >= stack.depth:
            return False
        reads_the_stream = "norm" not in path and "mod" not in path  # reads or writes the stream, which has that width
        if out_in is not None and reads_the_stream and widths.isdisjoint(out_in):
            return False
    return True
