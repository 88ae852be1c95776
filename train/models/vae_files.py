"""Loads VAEs from files, folders and the Hub."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from lora_adapters.compat import dtype_option
from lora_adapters.convert.errors import first_line
from lora_adapters.train.errors import TrainingError
from lora_adapters.train.models.part_weights import empty, fill, own_part, read_weights, vae_weights
from lora_adapters.train.options.model import ModelSource

PREFIXES = ("first_stage_model.", "vae.")  # of VAE tensors in files of whole models


def load_vae(
    name: str, dtype: torch.dtype, settings: ModelSource, released: Mapping[str, Any] | None = None
) -> AutoencoderKL:
    """Load the VAE that an option names.

    Args:
        name: A checkpoint file, a folder with a VAE or a whole model, or a Hub repository.
        dtype: The dtype of the weights.
        settings: The options; --model_config gives the config for a file.
        released: The config for a file without --model_config; None lets diffusers choose it.

    Returns:
        The VAE.

    Raises:
        TrainingError: The VAE cannot be loaded, or does not fit the config.
    """
    path = Path(name)
    try:
        if path.is_file():
            if released is not None:
                return _from_file(path, dtype, settings, released)
            config = {"config": settings.model_config, "subfolder": "vae"} if settings.model_config else {}
            return AutoencoderKL.from_single_file(str(path), **dtype_option(dtype), **config)
        whole_model = (path / "model_index.json").exists()
        return AutoencoderKL.from_pretrained(name, **dtype_option(dtype), subfolder="vae" if whole_model else None)
    except OSError as error:
        raise TrainingError(f"--vae {name} cannot be loaded: {first_line(error)}") from error


def _from_file(file: Path, dtype: torch.dtype, settings: ModelSource, released: Mapping[str, Any]) -> AutoencoderKL:
    """Load a VAE, under the original code's or diffusers' names, from its own file or a file of a whole model."""
    tensors = own_part(read_weights(file, settings.disable_mmap_load_safetensors), PREFIXES)
    config = dict(released)
    if settings.model_config:
        config = AutoencoderKL.load_config(
            settings.model_config, subfolder="vae", cache_dir=settings.tokenizer_cache_dir
        )
    model = empty(lambda: AutoencoderKL.from_config(config))
    return fill(model, partial(vae_weights, model, tensors), dtype, f"VAE {file}")
