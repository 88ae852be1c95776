#!/usr/bin/env python3
"""Merge LoRA files into a Stable Diffusion model, or several LoRA files into one.

usage: merge_lora.py --sd_model model.safetensors --save_to merged.safetensors --models a.safetensors --ratios 0.8
       merge_lora.py --sd_model folder --save_to merged.safetensors --models a.safetensors:0.8
       merge_lora.py --save_to sum.safetensors --models a.safetensors b.safetensors --ratios 0.8 0.5

Models are checkpoint files (.safetensors, .ckpt) or Diffusers folders, of any known family. The result is a file
for a file and a folder for a folder, or one file in the original layout where --save_to names a file. Without
--sd_model the result is exactly the weighted sum of the changes: its rank is the sum of the ranks (--new_rank makes it
smaller).
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
    "LoRA files, PEFT folders or Hub repositories; a weight and block weights may follow (a.safetensors:0.8, "
    "a.safetensors:0.8:lbw=MIDD), A1111's tags are read too (<lora:a:0.8>)"
)
LBWS_HELP = "block weights for each model: JSON lists of 12, 17, 20 or 26 numbers, presets (MIDD) or blocks (IN02)"


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
    made.add_argument("--sd_model", help="checkpoint file or Diffusers folder to merge into; without it, into one LoRA")
    made.add_argument("--save_to", required=True, help="the result: a file (.safetensors, .ckpt), or a folder")
    made.add_argument("--models", nargs="+", required=True, help=MODELS_HELP)
    made.add_argument("--ratios", nargs="+", type=number, help="a weight for each model (default: 1 for each)")
    made.add_argument("--lbws", nargs="+", help=LBWS_HELP)
    add_dtype(made, "--precision", "of the result where save_precision is not given; sums are always made in float")
    add_dtype(made, "--save_precision", "of the result; by default tensors of a model keep theirs, a LoRA is float")
    add_methods(made)
    made.add_argument("--new_rank", type=rank_option, help="reduce the sum to this rank (without sd_model)")
    made.add_argument("--new_conv_rank", type=rank_option, help="rank of convolutions above 1x1 (default: new_rank)")
    made.add_argument("--v2", action="store_true", help="sd_model must be SD2.x (it is recognised without this)")
    add_skip_unknown(made)
    add_base_model(made)
    made.add_argument(
        "--ema",
        choices=EMA,
        default="keep",
        help="averaged weights in a checkpoint (model_ema.*): kept as they are, left out, or merged too",
    )
    made.add_argument("--no_metadata", action="store_true", help="write no metadata about where the result is from")
    made.add_argument("--concat", action="store_true", help="concatenate ranks, as sums are made without this too")
    made.add_argument("--shuffle", action="store_true", help="put the sum's components into a random order")
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
