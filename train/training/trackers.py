"""Logs losses, learning rates and images to TensorBoard and Weights & Biases, through accelerate."""

import contextlib
import importlib.util
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from lora_adapters.convert.errors import first_line
from lora_adapters.convert.parsing import read_text, toml_table
from lora_adapters.convert.terminal import is_quiet, styled
from lora_adapters.train.errors import OptionError, TrainingError
from lora_adapters.train.options.option import options_of
from lora_adapters.train.options.settings import Settings

log = logging.getLogger(__name__)

# Messages of these libraries below the level of warnings are not shown: requests, files, cache sizes.
_LIBRARIES = (
    "accelerate",
    "datasets",
    "diffusers",
    "filelock",
    "httpx",
    "httpx2",
    "matplotlib",
    "PIL",
    "transformers",
    "urllib3",
)
_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}


def tracker_names(settings: Settings) -> list[str]:
    """The trackers to use: those of --log_with, or TensorBoard if only --logging_dir is given."""
    if settings.log_with == "all":
        return ["tensorboard", "wandb"]
    if settings.log_with:
        return [settings.log_with]
    return ["tensorboard"] if settings.logging_dir else []


def check_trackers(settings: Settings) -> None:
    """Raise TrainingError for a tracker that is not installed or has no folder to write to."""
    for name in tracker_names(settings):
        if importlib.util.find_spec(_PACKAGES[name]) is None:
            raise TrainingError(f"--log_with {name} needs the package {name}: pip install {name}")
        if name == "tensorboard" and not settings.logging_dir:
            raise OptionError("--log_with tensorboard needs --logging_dir")
    names = tracker_names(settings)
    for name in ("log_prefix", "log_tracker_name", "log_tracker_config", "log_config"):
        if getattr(settings, name) and not names:
            log.warning("--%s has no effect without --logging_dir or --log_with", name)
    for name in ("wandb_run_name", "wandb_api_key"):  # kohya's GUI always names the run
        if getattr(settings, name) and "wandb" not in names:
            log.warning("--%s has no effect without --log_with wandb", name)
    if settings.log_tracker_config:
        read_sections(Path(settings.log_tracker_config))


def start_trackers(settings: Settings, accelerator: Accelerator) -> None:
    """Open the logs. Each run gets its own folder, named by --log_prefix and the time."""
    names = tracker_names(settings)
    if not names:
        return
    if settings.wandb_api_key:
        os.environ["WANDB_API_KEY"] = settings.wandb_api_key
    if settings.logging_dir:
        folder = Path(settings.logging_dir) / f"{settings.log_prefix or ''}{time.strftime('%Y%m%d%H%M%S')}"
        accelerator.project_configuration.logging_dir = str(folder)
    arguments: dict[str, Any] = {name: {} for name in names}
    if settings.log_tracker_config:
        arguments |= read_sections(Path(settings.log_tracker_config))
    if settings.wandb_run_name:
        arguments.setdefault("wandb", {})["name"] = settings.wandb_run_name
    config = None
    if settings.log_config:
        known = options_of(Settings)
        config = {name: _plain(value) for name, value in vars(settings).items() if not known[name].secret}
    try:
        accelerator.init_trackers(settings.log_tracker_name or "network_train", config=config, init_kwargs=arguments)
    except Exception as error:  # W&B has its own error classes: no connection, a wrong key, a missing login
        raise TrainingError(f"--log_with {settings.log_with or names[0]} cannot start ({first_line(error)})") from error


# References to ended process groups. Without them, the last reference to a group is DDP's gradient reducer: it calls
# the group's destructor with the GIL held, and the destructor waits for a thread that may itself wait for the GIL.
# This deadlock was seen with gloo in torch 2.13. If Python frees the group, the GIL is released first.
_ended_groups: list[Any] = []


def end_trackers(accelerator: Accelerator) -> None:
    """Close the logs. A failure is only a warning, since the adapter has been saved already."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        _ended_groups.append(torch.distributed.group.WORLD)
    try:
        accelerator.end_training()
    except Exception as error:
        log.warning("the logs were not closed (%s)", first_line(error))


def log_image(accelerator: Accelerator, name: str, image: Image.Image, step: int) -> None:
    """Add an image to every log."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_image(name, np.asarray(image), step, dataformats="HWC")
        elif tracker.name == "wandb":
            tracker.log_images({name: [image]}, step=step)


def read_sections(file: Path) -> dict[str, Any]:
    """Read a toml file that has a section of arguments for each tracker."""
    if not file.exists():
        raise TrainingError(f"--log_tracker_config {file} does not exist")
    try:
        return toml_table(read_text(file))
    except OSError as error:
        raise TrainingError(f"--log_tracker_config {file} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise TrainingError(f"--log_tracker_config {file} is not toml: {error}") from None


@contextlib.contextmanager
def console(settings: Settings) -> Iterator[None]:
    """A context in which log messages go to the console or to --console_log_file. Afterwards logging is restored.

    A handler that is not removed might write to a closed console in a later training of the same process.

    Args:
        settings: The settings of the run.

    Yields:
        None.
    """
    form = "%(message)s" if settings.console_log_simple else "%(asctime)s %(levelname)s %(name)s: %(message)s"
    root, libraries = logging.getLogger(), [logging.getLogger(name) for name in _LIBRARIES]
    handlers, levels = root.handlers[:], [source.level for source in (root, *libraries)]
    own: logging.Handler = logging.StreamHandler()
    own.setFormatter(_Coloured(form))
    if settings.console_log_file:
        own = logging.FileHandler(settings.console_log_file, encoding="utf-8")
        own.setFormatter(logging.Formatter(form))
    try:
        root.handlers[:] = [own]
        root.setLevel(settings.console_log_level or ("WARNING" if is_quiet() else "INFO"))
        for library in libraries:
            library.setLevel(logging.WARNING)
        yield
    finally:
        root.handlers[:] = handlers
        for logger, level in zip((root, *libraries), levels, strict=True):
            logger.setLevel(level)
        own.close()


class _Coloured(logging.Formatter):
    """Warnings are yellow and errors red on a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno < logging.WARNING:
            return text
        return styled(text, "red" if record.levelno >= logging.ERROR else "yellow", sys.stderr)


def _plain(value: Any) -> Any:
    """Convert a value to a type that every tracker accepts."""
    return value if isinstance(value, int | float | str | bool) else str(value)
