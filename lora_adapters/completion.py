"""Print a shell completion script for commands, options and their choices, for bash, zsh or tcsh.

The script is static: completion does not start Python, whose imports would take seconds.
"""

import argparse
from collections.abc import Sequence
from importlib import import_module

from lora_adapters.cli import PROGRAMS
from lora_adapters.convert.errors import OneLineError
from lora_adapters.convert.tools.command_line import Parser, called_as, run

SHELLS = ("bash", "zsh", "tcsh")
# The modules of commands whose parser is not in the module that runs the command.
_PARSERS = {
    "train": "lora_adapters.train.options.arguments",
    "init": "lora_adapters.train.preparing.options",
    "generate": "lora_adapters.train.generation.options",
    "resize-images": "lora_adapters.train.resizing.options",
}
_FILES = ("model", "weights", "ckpt", "file", "config", "dir", "vae", "save_to", "sheet", "path")


def parser() -> Parser:
    """The parser of this command."""
    made = Parser(
        prog="completion",
        description="Print a shell completion script for commands and options. Save it in "
        "~/.local/share/bash-completion/completions for bash, or as _lora-adapters in a folder of $fpath for zsh.",
        examples=["bash > ~/.local/share/bash-completion/completions/lora-adapters"],
    )
    made.add_argument("shell", choices=SHELLS, help="shell to print the script for")
    return made


def whole_parser() -> argparse.ArgumentParser:
    """A single parser with all commands and their options."""
    made = argparse.ArgumentParser(prog="lora-adapters")
    made.add_argument("--version", action="version", version="")
    commands = made.add_subparsers(parser_class=argparse.ArgumentParser)
    for name, (module, purpose) in PROGRAMS.items():
        with called_as(f"lora-adapters {name}"):
            own = import_module(_PARSERS.get(name, module)).parser()
        commands.add_parser(name, help=purpose, parents=[own], add_help=False)
    return made


def script(shell: str) -> str:
    """The script for a shell, one of SHELLS; OneLineError if shtab is not installed."""
    try:
        import shtab
    except ImportError:
        raise OneLineError('completion needs shtab: pip install "lora-adapters[completion]"') from None
    made = whole_parser()
    (commands,) = (action for action in made._actions if isinstance(action, argparse._SubParsersAction))
    for command in commands.choices.values():
        for action in command._actions:
            if any(part in action.dest for part in _FILES) and action.nargs != 0 and action.choices is None:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    return shtab.complete(made, shell)


def program(argv: Sequence[str] | None) -> None:
    """The program's body."""
    print(script(parser().parse_args(argv).shell))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    return run(program, argv)
