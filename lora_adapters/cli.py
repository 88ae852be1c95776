"""The console program `lora-adapters`: runs the command named by the first argument with the other arguments."""

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from lora_adapters import __version__

PROGRAMS = {
    "merge": ("lora_adapters.convert.merge_lora", "merge LoRAs into a model, or several LoRAs into one"),
    "svd-merge": ("lora_adapters.convert.svd_merge_lora", "merge several LoRAs into one of a given rank"),
    "extract": (
        "lora_adapters.convert.extract_lora_from_models",
        "extract a LoRA from the difference between two models",
    ),
    "average": ("lora_adapters.convert.average_lora", "average LoRAs, such as the saves of one training"),
    "split": ("lora_adapters.convert.extract_lora_from_dylora", "split a DyLoRA into several LoRAs, one for each rank"),
    "resize": ("lora_adapters.convert.resize_lora", "reduce the rank of a LoRA"),
    "convert": ("lora_adapters.convert.convert_format", "convert a LoRA to another format"),
    "info": ("lora_adapters.convert.info", "show the type, base model, ranks and metadata of a LoRA"),
    "init": ("lora_adapters.train.preparing.program", "inspect a folder of images and write training settings"),
    "train": ("lora_adapters.train.train_network", "train an adapter, with the options of kohya's train_network.py"),
    "generate": (
        "lora_adapters.train.gen_img_diffusers",
        "generate images with adapters, with the options of kohya's gen_img",
    ),
    "studio": ("lora_adapters.train.studio.program", "compare, inspect, train and convert in the browser"),
    "completion": ("lora_adapters.completion", "print a shell completion script"),
    "resize-images": ("lora_adapters.train.resize_images_to_resolution", "make smaller copies of training images"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `lora-adapters <command> ...`.

    Args:
        argv: The arguments after the program's name; None for those of this process.

    Returns:
        The exit status: 0, 1 for a failure, 2 for wrong usage, 128 + the signal number if a signal stopped a training.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return 0
    if words[0] == "--version":
        print(f"lora-adapters {__version__}")
        return 0
    from lora_adapters.convert.tools import command_line  # imports torch

    if words[0] not in PROGRAMS:
        return command_line.run(_unknown, words)
    with command_line.called_as(f"lora-adapters {words[0]}"):
        return import_module(PROGRAMS[words[0]][0]).main(words[1:])


def _help() -> str:
    """The help text: the commands and what they do."""
    commands = [f"  {name:<15}{purpose}" for name, (_, purpose) in PROGRAMS.items()]
    return "\n".join(
        [
            "usage: lora-adapters COMMAND ...",
            "\nexample:\n  lora-adapters info model.safetensors",
            "\ncommands (COMMAND --help shows the options; with --quiet, only warnings and errors are printed):",
            *commands,
            "\n  --version      print the version",
        ]
    )


def _unknown(words: Sequence[str] | None) -> NoReturn:
    """The program for an unknown command: raises an error that suggests the nearest one."""
    from lora_adapters.convert.errors import UsageError
    from lora_adapters.convert.suggestions import closest

    command = words[0] if words else ""
    near = closest(command, PROGRAMS, cutoff=0.6)
    hint = f"did you mean {near!r}?" if near else f"the commands are {', '.join(PROGRAMS)}"
    raise UsageError(f"unknown command {command!r}: {hint}")


if __name__ == "__main__":
    sys.exit(main())
