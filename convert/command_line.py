"""What the command-line programs of this folder share: errors in one line, dtypes, progress bars."""

import argparse
import difflib
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

import torch
from tqdm import tqdm

from .errors import AdapterError, OneLineError, first_line

T = TypeVar("T")
DTYPES = {
    "float": torch.float32,
    "float32": torch.float32,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "float16": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are raised as `failure`, so that they are shown as all others are."""

    failure: type[OneLineError] = AdapterError

    def error(self, message: str) -> NoReturn:
        raise self.failure(f"{message}{self._near(message)} (--help shows the options)")

    def _near(self, message: str) -> str:
        """What may have been meant by options that there are not."""
        _, unknown, words = message.partition("unrecognized arguments: ")
        names = [word.partition("=")[0] for word in words.split() if unknown and word.startswith("--")]
        known = [name for name in self._option_string_actions if name.startswith("--")]
        near = [difflib.get_close_matches(name[:200], known, n=1, cutoff=0.75) for name in names]
        found = [match[0] for match in near if match]
        return f"; did you mean {' and '.join(found)}?" if found else ""


class _Refused(argparse.Action):
    """An option of kohya's scripts that there is no use for here: giving it is an error that says why."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        raise AdapterError(f"{self.option_strings[0]} is not supported: {self.const}")


def refuse(parser: argparse.ArgumentParser, flag: str, why: str) -> None:
    """An option with a value that is refused with a reason."""
    parser.add_argument(flag, action=_Refused, const=why, help=argparse.SUPPRESS)


def add_dtype(parser: argparse.ArgumentParser, flag: str, help: str) -> None:
    """An option for a dtype, under the names that kohya's scripts take; None where it is not given."""
    parser.add_argument(flag, choices=sorted(DTYPES), default=None, metavar="{float,fp16,bf16}", help=help)


def dtype_of(*names: str | None) -> torch.dtype | None:
    """The dtype of the first name that is given; None where none is."""
    return next((DTYPES[name] for name in names if name is not None), None)


def device_of(name: str | None) -> torch.device:
    """A device that is there, the CPU by default; AdapterError for any other."""
    try:
        device = torch.device(name or "cpu")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        raise AdapterError(f"device {name} cannot be used ({reason})") from None
    return device


def progress(things: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """The things, with a bar on a terminal where going through them takes more than a second."""
    return tqdm(things, desc=what, total=total, delay=1, disable=None, leave=False)


def output_file(path: str) -> Path:
    """The path of a weights file to write; AdapterError where its ending names no format for one."""
    endings = (".safetensors", ".ckpt", ".pt", ".pth")
    if not path.endswith(endings):
        raise AdapterError(f"{path} has no ending of a weights file: {', '.join(endings)} can be written")
    return Path(path).expanduser()


def run(program: Callable[[Sequence[str] | None], Any], argv: Sequence[str] | None) -> int:
    """Run a program's body; gives back its exit status. What goes wrong is one line on stderr, and status 1."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, stop)  # as Ctrl-C: unfinished files are removed on the way out
    except ValueError:  # not in the main thread
        before = None
    try:
        program(argv)
        return 0
    except AdapterError as error:
        message = str(error)
    except BrokenPipeError:  # whoever read the output has enough of it
        return 1
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
    except torch.OutOfMemoryError:
        message = "the device has too little memory: use --device cpu"
    except MemoryError:
        message = "there is too little memory"
    except KeyboardInterrupt:
        message = "stopped; nothing was written"
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 1
