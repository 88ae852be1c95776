"""Reads the training program's options from the command line, a toml file, or Python."""

from collections.abc import Sequence
from typing import Any

from lora_adapters.train.errors import OptionError
from lora_adapters.train.options.config_file import file_options, write_config
from lora_adapters.train.options.option import options_of
from lora_adapters.train.options.parser import Parser
from lora_adapters.train.options.settings import Settings, made
from lora_adapters.train.options.values import checked, did_you_mean


def parser(defaults: bool = True) -> Parser:
    """Create the parser. Without `defaults`, parsed arguments contain only the options on the command line."""
    new = Parser(
        prog="train_network.py",
        description="Train a LoRA-LierLa, LoRA-C3Lier or DyLoRA adapter, with the options of kohya's train_network.py.",
        examples=[
            "--pretrained_model_name_or_path=MODEL --dataset_config=dataset.toml --output_dir=trained "
            "--network_module=networks.lora --network_dim=16 --network_alpha=16 --learning_rate=1e-4",
            "--config_file=config.toml --dry_run",
        ],
    )
    new.add_options(Settings, defaults)
    return new


def settings(**options: Any) -> Settings:
    """Create the settings for calling `train` from Python: the defaults, updated with `options`.

    Args:
        **options: Named as on the command line, with Python values (`network_args` may be a dictionary).

    Returns:
        The settings.

    Raises:
        OptionError: A name is not an option, or a value is invalid.
    """
    known = options_of(Settings)
    for name in options:
        if name not in known:
            raise OptionError(f"settings: there is no option {name!r}{did_you_mean(name, known)}")
    return made(Settings, {name: checked(known[name], value, "settings") for name, value in options.items()})


def parse(argv: Sequence[str] | None = None) -> Settings:
    """Read the options of the command line. Options that are not given come from --config_file or the defaults.

    With --output_config the options are written to --config_file and the program ends. An empty value means "not given"
    for options whose default is empty.

    Args:
        argv: The command-line arguments; None uses those of this process.

    Returns:
        The settings.

    Raises:
        OptionError: An option or the configuration file is invalid.
        SystemExit: --help was printed, or --output_config was written.
    """
    line = vars(parser(defaults=False).parse_args(argv))
    chosen = made(Settings, line)
    if chosen.output_config:
        write_config(chosen)
        raise SystemExit(0)
    if chosen.config_file:
        return made(Settings, file_options(chosen.config_file, line) | line)
    return chosen
