#!/usr/bin/env python3
"""Average LoRA files, such as the saves of one training, into one of the same rank.

usage: average_lora.py a.safetensors b.safetensors c.safetensors --output average.safetensors

The weight changes are averaged. The average has a higher rank than the LoRAs, so its best approximation of their rank
is written, and the relative error is printed.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from lora_adapters.convert.tools.command_line import Parser, add_base_model, add_dtype, add_skip_unknown, run
from lora_adapters.convert.tools.startup import importing


def parser() -> Parser:
    """The options."""
    made = Parser(
        prog="average_lora.py",
        description="Average several LoRAs into one of the same rank.",
        examples=["mine-000008.safetensors mine-000009.safetensors --output average.safetensors"],
    )
    made.add_argument("models", nargs="+", help="LoRA files, PEFT folders or Hub repositories")
    made.add_argument("--output", "--save_to", dest="save_to", required=True, help="output file")
    add_dtype(made, "--save_precision", "precision of the output file (default: float)")
    add_skip_unknown(made)
    add_base_model(made)
    made.add_argument(
        "--no_metadata", action="store_true", help="write only kohya's minimum metadata, without modelspec entries"
    )
    return made


def program(argv: Sequence[str] | None) -> None:
    """The program's body."""
    args = parser().parse_args(argv)
    with importing():  # of torch, which --help does without
        from lora_adapters.convert.programs.average import average_files

    average_files(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    return run(program, argv)


if __name__ == "__main__":
    sys.exit(main())
