"""Atomic writing, replacing and deleting of files and folders on Linux, macOS and Windows.

Windows does not allow a file to be replaced or deleted while a program has it open or mapped into memory, needs a
writable handle to flush a file, and may refuse links. This module handles all of that; other modules write, replace and
delete files through its functions, which raise OSError.
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
_WAITS = (0.05, 0.1, 0.2, 0.4)  # seconds between retries: virus scanners and indexers briefly open new files
_LONGEST_NAME = 255  # bytes on Linux; other systems allow 255 UTF-16 units, which is never less
_LONGEST_PATH = 259  # characters on Windows, unless long paths are enabled
_leftovers: set[Path] = set()


def aside(target: Path, ending: str) -> Path:
    """A hidden, unused path beside `target`: `.<name>.<random>.<ending>`, with the name truncated if it is too long."""
    tail = f".{secrets.token_hex(4)}.{ending}"
    room = _LONGEST_NAME - len(tail) - 1
    if LOCKING:
        room = max(0, min(room, _LONGEST_PATH - len(str(target.parent.absolute())) - len(tail) - 2))
    name = target.name.encode(errors="surrogateescape")[:room]
    return target.with_name(f".{name.decode(errors='ignore')}{tail}")


@contextmanager
def replacing(target: Path, durable: bool = False) -> Iterator[Path]:
    """Write a file atomically: to a temporary path, renamed to `target` when the block ends without an error.

    The parent folder is created if it is missing. An existing target stays unchanged until the rename, and its
    permissions are kept.

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
        raise IsADirectoryError(errno.EISDIR, "is a folder: give a file in it", str(target))
    partial = aside(target, "partial")
    try:
        partial.touch()
        # The mode of the old file or of the umask: safetensors creates files that only the user can read.
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
    """Write a folder atomically: to a temporary path, renamed to `target` when the block ends without an error.

    If the process is killed during the exchange, the old folder is left under the name `aside(target, "old")`.

    Args:
        target: The folder to write or replace.
        keep: Called with the new folder; returns the names of the entries to move from the old folder to the new one.
        file_by_file: Replace the files one at a time if Windows refuses to rename the old folder because files in it
            are mapped.

    Yields:
        A path in the same folder to create files in. It is deleted if the block raises.

    Raises:
        OSError: The folder cannot be written or exchanged; the old folder is then kept.
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
    """Replace the files of `target` by those of `made`, one by one: a folder with mapped files cannot be renamed."""
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

    If Windows refuses because the old file is mapped, the old file is renamed to a hidden name, which Windows allows.
    It is deleted as soon as possible: now, when the next file is replaced, or at exit.

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
    if LOCKING:  # also delete files left by programs that were killed
        for old in target.parent.glob(f".{glob.escape(target.name)}.*.old"):
            if old.is_file():
                delete(old)


def delete(file: Path) -> bool:
    """Delete a file if it exists.

    On Windows, a mapped file is renamed to a hidden name and deleted later, at exit at the latest.

    Args:
        file: The file.

    Returns:
        Whether no file with this name is left.
    """
    try:
        if LOCKING and file.exists():
            file.chmod(stat.S_IWRITE | stat.S_IREAD)  # Windows does not delete read-only files
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
    """Delete a folder and its contents if it exists; False if something in it cannot be deleted now."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        for file in [path for path in folder.rglob("*") if not path.is_dir()]:
            delete(file)
        shutil.rmtree(folder, ignore_errors=True)
    return not folder.exists()


def remove(path: Path) -> bool:
    """Delete a file or a folder (which is renamed first, so that a kill leaves no partial one); False if in use."""
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
    """Flush a written file to the disk, so that a later rename cannot reach the disk before the contents."""
    with file.open("r+b") as opened:  # Windows only flushes writable handles
        os.fsync(opened.fileno())


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Make a hard link, or a copy if links are not supported or would lock the file."""
    if not LOCKING:  # with locking, opening one link locks the file under all of its names
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
