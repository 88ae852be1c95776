"""Options: saving, resuming, sample images, logging."""

from dataclasses import dataclass
from typing import Any, ClassVar

from lora_adapters.train.options.model import ZERO
from lora_adapters.train.options.option import Inert, option
from lora_adapters.train.samplers import SAMPLERS

_LEVELS = ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]


def _modelspec(name: str, help: str, unset: str = "none") -> Any:
    """An option that is stored in the saved file's metadata."""
    return option(None, f"metadata: {help}", unset=unset, metadata=f"modelspec.{name}")


def _every(help: str) -> Any:
    """An interval between saves; 0 is the same as None."""
    return option(None, help, at_least=1, inert=(ZERO,))


def _samples(help: str) -> Any:
    """An interval between sample images."""
    case = Inert(lambda value, _: value <= 0, "{value} draws no sample images")
    return option(None, help, at_least=1, inert=(case,))


@dataclass
class SavingOptions:
    """Saving and resuming."""

    title: ClassVar[str] = "saving and resuming"
    output_dir: str | None = option(None, "folder for everything that is saved")
    output_name: str | None = option(None, "file name without extension", unset="last", metadata=True)
    save_model_as: str | None = option("safetensors", "file format", choices=["ckpt", "pt", "safetensors"])
    save_precision: str | None = option(
        None, "precision of the saved file", unset="fp32", choices=["float", "fp16", "bf16"]
    )
    save_every_n_epochs: int | None = _every("save every n epochs")
    save_every_n_steps: int | None = _every("save every n steps")
    save_n_epoch_ratio: int | None = option(None, "save at least n times in total, at the ends of epochs")
    save_last_n_epochs: int | None = option(
        None, "keep the saves of the last n epochs and delete older ones", unset="keep all"
    )
    save_last_n_epochs_state: int | None = option(None, "the same for training states", unset="--save_last_n_epochs")
    save_last_n_steps: int | None = option(
        None, "keep the saves of the last n steps and delete older ones", unset="keep all"
    )
    save_last_n_steps_state: int | None = option(None, "the same for training states", unset="--save_last_n_steps")
    save_state: bool = option(False, "with each save, also save a training state to resume from")
    save_state_on_train_end: bool = option(False, "save a training state at the end of training")
    resume: str | None = option(None, "folder of a training state to resume from")
    no_metadata: bool = option(False, "save only the metadata that is needed to load the file")
    training_comment: str | None = option(None, "comment to store in the metadata", metadata=True)
    metadata_title: str | None = _modelspec("title", "title of the model", "--output_name")
    metadata_author: str | None = _modelspec("author", "author")
    metadata_description: str | None = _modelspec("description", "description")
    metadata_license: str | None = _modelspec("license", "licence")
    metadata_tags: str | None = _modelspec("tags", "tags, separated by commas")
    metadata_usage_hint: str | None = _modelspec("usage_hint", "usage hint")
    metadata_thumbnail: str | None = _modelspec("thumbnail", "thumbnail image, as a data URL")
    metadata_merged_from: str | None = _modelspec("merged_from", "models it was merged from")
    metadata_trigger_phrase: str | None = _modelspec("trigger_phrase", "trigger words")
    metadata_preprocessor: str | None = _modelspec("preprocessor", "preprocessor of the input")
    metadata_is_negative_embedding: str | None = _modelspec(
        "is_negative_embedding", "whether it is a negative embedding"
    )
    huggingface_repo_id: str | None = option(None, "upload each save to this Hub repository, in the background")
    huggingface_repo_type: str | None = option(None, "repository type: model, dataset or space", unset="model")
    huggingface_path_in_repo: str | None = option(None, "folder in the repository", unset="its root")
    huggingface_token: str | None = option(None, "Hub access token", unset="that of `hf auth login`", secret=True)
    huggingface_repo_visibility: str | None = option(
        None, "visibility of a newly created repository: public or private", unset="private"
    )
    save_state_to_huggingface: bool = option(False, "also upload training states")
    resume_from_huggingface: bool = option(False, "--resume names a training state in a Hub repository")
    async_upload: bool = option(False, "accepted; uploads always run in the background")


@dataclass
class SampleOptions:
    """Sample images."""

    title: ClassVar[str] = "sample images"
    sample_every_n_steps: int | None = _samples("generate sample images every n steps; 0 disables this")
    sample_every_n_epochs: int | None = _samples(
        "generate sample images every n epochs; overrides steps; 0 disables this"
    )
    sample_at_first: bool = option(False, "also generate sample images before training")
    sample_prompts: str | None = option(None, "file of prompts for sample images: .txt, .toml or .json")
    sample_sampler: str = option(
        "ddim", "sampler for sample images", choices=list(SAMPLERS), unread=lambda settings: not settings.sample_prompts
    )


@dataclass
class LoggingOptions:
    """Logging and configuration files."""

    title: ClassVar[str] = "logging and configuration"
    logging_dir: str | None = option(None, "folder for logs")
    log_with: str | None = option(
        None,
        "tracker to log to",
        unset="tensorboard",
        choices=["tensorboard", "wandb", "all"],
        unread=lambda settings: not settings.logging_dir,
    )
    log_prefix: str | None = option(None, "prefix of the log folder's name, before the time")
    log_tracker_name: str | None = option(None, "project name for the tracker", unset="network_train")
    log_tracker_config: str | None = option(None, "TOML file with tracker arguments, one section per tracker")
    wandb_run_name: str | None = option(None, "run name in Weights & Biases", unset="chosen by W&B")
    wandb_api_key: str | None = option(None, "API key for Weights & Biases", unset="that of `wandb login`", secret=True)
    no_report: bool = option(
        False, "do not write OUTPUT_NAME-report.html, a report next to the adapter that is updated at each save"
    )
    log_config: bool = option(False, "log all options")
    console_log_level: str | None = option(None, "log level of the console", unset="INFO", choices=_LEVELS)
    console_log_file: str | None = option(None, "write console messages to this file instead")
    console_log_simple: bool = option(False, "print messages without time, level and source")
    config_file: str | None = option(None, "TOML file of options; the command line takes precedence")
    output_config: bool = option(False, "write the given options to --config_file and exit")


@dataclass
class OutputOptions(SavingOptions, SampleOptions, LoggingOptions):
    """All options for output."""
