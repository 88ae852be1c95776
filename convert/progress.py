"""Progress bars of what takes long, for all of this folder."""

import os
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

from lora_adapters.convert.terminal import is_quiet

T = TypeVar("T")
SHOW = "LORA_ADAPTERS_PROGRESS"  # set by programs that read the bars out of this one's output


def progress(things: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """The things, with a bar on a terminal, or where SHOW is set, if going through them takes more than a second."""
    hidden = is_quiet() or (False if os.environ.get(SHOW) else None)  # None: where there is no terminal
    return tqdm(things, desc=what, total=total, delay=1, disable=hidden, leave=False)
