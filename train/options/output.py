"""Options: saving, resuming, sample images, logging."""

from dataclasses import dataclass
from typing import Any, ClassVar

from lora_adapters.train.options.model import ZERO
from lora_adapters.train.options.option import Inert, option
from lora_adapters.train.samplers import SAMPLERS

_LEVELS = ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]


def _modelspec(name: str, help: str, unset: str = "none") -> Any:
    """An option that is an entry of the saved file's metadata."""
    return option(None, f"metadata: {help}", unset=unset, metadata=f"modelspec.{name}")


def _every(help: str) -> Any:
    """An interval of saves: 0 is as good as none."""
    return option(None, help, at_least=1, inert=(ZERO,))


def _samples(help: str) -> Any:
    """An interval of sample images."""
    case = Inert(lambda value, _: value <= 0, "{value} draws no sample images")
    return option(None, help, at_least=1, inert=(case,))


@dataclass
class SavingOptions:
    """Saving and resuming."""

    title: ClassVar[str] = "saving and resuming"
    output_dir: str | None = option(None, "folder of all that is saved")
    output_name: str | None = option(None, "name of the files, without ending", unset="last", metadata=True)
    save_model_as: str | None = option("safetensors", "file format", choices=["ckpt", "pt", "safetensors"])
    save_precision: str | None = option(None, "precision of the file", unset="fp32", choices=["float", "fp16", "bf16"])
    save_every_n_epochs: int | None = _every("save every n epochs")
    save_every_n_steps: int | None = _every("save every n steps")
    save_n_epoch_ratio: int | None = option(None, "save at least n times, at the ends of epochs")
    save_last_n_epochs: int | None = option(None, "delete epoch saves older than n epochs", unset="keep all")
    save_last_n_epochs_state: int | None = option(None, "the same for states", unset="as for the saves")
    save_last_n_steps: int | None = option(None, "delete step saves older than n steps", unset="keep all")
    save_last_n_steps_state: int | None = option(None, "the same for states", unset="as for the saves")
    save_state: bool = option(False, "with each save, save all that is needed to resume")
    save_state_on_train_end: bool = option(False, "save such a state at the end")
    resume: str | None = option(None, "folder of a saved state to resume from")
    no_metadata: bool = option(False, "leave out all metadata but what readers need")
    training_comment: str | None = option(None, "any text, kept in the metadata", metadata=True)
    metadata_title: str | None = _modelspec("title", "title of the model", "--output_name")
    metadata_author: str | None = _modelspec("author", "author")
    metadata_description: str | None = _modelspec("description", "description")
    metadata_license: str | None = _modelspec("license", "licence")
    metadata_tags: str | None = _modelspec("tags", "tags, separated by commas")
    metadata_usage_hint: str | None = _modelspec("usage_hint", "how to use it")
    metadata_thumbnail: str | None = _modelspec("thumbnail", "an image, as a data URL")
    metadata_merged_from: str | None = _modelspec("merged_from", "models that it was merged from")
    metadata_trigger_phrase: str | None = _modelspec("trigger_phrase", "trigger words")
    metadata_preprocessor: str | None = _modelspec("preprocessor", "preprocessor of its input")
    metadata_is_negative_embedding: str | None = _modelspec(
        "is_negative_embedding", "whether it is a negative embedding"
    )
    huggingface_repo_id: str | None = option(None, "push each save to this repository, beside training")
    huggingface_repo_type: str | None = option(None, "model, dataset or space", unset="model")
    huggingface_path_in_repo: str | None = option(None, "folder in the repository", unset="its top")
    huggingface_token: str | None = option(None, "access token", unset="that of `hf auth login`", secret=True)
    huggingface_repo_visibility: str | None = option(
        None, "public or private, if the repository is created", unset="private"
    )
    save_state_to_huggingface: bool = option(False, "also upload states")
    resume_from_huggingface: bool = option(False, "--resume names a state in a repository")
    async_upload: bool = option(False, "push beside training, as is always done here")


@dataclass
class SampleOptions:
    """Sample images."""

    title: ClassVar[str] = "sample images"
    sample_every_n_steps: int | None = _samples("make sample images every n steps; 0: none")
    sample_every_n_epochs: int | None = _samples("make sample images every n epochs; wins over steps; 0: none")
    sample_at_first: bool = option(False, "also make sample images before training")
    sample_prompts: str | None = option(None, "file of prompts: txt, toml or json")
    sample_sampler: str = option(
        "ddim", "sampler", choices=list(SAMPLERS), unread=lambda settings: not settings.sample_prompts
    )


@dataclass
class LoggingOptions:
    """Logging and configuration files."""

    title: ClassVar[str] = "logging and configuration"
    logging_dir: str | None = option(None, "folder of the logs")
    log_with: str | None = option(
        None,
        "where losses go",
        unset="tensorboard",
        choices=["tensorboard", "wandb", "all"],
        unread=lambda settings: not settings.logging_dir,
    )
    log_prefix: str | None = option(None, "the log's folder is this and the time")
    log_tracker_name: str | None = option(None, "name of the run's project", unset="network_train")
    log_tracker_config: str | None = option(None, "toml file with arguments of the trackers, a section each")
    wandb_run_name: str | None = option(None, "name of the run in Weights & Biases", unset="W&B's choice")
    wandb_api_key: str | None = option(None, "key for Weights & Biases", unset="that of `wandb login`", secret=True)
    no_report: bool = option(
        False, "write no report (the page OUTPUT_NAME-report.html beside the adapter, new at each save)"
    )
    log_config: bool = option(False, "put all options into the log")
    console_log_level: str | None = option(None, "what is printed", unset="INFO", choices=_LEVELS)
    console_log_file: str | None = option(None, "print to this file instead")
    console_log_simple: bool = option(False, "print bare messages")
    config_file: str | None = option(None, "toml file of options; the command line wins")
    output_config: bool = option(False, "write all given options to --config_file and stop")


@dataclass
class OutputOptions(SavingOptions, SampleOptions, LoggingOptions):
    """What is written, and where."""
