"""The options of `lora-adapters init`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lora_adapters.train.options.option import option
from lora_adapters.train.options.parser import Parser
from lora_adapters.train.options.settings import Given, check_ranges, made


@dataclass
class InitSettings(Given):
    """The program's options: an attribute each."""

    title: ClassVar[str] = "what is trained, and on what"
    pretrained_model_name_or_path: str | None = option(
        None, "base model: checkpoint file, Diffusers folder or hub id", flag="--model"
    )
    family: str | None = option(
        None, "sd, sdxl, flux or sd3", unset="what the model's files or name say", choices=["sd", "sdxl", "flux", "sd3"]
    )
    card: float | None = option(
        None, "memory of the graphics card in GB; 0: none", unset="what this machine has", at_least=0
    )
    purpose: str = option("subject", "what is to be learned", choices=["subject", "style"])
    class_tokens: str | None = option(
        None,
        "caption of images that have none, such as: sks dog",
        unset="what a name such as 10_sks dog says",
    )
    preset: list[str] | None = option(
        None, "presets to take, the later ones win", unset="one for the machine, one for the purpose", at_least_one=True
    )
    out: str = option(".", "folder for dataset.toml, config.toml and prompts.txt")
    output_dir: str = option("trained", "folder that the training will write to")
    output_name: str | None = option(None, "name of the adapter's file", unset="that of the folder")
    overwrite: bool = option(False, "replace these files if they are there")


def parser(defaults: bool = True) -> Parser:
    """A parser of all options; without `defaults` its result has only what is on the command line."""
    new = Parser(
        prog="init",
        description="Look at a folder of images, choose settings for a base model and a card, and write them with "
        "their reasons: dataset.toml, config.toml and prompts.txt for `lora-adapters train --config_file config.toml`.",
        examples=['my_photos --model stable-diffusion-v1-5/stable-diffusion-v1-5 --card 8 --class_tokens "sks dog"'],
    )
    new.add_argument("folder", help="folder of images, or of folders of images")
    new.add_options(InitSettings, defaults)
    return new


def parse(argv: Sequence[str] | None = None) -> tuple[str, InitSettings]:
    """(folder, options) from `argv`. OptionError for what cannot be right."""
    line = vars(parser(defaults=False).parse_args(argv))
    folder = line.pop("folder")
    settings = made(InitSettings, line)
    check_ranges(settings)
    return folder, settings
