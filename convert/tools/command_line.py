"""What the command-line programs of this folder share: errors in one line, dtypes, progress bars."""

import argparse
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

import torch
from tqdm import tqdm

from lora_adapters.convert.errors import AdapterError, OneLineError, first_line
from lora_adapters.convert.portable import tolerant_console
from lora_adapters.convert.suggestions import closest

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
        found = [near for name in names if (near := closest(name, known))]
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


def add_skip_unknown(parser: argparse.ArgumentParser) -> None:
    """An option to leave out what a model does not have."""
    parser.add_argument(
        "--skip_unknown", action="store_true", help="leave out modules that the model does not have, and list them"
    )


def report_left_out(where: str, modules: Iterable[str], why: str) -> None:
    """List the modules of an adapter that are left out; nothing where there are none."""
    listed = list(modules)
    if listed:
        print(f"{where}: {len(listed)} modules left out, which {why}:")
        print("\n".join(f"  {printable(module)}" for module in listed))


def dtype_of(*names: str | None) -> torch.dtype | None:
    """The dtype of the first name that is given; None where none is."""
    return next((DTYPES[name] for name in names if name is not None), None)


def device_of(name: str | None, dtype: torch.dtype = torch.float64) -> torch.device:
    """A device that is there and has numbers of `dtype`, the CPU by default; AdapterError for any other.

    Apple's (mps) has no float64, in which the file tools compute.
    """
    try:
        device = torch.device(name or "cpu")
        torch.empty(0, device=device, dtype=dtype)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = first_line(error)
        raise AdapterError(f"device {name} cannot be used ({reason})") from None
    return device


def progress(things: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """The things, with a bar on a terminal where going through them takes more than a second."""
    return tqdm(things, desc=what, total=total, delay=1, disable=None, leave=False)


def printable(text: str) -> str:
    r"""Text from a foreign file in one line for a terminal: control and formatting characters are shown as escapes.

    >>> printable("title \x1b[2J\n")
    'title \\x1b[2J\\n'
    """
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def output_file(path: str) -> Path:
    """The path of a weights file to write; AdapterError where its ending names no format for one."""
    endings = (".safetensors", ".ckpt", ".pt", ".pth")
    if not path.endswith(endings):
        raise AdapterError(f"{path} has no ending of a weights file: {', '.join(endings)} can be written")
    return Path(path).expanduser()


def _stopping() -> dict[int, Any]:
    """Let SIGTERM and SIGHUP (a closed terminal) end the program as Ctrl-C does; gives back the handlers before.

    Unfinished files are then removed on the way out. A signal that is ignored, as under nohup, stays so.
    """

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before: dict[int, Any] = {}
    for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        number = getattr(signal, name, None)
        if number is None or signal.getsignal(number) is signal.SIG_IGN:
            continue
        try:
            before[number] = signal.signal(number, stop)
        except ValueError:  # not in the main thread
            break
    return before


def run(program: Callable[[Sequence[str] | None], Any], argv: Sequence[str] | None) -> int:
    """Run a program's body; gives back its exit status. What goes wrong is one line on stderr, and status 1."""

    tolerant_console()
    before = _stopping()
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
    except RuntimeError as error:  # PyTorch's, its CPU allocator's among them
        message = first_line(error)
        if "DefaultCPUAllocator" in message or "not enough memory" in message:
            message = "there is too little memory"
    except KeyboardInterrupt:
        message = "stopped; nothing was written"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    print(f"error: {printable(' '.join(message.split()))}", file=sys.stderr)
    return 1
