"""Reporting a program's error to the launcher that started it: torchrun or `accelerate launch`."""

import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_ACCELERATE = {"accelerate", "accelerate-launch", "accelerate.commands.launch"}
NOTICE = (
    "(what follows is the traceback of `accelerate launch`, which it prints whenever a program fails; "
    "`accelerate launch --quiet` and `lora-adapters train` leave it out)"
)


def tell_launcher(message: str) -> None:
    """Pass an error message on to the launcher, if the program was started by one.

    torchrun, and `accelerate launch` with several processes, print the contents of an error file. `accelerate launch`
    with one process prints a traceback of its own after the error, unless it is `--quiet`; a notice announces it.

    Args:
        message: The error message, one line, without "error: ".
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        about = {"message": f"error: {message}", "extraInfo": {"py_callstack": "", "timestamp": str(int(time.time()))}}
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": about}), encoding="utf-8")
    elif any(name.startswith("ACCELERATE_") for name in os.environ) and prints_traceback(_words_of_parent()):
        print(NOTICE, file=sys.stderr)


def prints_traceback(words: Sequence[str]) -> bool:
    """Whether `accelerate launch` prints a traceback when its only process fails: it does unless --quiet is given.

    Args:
        words: The command line of the launcher, without the options of the program that it starts.

    Returns:
        Whether it prints one; False for other launchers.

    >>> prints_traceback(["python", "/usr/bin/accelerate", "launch", "train/train_network.py"])
    True
    >>> prints_traceback(["python", "/usr/bin/accelerate", "launch", "--quiet", "train/train_network.py"])
    False
    """
    return any(Path(word).name in _ACCELERATE for word in words[:4]) and not {"--quiet", "-q"} & set(words)


def _words_of_parent() -> list[str]:
    """The command line of the parent process without this program's arguments; [] if it cannot be read."""
    try:
        import psutil
    except ImportError:  # accelerate, which requires psutil, is not installed
        return []
    try:
        words = psutil.Process(os.getppid()).cmdline()
    except (OSError, psutil.Error):
        return []
    return words[: len(words) - len(sys.argv[1:])]
