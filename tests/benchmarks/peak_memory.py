"""Measures the peak memory of an action. Needs /proc, so it works on Linux only."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# A process that polls the anonymous memory of another process as often as possible, until its stdin gets input.
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
    """Peak MiB: of all resident memory, and of anonymous memory (not pages of mapped files)."""

    resident: float
    anonymous: float


def peak_above_rest(action: Callable[[], object]) -> float:
    """The peak of resident memory during the action, in MiB above the memory before it."""
    _forget()
    before = _status("VmRSS")
    action()
    return _status("VmHWM") - before


def peaks_above_rest(action: Callable[[], object]) -> Peak:
    """Like `peak_above_rest`, and also the peak of anonymous memory.

    The kernel records the peak of resident memory. The peak of anonymous memory is the highest value seen by a second
    process, which polls it about ten thousand times per second.
    """
    command = [sys.executable, "-c", _WATCH, str(os.getpid()), "report"]
    _forget()
    before = _status("RssAnon")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as watcher:
        assert watcher.stdout is not None
        watcher.stdout.readline()  # wait until it is watching
        resident = peak_above_rest(action)
        highest = int(watcher.communicate("end\n")[0]) / 1024
    return Peak(resident, max(highest, _status("RssAnon")) - before)


def _forget() -> None:
    """Return freed memory to the system, since the action would reuse it without a visible peak; reset the peak."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> float:
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(field))
    return int(line.split()[1]) / 1024
