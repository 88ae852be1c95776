"""The console program `lora-adapters`: its first word names a program of this package, the rest goes to that."""

import sys
from collections.abc import Sequence
from importlib import import_module

PROGRAMS = {
    "train": ("lora_adapters.train.train_network", "train an adapter, with kohya's train_network.py options"),
    "resize-images": ("lora_adapters.train.resize_images_to_resolution", "resize a folder of training pictures"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `lora-adapters <program> ...`; gives back the program's exit status, 1 for an unknown one."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print("usage: lora-adapters PROGRAM ...   (PROGRAM --help shows its options)\n")
        for name, (_, purpose) in PROGRAMS.items():
            print(f"  {name:<15}{purpose}")
        return 0
    if words[0] not in PROGRAMS:
        print(f"error: there is no program {words[0]}: {', '.join(PROGRAMS)} are known", file=sys.stderr)
        return 1
    return import_module(PROGRAMS[words[0]][0]).main(words[1:])


if __name__ == "__main__":
    sys.exit(main())
