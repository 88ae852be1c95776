"""Command-line options: saving, resuming, sample pictures, logging."""

import argparse

from lora_adapters.train.options.parser import adders
from lora_adapters.train.samplers import SAMPLERS

METADATA = {
    "title": "title of the model (default: --output_name)",
    "author": "author",
    "description": "description",
    "license": "licence",
    "tags": "tags, separated by commas",
    "usage_hint": "how to use it",
    "thumbnail": "a picture, as a data URL",
    "merged_from": "models that it was merged from",
    "trigger_phrase": "words that call it up",
    "preprocessor": "preprocessor of its input",
    "is_negative_embedding": "whether it is a negative embedding",
}


def add_saving(group: argparse._ArgumentGroup) -> None:
    flag, option = adders(group)
    option("--output_dir", help="folder of all that is saved")
    option("--output_name", help="name of the files, without ending")
    option("--save_model_as", default="safetensors", choices=[None, "ckpt", "pt", "safetensors"], help="file format")
    option("--save_precision", choices=[None, "float", "fp16", "bf16"], help="precision of the file (default fp32)")
    option("--save_every_n_epochs", type=int, help="save every n epochs")
    option("--save_every_n_steps", type=int, help="save every n steps")
    option("--save_n_epoch_ratio", type=int, help="save at least n times, at the ends of epochs")
    option("--save_last_n_epochs", type=int, help="delete epoch saves older than n epochs")
    option("--save_last_n_epochs_state", type=int, help="the same for states (default: as for the saves)")
    option("--save_last_n_steps", type=int, help="delete step saves older than n steps")
    option("--save_last_n_steps_state", type=int, help="the same for states (default: as for the saves)")
    flag("--save_state", help="with each save, save all that is needed to resume")
    flag("--save_state_on_train_end", help="save such a state at the end")
    option("--resume", help="folder of a saved state to go on from")
    flag("--no_metadata", help="leave out all metadata but what readers need")
    option("--training_comment", help="any text, kept in the metadata")
    for name, text in METADATA.items():
        option(f"--metadata_{name}", help=f"metadata: {text}")
    option("--huggingface_repo_id", help="push each save to this repository, beside training")
    option("--huggingface_repo_type", help="model, dataset or space")
    option("--huggingface_path_in_repo", help="folder in the repository (default: its top)")
    option("--huggingface_token", help="access token (default: that of `hf auth login`)")
    option("--huggingface_repo_visibility", help="public or private, where it is made (default private)")
    flag("--save_state_to_huggingface", help="upload states, too")
    flag("--resume_from_huggingface", help="--resume names a state in a repository")
    flag("--async_upload", help="push beside training, as is always done here")


def add_samples(group: argparse._ArgumentGroup) -> None:
    flag, option = adders(group)
    option("--sample_every_n_steps", type=int, help="make sample pictures every n steps; 0: none")
    option("--sample_every_n_epochs", type=int, help="make sample pictures every n epochs; wins over steps; 0: none")
    flag("--sample_at_first", help="make sample pictures before training, too")
    option("--sample_prompts", help="file of prompts: txt, toml or json")
    option("--sample_sampler", default="ddim", choices=list(SAMPLERS), help="sampler")


def add_logging(group: argparse._ArgumentGroup) -> None:
    flag, option = adders(group)
    option("--logging_dir", help="folder of the logs")
    option("--log_with", choices=["tensorboard", "wandb", "all"], help="where losses go (default tensorboard)")
    option("--log_prefix", help="the log's folder is this and the time")
    option("--log_tracker_name", help="name of the run's project")
    option("--log_tracker_config", help="toml file with arguments of the trackers, a section each")
    option("--wandb_run_name", help="name of the run in Weights & Biases")
    option("--wandb_api_key", help="key for Weights & Biases")
    flag("--log_config", help="put all options into the log")
    levels = ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
    option("--console_log_level", choices=levels, help="what is printed (default INFO)")
    option("--console_log_file", help="print to this file instead")
    flag("--console_log_simple", help="print bare messages")
    option("--config_file", help="toml file of options; the command line wins")
    flag("--output_config", help="write all options to --config_file and stop")
