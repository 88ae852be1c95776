#!/usr/bin/env python3
"""Write an adapter in another format: kohya's, diffusers', a PEFT folder, cloneofsimo's or LyCORIS'.

usage: convert_format.py --model kohya.safetensors --save_to folder --format peft
       convert_format.py --model cloneofsimo.safetensors --save_to kohya.safetensors --format kohya
       convert_format.py --model loha.safetensors --save_to lora.safetensors --to lora --rank 16

--to lora approximates other kinds (LoHa, LoKr, full differences) by low-rank pairs of the given rank, and prints the
relative error. Changes that depend on the model's weights (DoRA, GLoRA, (IA)3, OFT, BOFT) need --sd_model. Changes of
norms and biases, which pairs cannot hold, are left out and listed.

What --model is, is recognised. Textual-inversion embeddings in cloneofsimo's files are written beside the result, one
file for each token (result.s1.safetensors for <s1>), as pipe.load_textual_inversion reads them; --embeddings puts such
files back into a file of cloneofsimo's format.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from lora_adapters.convert.choices import FORMATS, ZERO_ALPHA
from lora_adapters.convert.tools.command_line import Parser, add_base_model, add_dtype, add_skip_unknown, run
from lora_adapters.convert.tools.startup import importing


def parser() -> Parser:
    """The options."""
    made = Parser(
        prog="convert_format.py",
        description="Write an adapter in another format.",
        examples=["--model kohya.safetensors --save_to folder --format peft"],
    )
    made.add_argument("--model", required=True, help="the adapter: a file, a PEFT folder or a Hub repository")
    made.add_argument("--save_to", required=True, help="the result: a file, or a folder for peft")
    made.add_argument("--format", choices=FORMATS, help="what to write (with --to lora: kohya where it is not given)")
    made.add_argument("--to", choices=("lora",), help="make low-rank pairs of other kinds of changes (needs --rank)")
    made.add_argument("--rank", type=int, help="rank of the pairs that --to lora makes; pairs of lower ranks stay")
    made.add_argument("--conv_rank", type=int, help="the same of convolutions above 1x1 (default: rank)")
    made.add_argument(
        "--sd_model", help="the model whose weights DoRA, GLoRA, (IA)3, OFT and BOFT change, for --to lora"
    )
    made.add_argument("--fold_alpha", action="store_true", help="one alpha in all modules, for stock diffusers")
    made.add_argument("--zero_alpha", choices=ZERO_ALPHA, help="what an alpha of 0 is: the rank, or no effect (none)")
    made.add_argument("--embeddings", nargs="+", default=[], help="embedding files to put into cloneofsimo's format")
    add_skip_unknown(made)
    add_base_model(made)
    add_dtype(made, "--save_precision", "of the result (default: unchanged)")
    return made


def program(argv: Sequence[str] | None) -> None:
    """The program's body."""
    args = parser().parse_args(argv)
    with importing():  # of torch, which --help does without
        from lora_adapters.convert.programs.convert import convert

    convert(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    return run(program, argv)


if __name__ == "__main__":
    sys.exit(main())
