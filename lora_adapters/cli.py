"""The console program `lora-adapters`: its first word names a program of this package, the rest goes to that."""

import sys
from collections.abc import Sequence
from importlib import import_module

PROGRAMS = {
    "merge": ("lora_adapters.convert.merge_lora", "merge LoRAs into a model, or several LoRAs into one"),
    "svd-merge": ("lora_adapters.convert.svd_merge_lora", "merge LoRAs into one of a given rank"),
    "extract": ("lora_adapters.convert.extract_lora_from_models", "extract the LoRA between two models"),
    "split": ("lora_adapters.convert.extract_lora_from_dylora", "split a DyLoRA into one LoRA for each rank"),
    "resize": ("lora_adapters.convert.resize_lora", "give a LoRA a smaller rank"),
    "convert": ("lora_adapters.convert.convert_format", "write a LoRA in another format"),
    "info": ("lora_adapters.convert.info", "show what a LoRA file is"),
    "train": ("lora_adapters.train.train_network", "train an adapter, with kohya's train_network.py options"),
    "generate": ("lora_adapters.train.gen_img_diffusers", "draw pictures with adapters, with kohya's gen_img options"),
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
