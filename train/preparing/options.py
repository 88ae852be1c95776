"""The options of `lora-adapters init`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lora_adapters.train.options.option import option
from lora_adapters.train.options.parser import Parser
from lora_adapters.train.options.settings import Given, check_ranges, made


@dataclass
class InitSettings(Given):
    """The options of the program, one attribute each."""

    title: ClassVar[str] = "settings"
    pretrained_model_name_or_path: str | None = option(
        None, "base model: checkpoint file, Diffusers folder or Hub id", flag="--model"
    )
    family: str | None = option(
        None,
        "family of the base model",
        unset="detected from the model's files or name",
        choices=["sd", "sdxl", "flux", "sd3"],
    )
    card: float | None = option(None, "GPU memory in GB; 0: no GPU", unset="detected on this machine", at_least=0)
    purpose: str = option("subject", "what the adapter should learn", choices=["subject", "style"])
    class_tokens: str | None = option(
        None,
        "caption of images without a caption, such as: sks dog",
        unset="taken from a folder name such as 10_sks dog",
    )
    preset: list[str] | None = option(
        None,
        "presets to use; later ones override earlier ones",
        unset="one for the GPU, one for the purpose",
        at_least_one=True,
    )
    out: str = option(".", "folder to write dataset.toml, config.toml and prompts.txt to")
    output_dir: str = option("trained", "output folder of the training")
    output_name: str | None = option(None, "file name of the adapter", unset="the name of the image folder")
    overwrite: bool = option(False, "overwrite existing files")


def parser(defaults: bool = True) -> Parser:
    """Create the parser. Without `defaults`, parsed arguments contain only the options on the command line."""
    new = Parser(
        prog="init",
        description="Inspect a folder of images, choose training settings for a base model and a GPU, and write them "
        "with the reason for each to dataset.toml, config.toml and prompts.txt. Train with `lora-adapters train "
        "--config_file config.toml`.",
        examples=['my_photos --model stable-diffusion-v1-5/stable-diffusion-v1-5 --card 8 --class_tokens "sks dog"'],
    )
    new.add_argument("folder", help="folder with images, or with subfolders of images")
    new.add_options(InitSettings, defaults)
    return new


def parse(argv: Sequence[str] | None = None) -> tuple[str, InitSettings]:
    """Parse `argv` into (folder, options). OptionError for invalid options."""
    line = vars(parser(defaults=False).parse_args(argv))
    folder = line.pop("folder")
    settings = made(InitSettings, line)
    check_ranges(settings)
    return folder, settings
