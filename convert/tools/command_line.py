"""What the command-line programs share: their one `main`, errors in one line, dtypes."""

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

if TYPE_CHECKING:  # --help does without it
    import torch

__all__ = ["Parser", "called_as", "refuse"]  # with what is here

DTYPES = {  # names in kohya's scripts: PyTorch's
    "float": "float32",
    "float32": "float32",
    "fp32": "float32",
    "fp16": "float16",
    "float16": "float16",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
}


def add_dtype(parser: argparse.ArgumentParser, flag: str, help: str) -> None:
    """An option for a dtype, under the names that kohya's scripts take; None if it is not given."""
    parser.add_argument(flag, choices=sorted(DTYPES), default=None, metavar="{float,fp16,bf16}", help=help)


def rank_option(text: str) -> int:
    """The `type` of an argparse option that takes a rank.

    Args:
        text: The option's value.

    Returns:
        The rank, at least 1.

    Raises:
        argparse.ArgumentTypeError: It is not a whole number, or below 1.
    """
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"rank must be at least 1, got {number}")
    return number


def add_skip_unknown(parser: argparse.ArgumentParser) -> None:
    """An option to leave out what a model does not have."""
    parser.add_argument(
        "--skip_unknown", action="store_true", help="skip modules that the base model does not have, and list them"
    )


def add_base_model(parser: argparse.ArgumentParser) -> None:
    """An option that says what adapters are for."""
    parser.add_argument(
        "--base_model",
        choices=(*FAMILIES, OTHER),
        help="base model of the LoRA, if its layer names fit several models; other: any other model (layer names are "
        "kept as they are in the file)",
    )


def add_base_weights(parser: argparse.ArgumentParser) -> None:
    """An option that names the model from whose weights pairs of some kinds are made."""
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
        why: What they do, to follow "modules left out, which".
    """
    listed = list(modules)
    if listed:
        say(f"{where}: {len(listed)} modules left out, which {why}:")
        say("\n".join(f"  {printable(module)}" for module in listed))


def dtype_of(*names: str | None) -> "torch.dtype | None":
    """The dtype of the first of these names that is not None; None if all are."""
    import torch

    return next((getattr(torch, DTYPES[name]) for name in names if name is not None), None)


def printable(text: str) -> str:
    r"""Text from another program's file on one line, with control and formatting characters as escapes.

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
        path: As on the command line; `~` is the home folder.

    Returns:
        The path.

    Raises:
        UsageError: Its suffix is not that of a weights file.
    """
    endings = (".safetensors", ".ckpt", ".pt", ".pth")
    if not path.endswith(endings):
        raise UsageError(f"{path} has no ending of a weights file: {', '.join(endings)} can be written")
    return Path(path).expanduser()


def _stopping() -> dict[int, Any]:
    """Let SIGTERM and SIGHUP (a closed terminal) end the program as Ctrl-C does; returns the previous handlers.

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


class _NothingKept(logging.Filter):
    """Drops diffusers' warning about modules to be kept in float32 where its list of these is empty."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "should be kept in float32: []" not in record.getMessage()


def _quiet() -> None:
    """Silence what libraries print when they are imported, which no user of these programs can act on.

    Variables that the environment sets already are left as they are.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else they warn whenever a data worker starts
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else two warnings if torchvision is not installed
    logging.getLogger("bitsandbytes.backends").setLevel(logging.ERROR)  # else one about 4-bit layers, on CPUs
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
    """Run a program's body; every `main` of this package is a call of this.

    Args:
        program: The body, which takes `argv`. What it raises is printed as one line on stderr.
        argv: The words of the command line; None takes those of this process.
        memory: What to do if the device has too little memory.
        stopped: The message after Ctrl-C, SIGTERM and SIGHUP.
        traceback: Let RuntimeErrors that are not about memory through, with their traceback.

    Returns:
        The exit status: 0; 1 for a failure; 2 for wrong usage; what a StoppedError has as its status.
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
    """The message for an error; None if it is a fault of the program, which needs its traceback."""
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
    if isinstance(error, RuntimeError):  # PyTorch's, its CPU allocator's among them
        message = first_line(error)
        if "DefaultCPUAllocator" in message or "not enough memory" in message:
            return "there is too little memory"
        return None if traceback else message
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether a device has too little memory. Without torch there is no such error, and it need not be imported."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def _output_is_closed() -> bool:
    """Whether nobody reads stdout any more, as behind `| head`; what is left for it is then dropped."""
    try:
        sys.stdout.flush()
        if not hasattr(select, "poll"):  # Windows
            return False
        output = select.poll()
        output.register(sys.stdout.fileno(), 0)  # errors are reported without being asked for
        closed = any(event & select.POLLERR for _, event in output.poll(0))
    except BrokenPipeError:
        closed = True
    except (OSError, ValueError):  # not a file of the system's
        return False
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it ends
    return closed
