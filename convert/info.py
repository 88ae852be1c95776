#!/usr/bin/env python3
"""Show base model, type, ranks by block and training metadata of LoRA files, and check their hash.

usage: info.py model.safetensors ... [--json] [--plot norms.png]
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from lora_adapters.convert.tools.command_line import Parser, run
from lora_adapters.convert.tools.startup import importing


def parser() -> Parser:
    """The options."""
    made = Parser(
        prog="info.py",
        description="Show the type, base model, ranks and metadata of LoRA files.",
        examples=["model.safetensors"],
    )
    made.add_argument("models", nargs="+", help="LoRA files, PEFT folders or Hub repositories")
    made.add_argument("--json", action="store_true", help="print a JSON list instead of text")
    made.add_argument(
        "--plot",
        metavar="PNG",
        help="plot the norm of the weight change in each block to this file (requires matplotlib)",
    )
    return made


def program(argv: Sequence[str] | None) -> None:
    """The program's body."""
    args = parser().parse_args(argv)
    with importing():  # of torch, which --help does without
        from lora_adapters.convert.programs.info import info

    info(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    return run(program, argv)


if __name__ == "__main__":
    sys.exit(main())
