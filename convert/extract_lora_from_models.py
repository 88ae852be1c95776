#!/usr/bin/env python3
"""Extract a LoRA from the difference between two models: the best approximation of what fine-tuning changed.

usage: extract_lora_from_models.py --model_org base.safetensors --model_tuned tuned.safetensors --dim 32
                                   --save_to lora.safetensors
       extract_lora_from_models.py --model_org base.safetensors --model_tuned tuned.safetensors --algo lokr --factor 4
                                   --save_to lokr.safetensors

Models are checkpoint files (.safetensors, .ckpt) or Diffusers folders, in any combination.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from lora_adapters.convert.choices import EXTRACTED
from lora_adapters.convert.parsing import number
from lora_adapters.convert.tools.command_line import Parser, add_dtype, rank_option, refuse, run
from lora_adapters.convert.tools.startup import importing


def parser() -> Parser:
    """The options."""
    made = Parser(
        prog="extract_lora_from_models.py",
        description="Extract a LoRA from the difference between two models.",
        examples=["--model_org base.safetensors --model_tuned tuned.safetensors --dim 32 --save_to lora.safetensors"],
    )
    made.add_argument("--model_org", required=True, help="original model: checkpoint file or Diffusers folder")
    made.add_argument("--model_tuned", required=True, help="fine-tuned model: checkpoint file or Diffusers folder")
    made.add_argument("--save_to", required=True, help="output file")
    made.add_argument(
        "--algo",
        choices=("lora", *EXTRACTED),
        default="lora",
        help="type of adapter: LoRA (the default), LoKr, or the full differences",
    )
    made.add_argument(
        "--factor", type=int, help="lokr: size of the first factor (default: -1, close to the square root)"
    )
    made.add_argument("--dim", type=rank_option, help="rank of the LoRA (default: 4; with --target_error: no limit)")
    made.add_argument("--conv_dim", type=int, help="rank of convolutions larger than 1x1 (default: skip them)")
    made.add_argument(
        "--target_error",
        type=number,
        help="use the smallest ranks (lokr: the smallest file) that reach this relative error",
    )
    made.add_argument(
        "--min_diff", type=number, default=0.0, help="skip text encoders that differ by no more than this (default: 0)"
    )
    made.add_argument(
        "--clamp_quantile",
        type=number,
        help="clamp the factors at this quantile, as kohya's scripts do at 0.99; slow (default: no clamping)",
    )
    made.add_argument("--device", help="device to compute on: cpu, cuda, ... (default: cpu)")
    add_dtype(made, "--save_precision", "precision of the output file (default: float)")
    made.add_argument("--v2", action="store_true", help="require SD2.x models (the version is detected automatically)")
    made.add_argument("--v_parameterization", action="store_true", help="the models use v-prediction (SD2.x)")
    made.add_argument("--sdxl", action="store_true", help="require SDXL models (the version is detected automatically)")
    made.add_argument(
        "--no_metadata", action="store_true", help="write only kohya's minimum metadata, without modelspec entries"
    )
    refuse(made, "--load_precision", "models are read as they are, and subtracted in float")
    for flag in ("--load_original_model_to", "--load_tuned_model_to"):
        refuse(made, flag, "models stay on the disk; --device says where to compute")
    return made


def program(argv: Sequence[str] | None) -> None:
    """The program's body."""
    args = parser().parse_args(argv)
    with importing():  # of torch, which --help does without
        from lora_adapters.convert.programs.extract import extract_adapter

    extract_adapter(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    return run(program, argv)


if __name__ == "__main__":
    sys.exit(main())
