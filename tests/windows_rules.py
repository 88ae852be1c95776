"""A pytest plugin that imitates, on Linux, the rules of Windows for files, processes and text.

    python -m pytest -p tests.windows_rules tests/convert/test_adapter.py

Files that this process has open cannot be renamed, replaced or deleted. Memory-mapped files cannot be replaced,
truncated or deleted, but can be renamed. Folders that contain such files cannot be renamed. Read-only files cannot be
replaced or deleted. fsync needs a writable handle, which folders do not have. Names contain no `<>:"|?*\\`, do not end
with a dot or space, and are not device names; paths have at most 259 characters. There are no links (tests that create
links are skipped), no SIGHUP and no fork. Text files opened without an encoding, and output of programs, are cp1252.
"""

import builtins
import contextlib
import errno
import fcntl
import io
import multiprocessing
import os
import re
import shutil
import signal
import stat
import sys
import traceback
from pathlib import Path

import pytest

_FORBIDDEN = re.compile(r'[<>:"|?*\\\x00-\x1f]|[. ]$|^(con|prn|aux|nul|com[1-9]|lpt[1-9])(\.|$)', re.IGNORECASE)
_REAL = {name: getattr(os, name) for name in ("fsync", "open", "replace", "rename", "unlink", "mkdir")}
_real_open = io.open
_TESTS = f"{Path(__file__).resolve().parent}/"


def _identity(path):
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _open_files():
    found = set()
    for handle in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.path.isfile(f"/proc/self/fd/{handle}"):
                found.add(_identity(f"/proc/self/fd/{handle}"))
    return found


def _mapped_files():
    with _real_open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        return {line.split(maxsplit=5)[5].rstrip("\n") for line in maps if line.count("/")}


def is_open(path):
    return os.path.isfile(path) and _identity(path) in _open_files()


def is_mapped(path):
    return os.path.realpath(path) in _mapped_files()


def _used_inside(folder):
    below = f"{os.path.realpath(folder)}/"
    if any(name.startswith(below) for name in _mapped_files()):
        return True
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    opened = _open_files() if files else set()
    return any(_identity(path) in opened for path in files)


def _refuse(path, number=errno.EACCES, said="The process cannot access the file because it is being used"):
    raise OSError(number, said, str(path))  # EACCES makes a PermissionError


def _read_only(path):
    return not os.path.isdir(path) and not os.lstat(path).st_mode & stat.S_IWUSR


def _check_name(path):
    path = os.fspath(path)
    if not isinstance(path, str) or path.startswith(("/proc/", "/dev/")):
        return
    if _FORBIDDEN.search(os.path.basename(path)):
        _refuse(path, errno.EINVAL, "The filename, directory name, or volume label syntax is incorrect")
    if len(os.path.abspath(path)) > 259:
        _refuse(path, errno.ENOENT, "The system cannot find the path specified")


def fsync(handle):
    number = handle if isinstance(handle, int) else handle.fileno()
    if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "Bad file descriptor")
    _REAL["fsync"](handle)


def open_handle(path, flags, *rest, **more):
    if not isinstance(path, int) and os.path.isdir(path):
        _refuse(path, said="Permission denied")
    return _REAL["open"](path, flags, *rest, **more)


def _move(source, target, over):
    _check_name(target)
    if os.path.isdir(source):
        if _used_inside(source):
            _refuse(source)
    elif is_open(source):
        _refuse(source)
    if os.path.lexists(target) and not os.path.samefile(source, target):
        if not over:
            _refuse(target, errno.EEXIST, "Cannot create a file when that file already exists")
        if os.path.isdir(target) or is_open(target) or is_mapped(target) or _read_only(target):
            _refuse(target)


def replace(source, target, **more):
    _move(source, target, over=True)
    _REAL["replace"](source, target, **more)


def rename(source, target, **more):
    _move(source, target, over=False)
    _REAL["rename"](source, target, **more)


def _in_filelock():
    """Whether the caller is `filelock`, which has its own code for each system and works differently on Windows."""
    frame = sys._getframe(2)
    while frame is not None:
        if f"{os.sep}filelock{os.sep}" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def unlink(path, **more):
    if os.path.isfile(path) and not _in_filelock() and (is_open(path) or is_mapped(path) or _read_only(path)):
        _refuse(path)
    _REAL["unlink"](path, **more)


def mkdir(path, *rest, **more):
    _check_name(path)
    _REAL["mkdir"](path, *rest, **more)


def no_link(source, target, *rest, **more):
    callers = [frame.filename for frame in traceback.extract_stack()[:-1] if not frame.filename.endswith("pathlib.py")]
    if callers[-1].startswith(_TESTS):
        pytest.skip("there are no links")
    raise OSError(errno.EPERM, "A required privilege is not held by the client", str(target))


def open_file(file, mode="r", buffering=-1, encoding=None, *rest, **more):
    if not isinstance(file, int):
        if set(mode) & set("wax"):
            _check_name(file)
        if "w" in mode and os.path.isfile(file) and is_mapped(file):
            _refuse(file, errno.EINVAL, "The requested operation cannot be performed on a file with a mapped section")
    if "b" not in mode and encoding in (None, "locale"):
        encoding = "cp1252"
    return _real_open(file, mode, buffering, encoding, *rest, **more)


def apply(patch):
    """Apply the rules until `patch` (a MonkeyPatch) is undone."""
    from lora_adapters.convert import portable
    from lora_adapters.convert.storage import atomic

    patch.setattr(atomic, "LOCKING", True)
    patch.setattr(portable, "WINDOWS", True)
    for name, rule in (("fsync", fsync), ("open", open_handle), ("replace", replace), ("rename", rename),
                       ("unlink", unlink), ("remove", unlink), ("mkdir", mkdir), ("link", no_link),
                       ("symlink", no_link)):  # fmt: skip
        patch.setattr(os, name, rule)
    patch.setattr(builtins, "open", open_file)
    patch.setattr(io, "open", open_file)
    patch.setattr(shutil, "_use_fd_functions", False)  # rmtree by names, as on Windows
    patch.delattr(os, "sched_getaffinity")
    patch.delattr(os, "O_DIRECTORY")
    patch.delattr(signal, "SIGHUP")
    patch.setenv("PYTHONIOENCODING", "cp1252")
    multiprocessing.set_start_method("spawn", force=True)


_patch = pytest.MonkeyPatch()


def pytest_configure(config):
    apply(_patch)


def pytest_unconfigure(config):
    _patch.undo()
