#!/usr/bin/env python3
"""Merge several LoRA files into one of a given rank: the best approximation of their weighted sum.

usage: svd_merge_lora.py --save_to c.safetensors --models a.safetensors b.safetensors --ratios 0.6 0.4 --new_rank 32

The LoRAs may have any ranks, dtypes and modules. The result is computed from the factors, without full-size matrices.
Other kinds (LoHa, LoKr, full differences) are computed module by module; DoRA, GLoRA, (IA)3, OFT and BOFT, whose
changes depend on the model's weights, need --sd_model.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from lora_adapters.convert.merge_lora import LBWS_HELP, MODELS_HELP
from lora_adapters.convert.parsing import number
from lora_adapters.convert.tools.command_line import (
    Parser,
    add_base_model,
    add_base_weights,
    add_dtype,
    add_methods,
    add_skip_unknown,
    rank_option,
    run,
)
from lora_adapters.convert.tools.startup import importing


def parser() -> Parser:
    """The options."""
    made = Parser(
        prog="svd_merge_lora.py",
        description="Merge several LoRAs into one of a given rank.",
        examples=["--models a.safetensors b.safetensors --ratios 0.6 0.4 --new_rank 32 --save_to c.safetensors"],
    )
    made.add_argument("--save_to", required=True, help="output file")
    made.add_argument("--models", nargs="+", required=True, help=MODELS_HELP)
    made.add_argument("--ratios", nargs="+", type=number, help="weight of each of --models (default: 1)")
    made.add_argument("--lbws", nargs="+", help=LBWS_HELP)
    add_methods(made)
    made.add_argument(
        "--new_rank", type=rank_option, help="rank of the merged LoRA (default: 4; with --target_error: no limit)"
    )
    made.add_argument(
        "--new_conv_rank", type=rank_option, help="rank of convolutions larger than 1x1 (default: --new_rank)"
    )
    made.add_argument(
        "--target_error", type=number, help="use the smallest ranks that reach this relative error, at most --new_rank"
    )
    made.add_argument(
        "--clamp_quantile",
        type=number,
        help="clamp the factors at this quantile, as kohya's scripts do at 0.99; slow (default: no clamping)",
    )
    add_base_weights(made)
    made.add_argument("--device", help="device to compute on: cpu, cuda, ... (default: cpu)")
    add_dtype(
        made,
        "--precision",
        "the same as --save_precision, which takes precedence; the merge is always computed in float",
    )
    add_dtype(made, "--save_precision", "precision of the output file (default: float)")
    add_skip_unknown(made)
    add_base_model(made)
    made.add_argument("--no_metadata", action="store_true", help="do not record the source models in the metadata")
    return made


def program(argv: Sequence[str] | None) -> None:
    """The program's body."""
    args = parser().parse_args(argv)
    with importing():  # of torch, which --help does without
        from lora_adapters.convert.programs.svd_merge import svd_merge

    svd_merge(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    return run(program, argv)


if __name__ == "__main__":
    sys.exit(main())
