"""Differences between Linux, macOS and Windows in file names, paths and consoles (for writing files see `atomic`)."""

import io
import os
import re
import sys
from pathlib import Path

WINDOWS = os.name == "nt"
_FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f]')
_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(?=\.|$)", re.IGNORECASE)


def file_name(text: str) -> str:
    """Make a text usable as a file name on any system.

    Args:
        text: The text.

    Returns:
        The text with "_" for characters that Windows does not allow, and before names that it reserves.

    >>> file_name("train[:10%]"), file_name("a: b? "), file_name("con.txt"), file_name("...")
    ('train[_10%]', 'a_ b_', '_con.txt', '_')
    """
    name = _FORBIDDEN.sub("_", text).rstrip(". ")
    return _DEVICE.sub(r"_\1", name, count=1) if _DEVICE.match(name) else name or "_"


def forbidden(path: str) -> str | None:
    """The reason why this system does not allow a file with this name.

    On Windows `a:b` would be a hidden stream of the file `a`, and dots and spaces at the end are dropped.

    Args:
        path: A relative path.

    Returns:
        The reason; None if the name is allowed.
    """
    for name in Path(path).parts if WINDOWS else ():
        if name != file_name(name):
            match = _FORBIDDEN.search(name)
            return f"Windows does not allow {f'{match[0]!r} in names' if match else f'the name {name!r}'}"
    return None


def same_file_key(name: str) -> str:
    """A key that is equal for names that Windows and macOS treat as the same file."""
    return name.casefold() if WINDOWS or sys.platform == "darwin" else name


def is_path(name: str) -> bool:
    r"""Whether a text can only be a path: owner/name of a repository has no drive letter, backslash or leading dot.

    Args:
        name: The text.

    Returns:
        False if it may be a repository.

    >>> [is_path(name) for name in (r"C:\models\x", "C:/x", r".\x", r"..\x", "./x", "~/x", "/x", "owner/name", "name")]
    [True, True, True, True, True, True, True, False, False]
    """
    return name.startswith((".", "/", "~")) or "\\" in name or re.match(r"[A-Za-z]:", name) is not None


def tolerant_console() -> None:
    """From now on, print characters that the console's encoding lacks as `\\xe9` or `\\u2192`, instead of failing."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
