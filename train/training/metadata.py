"""The metadata of a saved adapter: how it was trained, under the keys that other programs read."""

import hashlib
import json
import os
import time
import uuid
from pathlib import Path
from typing import Any

import lora_adapters
from lora_adapters.train.models.base import BaseModels
from lora_adapters.train.options.data import read_size
from lora_adapters.train.options.flow import FlowOptions
from lora_adapters.train.options.option import options_of
from lora_adapters.train.options.settings import Settings
from lora_adapters.train.options.values import key_values
from lora_adapters.train.training import adapters
from lora_adapters.train.training.optimizers import literals, optimizer_class, optimizer_name

_ALWAYS = (
    "ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args",
)  # fmt: skip


_OF_FLOW = frozenset(option.metadata for option in options_of(FlowOptions).values())


def base_version(models: BaseModels) -> str:
    """kohya's name of the base model's kind."""
    return base_metadata(models)["ss_base_model_version"]


def base_metadata(models: BaseModels) -> dict[str, Any]:
    """kohya's metadata entries that identify the base model of an adapter."""
    return models.family.metadata(models.kind, models.v_prediction)


def run_metadata(
    settings: Settings, models: BaseModels, data: Any, world_size: int, steps: int, epochs: int
) -> dict[str, str]:
    """The metadata that is known when training starts.

    Args:
        settings: The settings of the run.
        models: The base model.
        data: The images (TrainingData).
        world_size: The number of processes.
        steps: The number of steps of the whole training.
        epochs: The number of epochs.

    Returns:
        Key -> value; all values are strings, as safetensors requires.
    """
    entries: dict[str, Any] = option_entries(settings, "ss_")
    if not models.family.has_flow:
        entries = {key: value for key, value in entries.items() if key not in _OF_FLOW}
    entries |= {
        "ss_max_train_steps": steps,
        "ss_cache_latents": settings.cache_latents or settings.cache_latents_to_disk,
        "ss_session_id": uuid.uuid4().int & (2**32 - 1),
        "ss_training_started_at": time.time(),
        "ss_num_epochs": epochs,
        "ss_num_train_images": data.num_images,
        "ss_num_reg_images": data.num_regularisation,
        "ss_num_validation_images": data.validation.num_images if data.validation else 0,
        "ss_num_batches_per_epoch": data.batches_per_epoch(world_size),
        "ss_optimizer": described_optimizer(settings),
        **network_entries(settings, models),
        **model_entries(settings),
    }
    entries["ss_zero_terminal_snr"] = settings.zero_terminal_snr or models.zero_terminal_snr
    entries["ss_lora_adapters_version"] = lora_adapters.__version__
    text = {key: str(value) for key, value in entries.items()}
    return {**text, **data.metadata(world_size), **modelspec(settings, models)}


def option_entries(settings: Settings, start: str) -> dict[str, Any]:
    """Key -> value for the options that declare a metadata key that begins with `start`."""
    declared = {option.metadata: getattr(settings, name) for name, option in options_of(Settings).items()}
    return {key: value for key, value in declared.items() if key is not None and key.startswith(start)}


def network_entries(settings: Settings, models: BaseModels) -> dict[str, Any]:
    """The entries that most programs read: base model, network module, rank and alpha."""
    args = key_values(settings.network_args, "network_args")
    if settings.network_dropout is not None:
        args["dropout"] = str(settings.network_dropout)
    entries = {
        **base_metadata(models),
        "ss_network_module": settings.network_module,
        "ss_network_args": json.dumps(args),
    }
    if not settings.dim_from_weights:  # else Adapter.save writes the most frequent rank and alpha
        config = adapters.options(settings, models.family).config
        entries |= {"ss_network_dim": config.r, "ss_network_alpha": config.lora_alpha}
    return entries


def described_optimizer(settings: Settings) -> str:
    """The optimizer and its arguments as `module.Class(key=value,...)`."""
    kind, defaults = optimizer_class(optimizer_name(settings))
    arguments = {**defaults, **literals(settings.optimizer_args, "optimizer_args")}
    shown = ",".join(f"{key}={value}" for key, value in arguments.items())
    return f"{kind.__module__}.{kind.__name__}" + (f"({shown})" if shown else "")


def model_entries(settings: Settings) -> dict[str, str]:
    """Names of the base model and the VAE, and their hashes if they are files."""
    entries: dict[str, str] = {}
    for key, name in (("sd_model", settings.pretrained_model_name_or_path), ("vae", settings.ae or settings.vae)):
        if not name:
            continue
        entries[f"ss_{key}_name"] = os.path.basename(name) or name
        if Path(name).is_file():
            old, new = file_hashes(Path(name))
            entries |= {f"ss_{key}_hash": old, f"ss_new_{key}_hash": new}
    return entries


def file_hashes(file: Path) -> tuple[str, str]:
    """The short hash of older web UIs (8 hex digits, of the 64 KiB at offset 1 MiB), and SHA-256 of the whole file."""
    with file.open("rb") as opened:
        opened.seek(0x100000)
        short = hashlib.sha256(opened.read(0x10000)).hexdigest()[:8]
        opened.seek(0)
        whole = hashlib.sha256()
        while part := opened.read(1 << 22):
            whole.update(part)
        return short, whole.hexdigest()


def modelspec(settings: Settings, models: BaseModels) -> dict[str, str]:
    """The modelspec.* entries that depend on options; Adapter.save adds architecture, implementation and date."""
    own = {key: value for key, value in option_entries(settings, "modelspec.").items() if value is not None}
    entries = {
        **own,
        "modelspec.title": settings.metadata_title or settings.output_name or "last",
    }
    if not models.family.has_flow:
        entries["modelspec.prediction_type"] = "v" if models.v_prediction else "epsilon"
    if settings.resolution:  # else Adapter.save writes the base model's resolution
        width, height = read_size(settings.resolution)
        entries["modelspec.resolution"] = f"{width}x{height}"
    if settings.min_timestep is not None or settings.max_timestep is not None:
        high = 1000 if settings.max_timestep is None else settings.max_timestep
        entries["modelspec.timestep_range"] = f"{settings.min_timestep or 0},{high}"
    if settings.clip_skip is not None and models.family.fixed_clip_skip is None:
        entries["modelspec.encoder_layer"] = str(settings.clip_skip)
    return entries


def for_save(metadata: dict[str, str], settings: Settings, step: int, epoch: int) -> dict[str, str]:
    """The metadata of a save at this step and epoch; with --no_metadata only what other programs need to load it."""
    now = {**metadata, "ss_steps": str(step), "ss_epoch": str(epoch), "ss_training_finished_at": str(time.time())}
    if settings.no_metadata:
        return {key: value for key, value in now.items() if key in _ALWAYS or key.startswith("modelspec.")}
    return now
