"""Runs the image generation: makes and checks the plan, loads the model, generates and writes the images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lora_adapters.convert.devices import device_of
from lora_adapters.convert.terminal import is_quiet, say
from lora_adapters.train.errors import TrainingError
from lora_adapters.train.generation.draw import Drawer, completed
from lora_adapters.train.generation.flow import check_options, say_unread
from lora_adapters.train.generation.image_grid import draw_sheet
from lora_adapters.train.generation.networks import apply_networks, metadata, unmerged
from lora_adapters.train.generation.offload import check_offload, offload
from lora_adapters.train.generation.options import GenerateSettings
from lora_adapters.train.generation.output import Album, save
from lora_adapters.train.generation.plan import Plan, plan
from lora_adapters.train.generation.requests import ImageRequest, check_sizes
from lora_adapters.train.models.base import (
    BaseModels,
    check_clip_skip,
    check_declared_kind,
    check_fixed_clip_skip,
    load_base_models,
)


def generate(settings: GenerateSettings) -> list[Path]:
    """Generate images.

    Args:
        settings: From `generation.options.parse`.

    Returns:
        The paths of the files that were written.

    Raises:
        TrainingError: A setting is invalid, or the model cannot be loaded. Settings are checked before the model is
            loaded, as far as possible.
        AdapterError: An adapter cannot be read, or does not fit the model.
    """
    made = plan(settings)
    device = device_of(settings.device, torch.float32) if settings.device else best_device()
    check_offload(settings, device)
    if settings.network_show_meta:
        print(metadata(made.networks))
    models = load(settings, device)
    check_sizes(made.requests, models.family)
    say_unread(settings, made.requests, models.family)
    requests = [completed(request, models) for request in made.requests]
    pipe = models.pipeline(models.family.sampler("ddim", models.prediction_type, False, models.schedule_config))
    working = apply_networks(models, pipe, made.networks, settings.network_pre_calc)
    if settings.offload:
        offload(pipe, settings.offload, device)
    drawer = Drawer(
        models, settings, device, pipe, working, [network.multiplier for network in unmerged(made.networks)]
    )
    album = Album(settings, models, made.networks)
    if made.columns:
        written = [_sweep(drawer, album, requests, made)]
    else:
        pairs = tqdm(drawer.draw(requests), "images", len(requests), unit="image", disable=is_quiet() or None)
        written = [album.add(request, image) for request, image in pairs]
    say(f"{len(written)} image{'s' if len(written) > 1 else ''} written: {_shown(written)}")
    return written


def best_device() -> torch.device:
    """The default device: CUDA, else MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def load(settings: GenerateSettings, device: torch.device) -> BaseModels:
    """Load the model in the requested precision, on the device (with --offload: on the CPU).

    Args:
        settings: The options.
        device: The device to run on.

    Returns:
        The model.

    Raises:
        TrainingError: The model cannot be loaded, or contradicts the options.
    """
    from diffusers.utils.logging import disable_progress_bar
    from transformers.utils.logging import disable_progress_bar as disable_transformers_progress_bar

    disable_progress_bar()
    disable_transformers_progress_bar()
    dtype = torch.float16 if settings.fp16 else torch.bfloat16 if settings.bf16 else torch.float32
    models = load_base_models(settings, dtype)
    check_declared_kind(models, settings)
    if settings.zero_terminal_snr and not models.v_prediction:
        raise TrainingError(f"--zero_terminal_snr is for models that predict v, which {models.name} does not "
                            "(--v_parameterization declares that it does)")  # fmt: skip
    check_options(settings, models.family)
    check_fixed_clip_skip(models.family, settings.clip_skip)
    check_clip_skip(models, settings.clip_skip)
    waiting = (*models.components.values(), models.vae) if settings.offload else ()
    for module in (*models.text_encoders, models.vae, models.denoiser):
        if not any(module is other for other in waiting):
            module.to(device)
    upcast = dtype == torch.float16 and models.family.trained and getattr(models.vae.config, "force_upcast", False)
    if settings.no_half_vae or upcast:
        models.vae.to(torch.float32)
    if settings.xformers or settings.diffusers_xformers:
        models.denoiser.enable_xformers_memory_efficient_attention()
        models.vae.enable_xformers_memory_efficient_attention()
    if settings.opt_channels_last:
        for module in (models.denoiser, models.vae):
            module.to(memory_format=torch.channels_last)
    return models


def _sweep(drawer: Drawer, album: Album, requests: Sequence[ImageRequest], made: Plan) -> Path:
    """Generate every request with every column's settings, and write them as one sheet."""
    total = len(requests) * len(made.columns)
    with tqdm(total=total, desc="images", unit="image", disable=is_quiet() or None) as bar:
        drawn: list[list[Any]] = []
        for column in made.columns:  # by column, so that adapter settings change as rarely as possible
            drawn.append([])
            for _, image in drawer.draw([column.of(request, made.networks) for request in requests]):
                drawn[-1].append(image)
                bar.update()
    several = len({request.seed for request in requests}) > 1 and len({request.prompt for request in requests}) < len(
        requests
    )
    labels = [f"{request.prompt}\nseed {request.seed}" if several else request.prompt for request in requests]
    rows = [(label, [column[row] for column in drawn]) for row, label in enumerate(labels)]
    sheet = draw_sheet(rows, [column.title for column in made.columns], album.settings.sheet_font)
    path = album.sheet_path()
    save(sheet, path, album.text(requests[0], " ".join(album.settings.sweep or [])))
    return path


def _shown(written: Sequence[Path]) -> str:
    return str(written[0]) if len(written) == 1 else str(written[0].parent)
