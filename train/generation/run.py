"""From options to pictures: the plan is made and checked, the model loaded, the pictures drawn and written."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lora_adapters.convert.tools.command_line import device_of
from lora_adapters.train.errors import TrainingError
from lora_adapters.train.generation.draw import Drawer, sized
from lora_adapters.train.generation.image_grid import draw_sheet
from lora_adapters.train.generation.networks import metadata, put_to_work, unmerged
from lora_adapters.train.generation.output import Album, save
from lora_adapters.train.generation.plan import Plan, plan
from lora_adapters.train.generation.requests import PictureRequest, check_for_kind
from lora_adapters.train.models.base import BaseModels, check_clip_skip, load_base_models
from lora_adapters.train.models.schedulers import sampler


def generate(settings: argparse.Namespace) -> list[Path]:
    """Draw what the options (`generation.options.parse`) say; the paths of what was written.

    TrainingError or AdapterError for whatever cannot be done, before the model is loaded where it can be told by then.
    """
    made = plan(settings)
    device = device_of(settings.device, torch.float32) if settings.device else best_device()
    if settings.network_show_meta:
        print(metadata(made.networks))
    models = load(settings, device)
    own_size = ((models.unet.config.sample_size or 64) * 2 ** (len(models.vae.config.block_out_channels) - 1),) * 2
    check_for_kind(made.requests, models.kind)
    wanted = [sized(request, own_size) for request in made.requests]
    pipe = models.pipeline(sampler("ddim", models.prediction_type))
    working = put_to_work(models, pipe, made.networks, settings.network_pre_calc)
    drawer = Drawer(models, settings, device, pipe, working, [one.multiplier for one in unmerged(made.networks)])
    album = Album(settings, models, made.networks)
    if made.columns:
        written = [_sweep(drawer, album, wanted, made)]
    else:
        pairs = tqdm(drawer.draw(wanted), "pictures", len(wanted), unit="picture", disable=None)
        written = [album.add(request, picture) for request, picture in pairs]
    print(f"{len(written)} picture{'s' if len(written) > 1 else ''} written: {_shown(written)}")
    return written


def best_device() -> torch.device:
    """CUDA, else Apple's, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def load(settings: argparse.Namespace, device: torch.device) -> BaseModels:
    """The model on the device, in the precision asked for. TrainingError where it is not what the options say."""
    from diffusers.utils.logging import disable_progress_bar
    from transformers.utils.logging import disable_progress_bar as disable_transformers_progress_bar

    disable_progress_bar()
    disable_transformers_progress_bar()
    dtype = torch.float16 if settings.fp16 else torch.bfloat16 if settings.bf16 else torch.float32
    models = load_base_models(settings, dtype)
    for flag, kinds in (("v1", ("sd1",)), ("sdxl", ("sdxl",))):
        if getattr(settings, flag) and models.kind not in kinds:
            raise TrainingError(f"--{flag}: {models.name} is {models.kind}")
    if settings.zero_terminal_snr and not models.v_prediction:
        raise TrainingError(f"--zero_terminal_snr is for models that predict v, which {models.name} does not "
                            "(--v_parameterization says that it does)")  # fmt: skip
    if settings.clip_skip not in (None, 2) and models.kind == "sdxl":
        raise TrainingError(f"--clip_skip {settings.clip_skip}: SDXL was trained with 2, and takes no other here")
    check_clip_skip(models, settings.clip_skip)
    for module in (*models.text_encoders, models.vae, models.unet):
        module.to(device)
    if settings.no_half_vae or (dtype == torch.float16 and getattr(models.vae.config, "force_upcast", False)):
        models.vae.to(torch.float32)
    if settings.xformers or settings.diffusers_xformers:
        models.unet.enable_xformers_memory_efficient_attention()
        models.vae.enable_xformers_memory_efficient_attention()
    if settings.opt_channels_last:
        for module in (models.unet, models.vae):
            module.to(memory_format=torch.channels_last)
    return models


def _sweep(drawer: Drawer, album: Album, wanted: Sequence[PictureRequest], made: Plan) -> Path:
    """Draw every request with every column's settings, on one sheet."""
    total = len(wanted) * len(made.columns)
    with tqdm(total=total, desc="pictures", unit="picture", disable=None) as bar:
        drawn: list[list[Any]] = []
        for column in made.columns:  # in this order, adapters change their settings as seldom as can be
            drawn.append([])
            for _, picture in drawer.draw([column.of(request, made.networks) for request in wanted]):
                drawn[-1].append(picture)
                bar.update()
    several = len({one.seed for one in wanted}) > 1 and len({one.prompt for one in wanted}) < len(wanted)
    labels = [f"{one.prompt}\nseed {one.seed}" if several else one.prompt for one in wanted]
    rows = [(label, [column[row] for column in drawn]) for row, label in enumerate(labels)]
    sheet = draw_sheet(rows, [column.title for column in made.columns], album.settings.sheet_font)
    path = album.sheet_path()
    save(sheet, path, album.text(wanted[0], " ".join(album.settings.sweep)))
    return path


def _shown(written: Sequence[Path]) -> str:
    return str(written[0]) if len(written) == 1 else str(written[0].parent)
