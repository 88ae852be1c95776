"""Progress bars for long operations."""

import os
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

from lora_adapters.convert.terminal import is_quiet

T = TypeVar("T")
SHOW = "LORA_ADAPTERS_PROGRESS"  # set by programs that parse the progress bars in the output


def progress(things: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """Iterate with a progress bar, on a terminal or if SHOW is set, if it takes more than a second."""
    hidden = is_quiet() or (False if os.environ.get(SHOW) else None)  # None hides the bar without a terminal
    return tqdm(things, desc=what, total=total, delay=1, disable=hidden, leave=False)
