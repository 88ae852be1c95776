"""--dry_run: describes in a few lines what a run would do."""

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from lora_adapters.convert.deltas.low_rank import rank_range
from lora_adapters.convert.errors import first_line
from lora_adapters.convert.families.names import ModuleName
from lora_adapters.train.data.captions import Moment, draw_caption
from lora_adapters.train.models.block_swap import bytes_away
from lora_adapters.train.models.quantised import scale_bytes
from lora_adapters.train.seeding import python_random
from lora_adapters.train.training import adapters
from lora_adapters.train.training.activations import activation_bytes, largest_batch
from lora_adapters.train.training.block_table import table
from lora_adapters.train.training.module_choices import choices
from lora_adapters.train.training.optimizers import optimizer_name, state_bytes
from lora_adapters.train.training.setup import Run
from lora_adapters.types.registry import delta_of

log = logging.getLogger(__name__)

_MIB = 1024 * 1024
_CAPTIONS_SHOWN = 3  # of each subset


def report(run: Run) -> str:
    """The report: images, buckets, captions, steps, modules and parameters of each block, and memory."""
    settings, layers = run.settings, adapters.lora_layers(run.trained)
    parameters = sum(p.numel() for p in run.parameters)
    batch = settings.gradient_accumulation_steps * run.accelerator.num_processes
    lines = [
        run.data.summary(),
        "captions, as the first epoch reads them:",
        *(f"  {name}: {caption}" for name, caption in captions(run)),
        f"steps: {run.steps} in {run.epochs} epochs of {run.steps_per_epoch}; {batch} batches a step",
        f"adapter: {settings.network_module}, rank {_ranks(layers)}, {len(layers)} modules, {parameters:,} parameters",
        *choices(run),
        *(f"  {row}" for row in table(run)),
        *_memory_lines(run),
    ]
    return "\n".join(lines)


def _ranks(layers: Mapping[ModuleName, Any]) -> str:
    ranks = (delta_of(layer, adapters.ADAPTER).rank for layer in layers.values())
    return rank_range(rank for rank in ranks if rank is not None)


def captions(run: Run) -> list[tuple[str, str]]:
    """(image, caption) of the first images of each subset, after shuffling, dropout and the other caption options."""
    shown: list[tuple[str, str]] = []
    counts: Counter[int] = Counter()
    seen: set[int] = set()
    for entry, number in enumerate(run.data.images.entries):
        image = run.data.images.images[number]
        if number not in seen and counts[id(image.subset)] < _CAPTIONS_SHOWN:
            seen.add(number)
            counts[id(image.subset)] += 1
            rng = python_random(run.seed, "caption", 0, entry)
            caption = draw_caption(image.origin.caption, image.subset, rng, Moment(0, 0, run.steps))
            shown.append((image.origin.source.name, caption))
    return shown


def memory(run: Run) -> dict[str, int | None]:
    """Bytes that are known in advance: base model weights, adapter weights with gradients, optimizer state."""
    trained = sum(p.numel() * p.element_size() for p in run.parameters)
    encoders = torch.nn.ModuleList(run.models.text_encoders)
    denoiser = run.models.family.denoiser_title
    parts = {denoiser: run.models.denoiser, "text encoders": encoders, "VAE": run.models.vae}
    sizes: dict[str, int | None] = {
        name: sum(p.numel() * p.element_size() for p in part.parameters() if not p.requires_grad)
        for name, part in parts.items()
    }
    away = bytes_away(run.models, run.settings.blocks_to_swap)
    sizes[denoiser] = (sizes[denoiser] or 0) + scale_bytes(run.models.denoiser) - away
    optimizer = f"optimizer ({optimizer_name(run.settings)})"
    return {**sizes, "adapter and gradients": 2 * trained, optimizer: state_bytes(run.settings, run.parameters)}


def _memory_lines(run: Run) -> list[str]:
    """Lines about the memory of a step, with an estimate of the activations."""
    settings, parts = run.settings, memory(run)
    count, (width, height) = largest_batch(run)
    name = f"activations of {count} at {width}x{height}, estimated"
    try:
        parts[name] = activation_bytes(run)
    except Exception as error:  # a denoiser that does not run on the meta device
        log.warning("the memory of activations cannot be estimated (%s)", first_line(error))
        parts[name] = None
    away = {"VAE"} if settings.cache_latents or settings.cache_latents_to_disk else set()
    if settings.cpu_offload_checkpointing:
        away.add(name)
    if settings.cache_text_encoder_outputs or settings.cache_text_encoder_outputs_to_disk:
        away.add("text encoders")
    if settings.highvram:
        away -= {"VAE", "text encoders"}
    known = [size for part, size in parts.items() if size is not None and part not in away]
    lines = [f"  {part}: {_shown(size)}{' (not on the device in a step)' if part in away else ''}"
             for part, size in parts.items()]  # fmt: skip
    more = "" if len(known) + len(away) == len(parts) else " plus the unknown parts"
    return [
        "memory of a step:",
        *lines,
        f"  together about {_shown(sum(known))}{more}, without kernel workspaces and the driver's own memory",
    ]


def _shown(size: int | None) -> str:
    return "not known on this device" if size is None else f"{size / _MIB:,.1f} MiB"
