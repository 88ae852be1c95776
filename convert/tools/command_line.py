"""Code shared by the command-line programs: the common `main`, error messages of one line, dtype options."""

import argparse
import logging
import os
import select
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from lora_adapters.convert.choices import FAMILIES, MAJORITIES, METHODS, OTHER
from lora_adapters.convert.errors import OneLineError, StoppedError, UsageError, first_line
from lora_adapters.convert.parsing import number
from lora_adapters.convert.portable import tolerant_console
from lora_adapters.convert.terminal import own_quiet, say, say_error
from lora_adapters.convert.tools.launchers import tell_launcher
from lora_adapters.convert.tools.parser import Parser, called_as, refuse

if TYPE_CHECKING:  # imported late, so that --help is fast
    import torch

__all__ = ["Parser", "called_as", "refuse"]  # re-exported

DTYPES = {  # PyTorch's dtype names, by the names in kohya's scripts
    "float": "float32",
    "float32": "float32",
    "fp32": "float32",
    "fp16": "float16",
    "float16": "float16",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
}


def add_dtype(parser: argparse.ArgumentParser, flag: str, help: str) -> None:
    """Add an option for a dtype, with the names of kohya's scripts; its default is None."""
    parser.add_argument(flag, choices=sorted(DTYPES), default=None, metavar="{float,fp16,bf16}", help=help)


def rank_option(text: str) -> int:
    """The `type` of an argparse option that takes a rank.

    Args:
        text: The option's value.

    Returns:
        The rank, at least 1.

    Raises:
        argparse.ArgumentTypeError: The value is not an integer, or below 1.
    """
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"rank must be at least 1, got {number}")
    return number


def add_skip_unknown(parser: argparse.ArgumentParser) -> None:
    """Add --skip_unknown, which leaves out modules that the model does not have."""
    parser.add_argument(
        "--skip_unknown", action="store_true", help="skip modules that the base model does not have, and list them"
    )


def add_base_model(parser: argparse.ArgumentParser) -> None:
    """Add --base_model, the family of the base model."""
    parser.add_argument(
        "--base_model",
        choices=(*FAMILIES, OTHER),
        help="base model of the LoRA, if its layer names fit several models; other: any other model (layer names are "
        "kept as they are in the file)",
    )


def add_base_weights(parser: argparse.ArgumentParser) -> None:
    """Add --sd_model, the model whose weights are needed to convert some kinds of changes."""
    parser.add_argument("--sd_model", help="the model whose weights DoRA, GLoRA, (IA)3, OFT and BOFT change")


def add_methods(parser: argparse.ArgumentParser) -> None:
    """Add --method, --density, --seed and --majority_sign_method."""
    parser.add_argument(
        "--method",
        choices=("linear", *METHODS),
        default="linear",
        help="merging method: the weighted sum (linear, the default), or one of PEFT's methods that prune first",
    )
    parser.add_argument("--density", type=number, help="fraction of each LoRA's values that pruning keeps")
    parser.add_argument("--seed", type=int, help="random seed of dare_linear and dare_ties (default: 0)")
    parser.add_argument(
        "--majority_sign_method",
        choices=MAJORITIES,
        help="how ties and dare_ties elect the sign: by sum (total, the default) or by count (frequency)",
    )


def report_left_out(where: str, modules: Iterable[str], why: str) -> None:
    """Print the modules of an adapter that are left out, if there are any.

    Args:
        where: The adapter's name.
        modules: The names of the modules.
        why: The end of the sentence "modules left out, which ...".
    """
    listed = list(modules)
    if listed:
        say(f"{where}: {len(listed)} modules left out, which {why}:")
        say("\n".join(f"  {printable(module)}" for module in listed))


def dtype_of(*names: str | None) -> "torch.dtype | None":
    """The dtype for the first name that is not None; None if all names are None."""
    import torch

    return next((getattr(torch, DTYPES[name]) for name in names if name is not None), None)


