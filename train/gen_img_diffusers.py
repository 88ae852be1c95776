#!/usr/bin/env python3
"""Generate images with a base model and adapters, with the options of kohya's gen_img.

usage: gen_img_diffusers.py --ckpt model --network_weights a.safetensors --network_mul 0.8 --prompt "a cat --n blurry"
       gen_img_diffusers.py --ckpt model --from_file prompts.txt --network_weights dylora.safetensors
           --sweep weight=0,0.5,1 rank=4,8,16        (all options: --help)
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    # Run as a file from a checkout: replace this folder on Python's path by its parent, which contains the package.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)


from lora_adapters.convert.tools.command_line import run


def program(argv: Sequence[str] | None) -> None:
    """Parse the options and generate images."""
    from lora_adapters.train.generation.options import parse

    settings = parse(argv)
    from lora_adapters.train.generation.run import generate

    generate(settings)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program on command-line options; returns its exit status."""
    advice = "try --fp16, --batch_size 1 or smaller images"
    return run(program, argv, memory=advice, stopped="stopped; the written images are complete", traceback=True)


if __name__ == "__main__":
    sys.exit(main())
