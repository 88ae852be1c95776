#!/usr/bin/env python3
"""Split a DyLoRA into LoRA files, one for each of its ranks.

usage: extract_lora_from_dylora.py --model dylora.safetensors --save_to split.safetensors [--unit 4] [--ranks 4,8]

Writes split-0004.safetensors, split-0008.safetensors, ... up to the full rank.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from lora_adapters.convert.adapter import Adapter
from lora_adapters.convert.errors import AdapterError, UsageError
from lora_adapters.convert.formats.metadata import DyLora
from lora_adapters.convert.progress import progress
from lora_adapters.convert.storage.files import all_or_none
from lora_adapters.convert.terminal import say
from lora_adapters.convert.tools.command_line import Parser, add_skip_unknown, output_file, run
from lora_adapters.convert.tools.inputs import load


def parser() -> Parser:
    """The options."""
    made = Parser(
        prog="extract_lora_from_dylora.py",
        description="Split a DyLoRA into one LoRA for each rank.",
        examples=["--model dylora.safetensors --save_to split.safetensors"],
    )
    made.add_argument("--model", required=True, help="the DyLoRA: a file, a PEFT folder or a Hub repository")
    made.add_argument("--save_to", required=True, help="name of the results; -0004 and so on is put before its ending")
    made.add_argument("--unit", type=int, help="distance of ranks (default: what the file says)")
    made.add_argument("--ranks", help="only these ranks, such as 4,8 (default: all, with the full one)")
    add_skip_unknown(made)
    return made


def ranks_of(adapter: Adapter, asked: str | None) -> list[int]:
    """The ranks to write: all that the adapter can be cut to, or those asked for."""
    highest = max(one.rank for one in adapter.pairs().values())
    unit = (adapter.dylora or DyLora()).unit
    if highest % unit:
        raise AdapterError(f"unit {unit} does not divide the rank {highest}: the adapter was not trained with it")
    if asked is None:
        return [*range(unit, highest, unit), highest]
    try:
        return sorted({int(number) for number in asked.split(",")})
    except ValueError:
        raise UsageError(f"--ranks is a list of numbers such as 4,8, not {asked}") from None


def program(argv: Sequence[str] | None) -> None:
    """The program's body."""
    args = parser().parse_args(argv)
    path = output_file(args.save_to)
    adapter = load(args.model, skip_unknown=args.skip_unknown)
    dylora = adapter.dylora
    if args.unit is not None and args.unit < 1:
        raise UsageError(f"--unit must be at least 1, got {args.unit}")
    if dylora is None and args.unit is None:
        raise AdapterError(f"{args.model} does not say that it is a DyLoRA: give its --unit")
    if dylora is None:
        dylora = DyLora(rank_scaling="rank")  # such a file can only be kohya's, cut as kohya's script does
    adapter = adapter.as_dylora(replace(dylora, unit=args.unit or dylora.unit))
    ranks = ranks_of(adapter, args.ranks)
    names = [f"{path.stem}-{rank:04d}{path.suffix}" for rank in ranks]
    with all_or_none(path.parent) as folder:  # a rank that cannot be cut, or Ctrl-C, leaves no half of the set
        for rank, name in progress(zip(ranks, names, strict=True), "splitting", len(ranks)):
            adapter.truncate(rank).save(folder / name)
    for name in names:
        say(path.with_name(name))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    return run(program, argv)


if __name__ == "__main__":
    sys.exit(main())