def printable(text: str) -> str:
    r"""Escape control and formatting characters in text from untrusted files, so that it is one line.

    Args:
        text: The text.

    Returns:
        Text that cannot control a terminal.

    >>> printable("title \x1b[2J\n")
    'title \\x1b[2J\\n'
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def output_file(path: str) -> Path:
    """The path of a weights file to write.

    Args:
        path: The path on the command line; `~` is expanded.

    Returns:
        The path.

    Raises:
        UsageError: The suffix is not that of a weights file.
    """
    endings = (".safetensors", ".ckpt", ".pt", ".pth")
    if not path.endswith(endings):
        raise UsageError(f"{path} must have the ending of a weights file: {', '.join(endings)}")
    return Path(path).expanduser()


def _stopping() -> dict[int, Any]:
    """Make SIGTERM and SIGHUP (a closed terminal) end the program like Ctrl-C; returns the previous handlers.

    Unfinished files are then removed. Signals that are already ignored, as with nohup, stay ignored.
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


class _NothingKept(logging.Filter):
    """Drops diffusers' warning about modules to keep in float32 if its list of modules is empty."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "should be kept in float32: []" not in record.getMessage()


def _quiet() -> None:
    """Silence messages that libraries print on import and that users cannot act on.

    Environment variables that are already set are not changed.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # avoids a warning for each data worker
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # avoids two warnings if torchvision is not installed
    logging.getLogger("bitsandbytes.backends").setLevel(logging.ERROR)  # avoids one about 4-bit layers on CPUs
    models = logging.getLogger("diffusers.models.modeling_utils")
    if not any(isinstance(added, _NothingKept) for added in models.filters):
        models.addFilter(_NothingKept())


def run(
    program: Callable[[Sequence[str] | None], Any],
    argv: Sequence[str] | None,
    *,
    memory: str = "use --device cpu",
    stopped: str = "stopped; nothing was written",
    traceback: bool = False,
) -> int:
    """Run the body of a program; every `main` of this package calls this function.

    Args:
        program: The body, which takes `argv`. Its errors are printed as one line on stderr.
        argv: The arguments of the command line; None for those of this process.
        memory: The advice in the message if the device runs out of memory.
        stopped: The message after Ctrl-C, SIGTERM and SIGHUP.
        traceback: Do not catch RuntimeErrors except those about memory.

    Returns:
        The exit status: 0 for success, 1 for a failure, 2 for wrong usage, or the status of a StoppedError.
    """
    _quiet()
    tolerant_console()
    before = _stopping()
    try:
        with own_quiet():
            program(argv)
        if sys.stdout is not None:
            sys.stdout.flush()
        return 0
    except BrokenPipeError as error:
        if _output_is_closed():
            return 1
        message, status = str(error), 1
    except (Exception, KeyboardInterrupt) as error:
        said = _said(error, memory, stopped, traceback)
        if said is None:
            raise
        message, status = said, _status(error)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    text = printable(" ".join(message.split()))
    say_error(text)
    tell_launcher(text)
    return status


def _status(error: BaseException) -> int:
    if isinstance(error, StoppedError):
        return error.status
    return 2 if isinstance(error, UsageError) else 1


def _said(error: BaseException, memory: str, stopped: str, traceback: bool) -> str | None:
    """The message for an error; None for a bug in the program, which needs its traceback."""
    if isinstance(error, OneLineError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return str(error) or stopped
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
    if _is_out_of_memory(error):
        return f"the device has too little memory: {memory}"
    if isinstance(error, MemoryError):
        return "there is too little memory"
    if isinstance(error, RuntimeError):  # from PyTorch, including its CPU allocator
        message = first_line(error)
        if "DefaultCPUAllocator" in message or "not enough memory" in message:
            return "there is too little memory"
        return None if traceback else message
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether a device ran out of memory; does not import torch, which must have raised the error."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def _output_is_closed() -> bool:
    """Whether the reader of stdout is gone, as in `... | head`; the remaining output is then discarded."""
    try:
        sys.stdout.flush()
        if not hasattr(select, "poll"):  # Windows
            return False
        output = select.poll()
        output.register(sys.stdout.fileno(), 0)  # errors are always reported
        closed = any(event & select.POLLERR for _, event in output.poll(0))
    except BrokenPipeError:
        closed = True
    except (OSError, ValueError):  # stdout is not an OS-level file
        return False
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # avoids an error message at exit
    return closed
