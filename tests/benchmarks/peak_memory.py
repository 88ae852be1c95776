"""The memory that something takes while it runs. Linux alone has what it needs: /proc/self."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# A process that reads as often as it can how much of the memory of another is in no file, until its input ends.
_WATCH = """
import select, sys

with open(f"/proc/{sys.argv[1]}/status", "rb", buffering=0) as status:
    highest = 0
    while True:
        status.seek(0)
        line = next(line for line in status.read().splitlines() if line.startswith(b"RssAnon"))
        highest = max(highest, int(line.split()[1]))
        if sys.argv[2:]:
            print(flush=True)
            del sys.argv[2:]
        if select.select([sys.stdin], [], [], 0)[0]:
            print(highest)
            break
"""


class Peak(NamedTuple):
    """MiB at the highest: of all resident memory, and of what is not the pages of mapped files."""

    resident: float
    anonymous: float


def peak_above_rest(action: Callable[[], object]) -> float:
    """MiB of resident memory that the action takes at its highest, above what is there before."""
    _forget()
    before = _status("VmRSS")
    action()
    return _status("VmHWM") - before


def peaks_above_rest(action: Callable[[], object]) -> Peak:
    """As `peak_above_rest`, and the same of anonymous memory alone.

    The kernel keeps the peak of resident memory itself; that of anonymous memory is the highest that a second process
    sees, which asks some ten thousand times a second.
    """
    command = [sys.executable, "-c", _WATCH, str(os.getpid()), "report"]
    _forget()
    before = _status("RssAnon")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as watcher:
        assert watcher.stdout is not None
        watcher.stdout.readline()  # that it is watching
        resident = peak_above_rest(action)
        highest = int(watcher.communicate("end\n")[0]) / 1024
    return Peak(resident, max(highest, _status("RssAnon")) - before)


def _forget() -> None:
    """Give back what was freed, else the action would run in it and seem to take nothing; begin a new peak."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> float:
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(field))
    return int(line.split()[1]) / 1024
