"""Files and folders that are whole or not there, under the rules of Linux, macOS and Windows.

Windows lets nobody replace or delete a file that a program has open or mapped into memory, asks for a writable handle
to flush a file, and may refuse links. All of that is handled here; other modules write, replace and delete through
these functions. They raise OSError.
"""

import atexit
import contextlib
import errno
import glob
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

LOCKING = os.name == "nt"  # files that are open or mapped cannot be replaced or deleted
_WAITS = (0.05, 0.1, 0.2, 0.4)  # seconds; virus scanners and indexers hold new files for a moment
_LONGEST_NAME = 255  # bytes on Linux; others count UTF-16 units, of which a name never has more
_LONGEST_PATH = 259  # characters on Windows, unless its user allows longer ones
_leftovers: set[Path] = set()


def aside(target: Path, ending: str) -> Path:
    """A hidden, unused name beside `target`: `.<name>.<random>.<ending>`, the name cut where it would be too long."""
    tail = f".{secrets.token_hex(4)}.{ending}"
    room = _LONGEST_NAME - len(tail) - 1
    if LOCKING:
        room = max(0, min(room, _LONGEST_PATH - len(str(target.parent.absolute())) - len(tail) - 2))
    name = target.name.encode(errors="surrogateescape")[:room]
    return target.with_name(f".{name.decode(errors='ignore')}{tail}")


@contextmanager
def replacing(target: Path, durable: bool = False) -> Iterator[Path]:
    """Write a file whole or not at all: under another name first, renamed to `target` when the block ends without an
    error.

    The parent folder is created if it is missing. Until the rename an existing target stays unchanged; its permissions
    are kept.

    Args:
        target: The file to write or replace.
        durable: Flush the contents to the disk before the rename.

    Yields:
        A path in the same folder to write to. It is deleted if the block raises.

    Raises:
        IsADirectoryError: `target` is a folder.
        OSError: The file cannot be written or renamed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder: name a file in it", str(target))
    partial = aside(target, "partial")
    try:
        partial.touch()
        # As the umask or the old file has it; safetensors creates files that only the user can read.
        mode = stat.S_IMODE((target if target.exists() else partial).stat().st_mode)
        yield partial
        if durable:
            sync(partial)
        partial.chmod(mode)
        move(partial, target)
    finally:
        delete(partial)


@contextmanager
def replacing_folder(
    target: Path, keep: Callable[[Path], Iterable[str]] = lambda made: (), file_by_file: bool = False
) -> Iterator[Path]:
    """Write a folder whole or not at all: under another name first, renamed to `target` when the block ends without an
    error.

    A process that is killed during the exchange leaves the old folder under `aside(target, "old")`.

    Args:
        target: The folder to write or replace.
        keep: Called with the filled folder; returns the names in the old folder that are moved to the new one.
        file_by_file: Replace the files one at a time if Windows refuses to rename the old folder because files in it
            are mapped.

    Yields:
        A path in the same folder to create files in. It is deleted if the block raises.

    Raises:
        OSError: The folder cannot be written or exchanged; the old one is then in its place.
    """
    partial, old, kept = aside(target, "partial"), aside(target, "old"), []
    try:
        partial.mkdir(parents=True)
        yield partial
        kept = list(keep(partial))
        if target.exists():
            try:
                _patiently(lambda: target.rename(old))
            except PermissionError:
                if not (LOCKING and file_by_file):
                    raise
                _replace_files(target, partial, kept)
                return
        try:
            _patiently(lambda: partial.rename(target))
        except OSError:
            if old.exists():
                old.rename(target)
            raise
        for name in kept:
            (target / name).parent.mkdir(exist_ok=True)
            (old / name).rename(target / name)
    finally:
        delete_folder(partial)
        if target.exists() and not any((old / name).exists() for name in kept):
            delete_folder(old)


def _replace_files(target: Path, made: Path, kept: Iterable[str]) -> None:
    """The files of `made` in place of those of `target`, one by one: a folder with mapped files cannot be renamed."""
    new = {path.relative_to(made) for path in made.rglob("*")}
    for inner in sorted(new):
        if (made / inner).is_dir():
            (target / inner).mkdir(exist_ok=True)
        else:
            move(made / inner, target / inner)
    for old in sorted(target.rglob("*"), reverse=True):
        inner = old.relative_to(target)
        if inner not in new and not any(str(part) in kept for part in (inner, *inner.parents)):
            if not old.is_dir():
                delete(old)
            elif not any(old.iterdir()):
                old.rmdir()


def move(source: Path, target: Path) -> None:
    """Rename a file, replacing `target`.

    If Windows refuses because the old file is mapped, the old file is renamed to a hidden name, which Windows allows,
    and deleted as soon as possible: now, when the next file is replaced, or at exit.

    Args:
        source: The file to rename.
        target: Its new path, on the same file system.

    Raises:
        PermissionError: Another program keeps the old file open.
        OSError: The file cannot be renamed.
    """

    def attempt() -> None:
        try:
            os.replace(source, target)
        except PermissionError:
            if not (LOCKING and target.is_file()):
                raise
            old = aside(target, "old")
            target.rename(old)
            try:
                source.rename(target)
            except OSError:
                old.rename(target)
                raise
            delete(old)

    _delete_leftovers()
    _patiently(attempt)
    if LOCKING:  # also those of programs that were killed
        for old in target.parent.glob(f".{glob.escape(target.name)}.*.old"):
            if old.is_file():
                delete(old)


def delete(file: Path) -> bool:
    """Delete a file if it exists.

    A mapped file is renamed to a hidden name on Windows, and deletion is tried again later, at exit at the latest.

    Args:
        file: The file.

    Returns:
        Whether nothing is left under this name.
    """
    try:
        if LOCKING and file.exists():
            file.chmod(stat.S_IWRITE | stat.S_IREAD)  # Windows keeps files that are read-only
        file.unlink(missing_ok=True)
    except OSError:
        if not LOCKING:
            return False
        if file.suffix in (".old", ".partial"):
            _leftovers.add(file)
            return False
        try:
            hidden = file.rename(aside(file, "old"))
        except OSError:
            return False
        _leftovers.add(hidden)
    _leftovers.discard(file)
    return True


def delete_folder(folder: Path) -> bool:
    """Delete a folder with all that is in it, if there is one; False where something in it cannot be deleted now."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        for file in [path for path in folder.rglob("*") if not path.is_dir()]:
            delete(file)
        shutil.rmtree(folder, ignore_errors=True)
    return not folder.exists()


def remove(path: Path) -> bool:
    """Delete a file or a folder, which a kill leaves under another name; False if it is in use."""
    if not path.is_dir():
        return delete(path)
    gone = aside(path, "partial")
    try:
        _patiently(lambda: path.rename(gone))
    except OSError:
        return not path.exists()
    delete_folder(gone)
    return True


def sync(file: Path) -> None:
    """Bring a written file's contents to the disk, so that a rename after it cannot come first."""
    with file.open("r+b") as opened:  # Windows flushes writable handles only
        os.fsync(opened.fileno())


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """The same contents under a second name: a hard link where the system has them and a link locks nothing."""
    if not LOCKING:  # an open link locks the file under its other names too
        try:
            os.link(source, target)
            return
        except FileNotFoundError:
            raise
        except OSError:
            pass
    shutil.copy2(source, target)


def _patiently(action: Callable[[], object]) -> None:
    for wait in _WAITS if LOCKING else ():
        try:
            action()
            return
        except PermissionError:
            time.sleep(wait)
    action()


@atexit.register
def _delete_leftovers() -> None:
    for file in list(_leftovers):
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
            _leftovers.discard(file)
