#!/usr/bin/env python3
"""Average LoRA files, such as the saves of one training, into one of the same rank.

usage: average_lora.py a.safetensors b.safetensors c.safetensors --output average.safetensors

The average is that of the changes of the weights. Its rank is higher than theirs: what is written is the best
approximation of their own rank, and its relative error is printed.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from lora_adapters.convert.deltas.svd import as_written, report
from lora_adapters.convert.errors import UsageError
from lora_adapters.convert.terminal import say
from lora_adapters.convert.tools.average import average
from lora_adapters.convert.tools.command_line import (
    Parser,
    add_dtype,
    add_skip_unknown,
    dtype_of,
    output_file,
    run,
)
from lora_adapters.convert.tools.inputs import load
from lora_adapters.convert.tools.summary import written


def parser() -> Parser:
    """The options."""
    made = Parser(
        prog="average_lora.py",
        description="Average LoRAs into one of the same rank.",
        examples=["mine-000008.safetensors mine-000009.safetensors --output average.safetensors"],
    )
    made.add_argument("models", nargs="+", help="LoRA files, PEFT folders or Hub repositories")
    made.add_argument("--output", "--save_to", dest="save_to", required=True, help="the resulting file")
    add_dtype(made, "--save_precision", "of the result (default: float)")
    add_skip_unknown(made)
    made.add_argument("--no_metadata", action="store_true", help="write kohya's least metadata only, no modelspec")
    return made


def program(argv: Sequence[str] | None) -> None:
    """The program's body."""
    args = parser().parse_args(argv)
    path = output_file(args.save_to)
    if len(args.models) < 2:
        raise UsageError("one file is its own average: name two or more")
    if twice := next((name for name in args.models if args.models.count(name) > 1), None):
        raise UsageError(f"{twice} is named twice")
    exact, fits = average({name: load(name, skip_unknown=args.skip_unknown) for name in args.models})
    result = exact.to(dtype_of(args.save_precision) or torch.float32)
    result.save(path, modelspec=not args.no_metadata)
    pairs = {module: fit for module, fit in fits.items() if fit.total}
    if pairs:
        say(report(as_written(pairs, exact.modules, result.modules), "svd-merge at a higher --new_rank"))
    say(written(path, result))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    return run(program, argv)


if __name__ == "__main__":
    sys.exit(main())
