#!/usr/bin/env python3
"""Reduce the rank of a LoRA: the best approximation, of a fixed rank or of a rank chosen for each module.

usage: resize_lora.py --model big.safetensors --save_to small.safetensors --new_rank 8
       resize_lora.py --model big.safetensors --save_to small.safetensors --new_rank 32 --dynamic_method sv_fro
                      --dynamic_param 0.9

alpha / rank of every module is unchanged. Other kinds (LoHa, LoKr, full differences) become pairs of the new rank;
DoRA, GLoRA, (IA)3, OFT and BOFT, whose changes depend on the model's weights, need --sd_model.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from lora_adapters.convert.choices import DYNAMIC_METHODS
from lora_adapters.convert.parsing import number
from lora_adapters.convert.tools.command_line import (
    Parser,
    add_base_model,
    add_base_weights,
    add_dtype,
    add_skip_unknown,
    rank_option,
    run,
)
from lora_adapters.convert.tools.startup import importing


def parser() -> Parser:
    """The options."""
    made = Parser(
        prog="resize_lora.py",
        description="Reduce the rank of a LoRA.",
        examples=["--model big.safetensors --new_rank 8 --save_to small.safetensors"],
    )
    made.add_argument("--model", required=True, help="LoRA to resize: a file, a PEFT folder or a Hub repository")
    made.add_argument("--save_to", required=True, help="output file")
    made.add_argument(
        "--new_rank", type=rank_option, help="new rank; with --dynamic_method, the maximum rank (default: 4)"
    )
    made.add_argument(
        "--new_conv_rank", type=rank_option, help="rank of convolutions larger than 1x1 (default: --new_rank)"
    )
    made.add_argument(
        "--dynamic_method", choices=DYNAMIC_METHODS, help="choose the rank of each module by this criterion"
    )
    made.add_argument("--dynamic_param", type=number, help="target value of --dynamic_method, such as 0.9")
    made.add_argument(
        "--target_error", type=number, help="use the smallest ranks that reach this relative error, at most --new_rank"
    )
    add_base_weights(made)
    made.add_argument("--device", help="device to compute on: cpu, cuda, ... (default: cpu)")
    add_skip_unknown(made)
    add_base_model(made)
    made.add_argument("--svd_lowrank_niter", type=int, help="accepted; has no effect, since the SVD is exact")
    made.add_argument("--verbose", action="store_true", help="print the rank and the error of each module")
    add_dtype(made, "--save_precision", "precision of the output file (default: float)")
    return made


def program(argv: Sequence[str] | None) -> None:
    """The program's body."""
    args = parser().parse_args(argv)
    with importing():  # of torch, which --help does without
        from lora_adapters.convert.programs.resize import resize

    resize(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    return run(program, argv)


if __name__ == "__main__":
    sys.exit(main())
