"""Suggestions for misspelt names."""

import difflib
from collections.abc import Iterable


def closest(name: str, known: Iterable[str], cutoff: float = 0.75) -> str | None:
    """The known name that is most similar to a name.

    Args:
        name: The name; only its first 200 characters are used, since difflib's time grows with the length.
        known: The names that exist.
        cutoff: The minimum similarity, 0 to 1 (difflib's ratio).

    Returns:
        The name; None if none is similar enough.

    >>> closest("dwon", ["down", "mid", "up"]), closest("x", ["down", "mid", "up"])
    ('down', None)
    """
    return next(iter(difflib.get_close_matches(name[:200], list(known), n=1, cutoff=cutoff)), None)
