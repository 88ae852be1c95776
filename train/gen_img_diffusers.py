#!/usr/bin/env python3
"""Draw pictures with Stable Diffusion (1.x, 2.x, XL) and adapters, with kohya's gen_img options.

usage: gen_img_diffusers.py --ckpt model --network_weights a.safetensors --network_mul 0.8 --prompt "a cat --n blurry"
       gen_img_diffusers.py --ckpt model --from_file prompts.txt --network_weights dylora.safetensors
           --sweep weight=0,0.5,1 rank=4,8,16        (all options: --help)
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    # Run as a file from a checkout: this folder is where Python looks first, the package is beside its parent.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program on command-line options; gives back its exit status. Errors are one line on stderr."""
    from lora_adapters.train.generation.options import parse
    from lora_adapters.train.quiet import quiet

    quiet()
    try:
        settings = parse(argv)
        from lora_adapters.train.generation.run import generate

        generate(settings)
    except BrokenPipeError:
        raise
    except OSError as error:
        return _failed(error)
    except ValueError as error:
        from lora_adapters.convert.errors import AdapterError
        from lora_adapters.train.errors import TrainingError

        if not isinstance(error, AdapterError | TrainingError):
            raise
        return _failed(error)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        return _failed("the device has too little memory: try --fp16, --batch_size 1 or smaller pictures")
    except KeyboardInterrupt:
        return _failed("interrupted; the pictures that are written are whole")
    return 0


def _failed(error: BaseException | str) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
