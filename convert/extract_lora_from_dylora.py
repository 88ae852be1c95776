#!/usr/bin/env python3
"""Split a DyLoRA (or any LoRA, with --sort) into several LoRA files, one for each of its ranks.

usage: extract_lora_from_dylora.py --model dylora.safetensors --save_to split.safetensors [--unit 4] [--ranks 4,8]
                                   [--sort]

Writes split-0004.safetensors, split-0008.safetensors, ... up to the full rank.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from lora_adapters.convert.tools.command_line import Parser, add_base_model, add_skip_unknown, run
from lora_adapters.convert.tools.startup import importing


def parser() -> Parser:
    """The options."""
    made = Parser(
        prog="extract_lora_from_dylora.py",
        description="Split a DyLoRA into several LoRAs, one for each rank.",
        examples=["--model dylora.safetensors --save_to split.safetensors"],
    )
    made.add_argument("--model", required=True, help="DyLoRA to split: a file, a PEFT folder or a Hub repository")
    made.add_argument(
        "--save_to",
        required=True,
        help="name of the output files; the rank is added before the extension, such as -0004",
    )
    made.add_argument("--unit", type=int, help="step between the ranks (default: the unit stored in the file)")
    made.add_argument("--ranks", help="ranks to write, such as 4,8 (default: all, including the full rank)")
    made.add_argument("--sort", action="store_true", help="first sort the components by size (SVD); works for any LoRA")
    add_skip_unknown(made)
    add_base_model(made)
    return made


def program(argv: Sequence[str] | None) -> None:
    """The program's body."""
    args = parser().parse_args(argv)
    with importing():  # of torch, which --help does without
        from lora_adapters.convert.programs.split import split

    split(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    return run(program, argv)


if __name__ == "__main__":
    sys.exit(main())
