#!/usr/bin/env python3
"""Merge LoRA files into a Stable Diffusion model, or several LoRA files into one.

usage: merge_lora.py --sd_model model.safetensors --save_to merged.safetensors --models a.safetensors --ratios 0.8
       merge_lora.py --sd_model folder --save_to merged.safetensors --models a.safetensors:0.8
       merge_lora.py --save_to sum.safetensors --models a.safetensors b.safetensors --ratios 0.8 0.5

Models are checkpoint files (.safetensors, .ckpt) or Diffusers folders of any known family. The result is a file if the
model is a file, and a folder if it is a folder, or one file in the original layout if --save_to is a file name. Without
--sd_model, the result is exactly the weighted sum of the LoRAs; its rank is the sum of their ranks (--new_rank reduces
it).
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from lora_adapters.convert.choices import EMA
from lora_adapters.convert.parsing import number
from lora_adapters.convert.tools.command_line import (
    Parser,
    add_base_model,
    add_dtype,
    add_methods,
    add_skip_unknown,
    rank_option,
    run,
)
from lora_adapters.convert.tools.startup import importing

MODELS_HELP = (
    "LoRA files, PEFT folders or Hub repositories, optionally with a weight and block weights (a.safetensors:0.8, "
    "a.safetensors:0.8:lbw=MIDD); A1111's tags (<lora:a:0.8>) are also accepted"
)
LBWS_HELP = (
    "block weights of each of --models: a JSON list of 12, 17, 20 or 26 numbers, a preset (MIDD) or blocks (IN02)"
)


def parser() -> Parser:
    """The options."""
    made = Parser(
        prog="merge_lora.py",
        description="Merge LoRAs into a model, or several LoRAs into one.",
        examples=[
            "--sd_model model.safetensors --models a.safetensors --ratios 0.8 --save_to merged.safetensors",
            "--models a.safetensors b.safetensors --ratios 0.8 0.5 --save_to sum.safetensors",
        ],
    )
    made.add_argument(
        "--sd_model", help="checkpoint file or Diffusers folder to merge into (default: merge into one LoRA)"
    )
    made.add_argument("--save_to", required=True, help="output file (.safetensors, .ckpt) or folder")
    made.add_argument("--models", nargs="+", required=True, help=MODELS_HELP)
    made.add_argument("--ratios", nargs="+", type=number, help="weight of each of --models (default: 1)")
    made.add_argument("--lbws", nargs="+", help=LBWS_HELP)
    add_dtype(
        made, "--precision", "the same as --save_precision, which takes precedence; sums are always computed in float"
    )
    add_dtype(made, "--save_precision", "precision of the output (default: unchanged for a model, float for a LoRA)")
    add_methods(made)
    made.add_argument("--new_rank", type=rank_option, help="reduce the merged LoRA to this rank (not with --sd_model)")
    made.add_argument(
        "--new_conv_rank", type=rank_option, help="rank of convolutions larger than 1x1 (default: --new_rank)"
    )
    made.add_argument(
        "--v2", action="store_true", help="require --sd_model to be SD2.x (the version is detected automatically)"
    )
    add_skip_unknown(made)
    add_base_model(made)
    made.add_argument(
        "--ema",
        choices=EMA,
        default="keep",
        help="EMA weights in a checkpoint (model_ema.*): keep them unchanged, drop them, or merge into them too",
    )
    made.add_argument("--no_metadata", action="store_true", help="do not record the source models in the metadata")
    made.add_argument("--concat", action="store_true", help="accepted; merged LoRAs are always concatenated")
    made.add_argument("--shuffle", action="store_true", help="shuffle the rank components of the merged LoRA")
    return made


def program(argv: Sequence[str] | None) -> None:
    """The program's body."""
    args = parser().parse_args(argv)
    with importing():  # of torch, which --help does without
        from lora_adapters.convert.programs.merge import merge

    merge(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    return run(program, argv)


if __name__ == "__main__":
    sys.exit(main())
