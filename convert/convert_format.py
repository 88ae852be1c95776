#!/usr/bin/env python3
"""Convert an adapter to another format: kohya's, diffusers', a PEFT folder, cloneofsimo's or LyCORIS'.

usage: convert_format.py --model kohya.safetensors --save_to folder --format peft
       convert_format.py --model cloneofsimo.safetensors --save_to kohya.safetensors --format kohya
       convert_format.py --model loha.safetensors --save_to lora.safetensors --to lora --rank 16

--to lora approximates other types (LoHa, LoKr, full differences) by low-rank pairs of the given rank, and prints the
relative error. Types whose change depends on the model's weights (DoRA, GLoRA, (IA)3, OFT, BOFT) need --sd_model.
Changes of norms and biases cannot be expressed as low-rank pairs; they are skipped and listed.

The format of --model is detected. Textual inversion embeddings in cloneofsimo's files are written next to the result,
in one file for each token (result.s1.safetensors for <s1>), which pipe.load_textual_inversion can load. --embeddings
writes such files into a file of cloneofsimo's format.
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
        description="Convert an adapter to another format.",
        examples=["--model kohya.safetensors --save_to folder --format peft"],
    )
    made.add_argument("--model", required=True, help="adapter to convert: a file, a PEFT folder or a Hub repository")
    made.add_argument("--save_to", required=True, help="output file; for peft, output folder")
    made.add_argument("--format", choices=FORMATS, help="output format (default with --to lora: kohya)")
    made.add_argument("--to", choices=("lora",), help="convert LoHa, LoKr and other types to LoRA (requires --rank)")
    made.add_argument("--rank", type=int, help="rank for --to lora; modules of a lower rank are kept")
    made.add_argument("--conv_rank", type=int, help="rank of convolutions larger than 1x1 (default: --rank)")
    made.add_argument("--sd_model", help="base model; --to lora needs it for DoRA, GLoRA, (IA)3, OFT and BOFT")
    made.add_argument(
        "--fold_alpha",
        action="store_true",
        help="write the same alpha in all modules, for diffusers without this package",
    )
    made.add_argument(
        "--zero_alpha", choices=ZERO_ALPHA, help="meaning of an alpha of 0: the rank, or no effect (none)"
    )
    made.add_argument(
        "--embeddings",
        nargs="+",
        default=[],
        help="textual inversion files to include (cloneofsimo only; default: none)",
    )
    add_skip_unknown(made)
    add_base_model(made)
    add_dtype(made, "--save_precision", "precision of the output file (default: unchanged)")
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
