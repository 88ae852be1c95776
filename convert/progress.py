"""Progress bars of what takes long, for all of this folder."""

from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(things: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """The things, with a bar on a terminal where going through them takes more than a second."""
    return tqdm(things, desc=what, total=total, delay=1, disable=None, leave=False)
