"""Progress bars of what takes long, for all of this folder."""

from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

from lora_adapters.convert.terminal import is_quiet

T = TypeVar("T")


def progress(things: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """The things, with a bar on a terminal where going through them takes more than a second."""
    return tqdm(things, desc=what, total=total, delay=1, disable=is_quiet() or None, leave=False)
