"""The reason why a program ended, for the launcher that started it: torchrun, or `accelerate launch`."""

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
    """Pass an error on to the launcher, if there is one.

    torchrun, and `accelerate launch` for several processes, print last what they find in a file. `accelerate launch`
    for one process prints a traceback of its own after the error, unless it is `--quiet`: a line says so before it.

    Args:
        message: The error, one line, without "error: ".
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        about = {"message": f"error: {message}", "extraInfo": {"py_callstack": "", "timestamp": str(int(time.time()))}}
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": about}), encoding="utf-8")
    elif any(name.startswith("ACCELERATE_") for name in os.environ) and prints_traceback(_words_of_parent()):
        print(NOTICE, file=sys.stderr)


def prints_traceback(words: Sequence[str]) -> bool:
    """Whether `accelerate launch` prints a traceback when its one process fails, which it does without --quiet.

    Args:
        words: The command line, without the options of the program that it starts.

    Returns:
        False also for other launchers.

    >>> prints_traceback(["python", "/usr/bin/accelerate", "launch", "train/train_network.py"])
    True
    >>> prints_traceback(["python", "/usr/bin/accelerate", "launch", "--quiet", "train/train_network.py"])
    False
    """
    return any(Path(word).name in _ACCELERATE for word in words[:4]) and not {"--quiet", "-q"} & set(words)


def _words_of_parent() -> list[str]:
    """The command line of the process that started this one, without what it passed on; [] if it cannot be read."""
    try:
        import psutil
    except ImportError:  # without accelerate, which needs it
        return []
    try:
        words = psutil.Process(os.getppid()).cmdline()
    except (OSError, psutil.Error):
        return []
    return words[: len(words) - len(sys.argv[1:])]
