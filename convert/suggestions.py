"""What somebody may have meant by a name that does not exist."""

import difflib
from collections.abc import Iterable


def closest(name: str, known: Iterable[str], cutoff: float = 0.75) -> str | None:
    """The known name that is most like `name`; None if none is alike.

    Args:
        name: what was written; its first 200 characters count, since difflib's time grows with the length.
        known: the names that exist.
        cutoff: how much alike they must be, 0 to 1 (difflib's ratio).

    >>> closest("dwon", ["down", "mid", "up"]), closest("x", ["down", "mid", "up"])
    ('down', None)
    """
    return next(iter(difflib.get_close_matches(name[:200], list(known), n=1, cutoff=cutoff)), None)
