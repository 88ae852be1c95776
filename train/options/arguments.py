"""The training program's options: from the command line, a toml file, or Python."""

import argparse
from collections.abc import Sequence
from typing import Any

from lora_adapters.train.errors import OptionError
from lora_adapters.train.options import data, model, output, training
from lora_adapters.train.options.config_file import file_options, write_config
from lora_adapters.train.options.parser import Parser
from lora_adapters.train.options.values import checked, did_you_mean

GROUPS = {
    "base model": model.add_model,
    "machine": model.add_machine,
    "network": model.add_network,
    "steps": training.add_steps,
    "optimizer and schedule": training.add_optimizer,
    "loss and noise": training.add_loss,
    "data": data.add_dataset,
    "captions": data.add_captions,
    "pictures and caches": data.add_pictures,
    "saving and resuming": output.add_saving,
    "sample pictures": output.add_samples,
    "logging and configuration": output.add_logging,
}


def parser() -> argparse.ArgumentParser:
    """All options with their defaults."""
    made = Parser(prog="train_network.py", description="Train a LoRA or DyLoRA adapter.")
    for title, add in GROUPS.items():
        add(made.add_argument_group(title))
    return made


def settings(**options: Any) -> argparse.Namespace:
    """The defaults with `options` put in: what `train` takes when it is called from Python.

    Names and meanings are those of the command line, values are Python's (`network_args` may be a dict). Raises
    TrainingError for a name that is not an option, or a value that is not among its choices.
    """
    made = parser()
    chosen = made.parse_args([])
    known = {action.dest: action for action in made._actions if action.dest != "help"}
    for name, value in options.items():
        if name not in known:
            raise OptionError(f"settings: there is no option {name!r}{did_you_mean(name, known)}")
        setattr(chosen, name, checked(known[name], value, "settings"))
    return chosen


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Options from `argv`, then from its --config_file, then the defaults.

    With --output_config the options are written to --config_file and the program ends. An empty text is as good as an
    option that is not given, where that is the default.
    """
    made = parser()
    chosen = made.parse_args(argv)
    if chosen.output_config:
        write_config(chosen, made)
        raise SystemExit(0)
    if chosen.config_file:
        made.set_defaults(**file_options(made, chosen))
        chosen = made.parse_args(argv)
    for action in made._actions:
        if action.default is None and getattr(chosen, action.dest, None) == "":
            setattr(chosen, action.dest, None)
    return chosen
