"""What a run would do, in a few lines: --dry_run."""

import sys
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import torch

from lora_adapters.convert.deltas.base import alpha_in
from lora_adapters.convert.deltas.low_rank import rank_range
from lora_adapters.convert.families.names import ModuleName
from lora_adapters.train.data.captions import Moment, draw_caption
from lora_adapters.train.models.family import TrainingFamily, is_text_encoder
from lora_adapters.train.seeding import python_random
from lora_adapters.train.training import adapters
from lora_adapters.train.training.optimizers import optimizer_name, state_bytes
from lora_adapters.train.training.setup import Run
from lora_adapters.types.registry import delta_of, parts_of

_MIB = 1024 * 1024
_CAPTIONS_SHOWN = 3  # of each subset


def report(run: Run) -> str:
    """Images, buckets and captions, steps, modules and parameters in each block, and the memory of weights."""
    settings, layers = run.settings, adapters.lora_layers(run.trained)
    parameters = sum(p.numel() for p in run.parameters)
    batch = settings.gradient_accumulation_steps * run.accelerator.num_processes
    lines = [
        run.data.summary(),
        "captions, as the first epoch reads them:",
        *(f"  {name}: {caption}" for name, caption in captions(run)),
        f"steps: {run.steps} in {run.epochs} epochs of {run.steps_per_epoch}; {batch} batches a step",
        f"adapter: {settings.network_module}, rank {_ranks(layers)}, {len(layers)} modules, {parameters:,} parameters",
        *(f"  {place}: {count} modules, {numbers:,} parameters" for place, count, numbers in by_block(run)),
        *choices(run),
        "learning rates:",
        *(f"  {group['name']}: {group['lr']:g}, {_size(group):,} parameters" for group in run.optimizer.param_groups),
        "memory for weights, gradients and optimizer (activations come on top):",
        *(f"  {name}: {_shown(size)}" for name, size in memory(run).items()),
    ]
    return "\n".join(lines)


def choices(run: Run) -> list[str]:
    """What preset, patterns and regular expressions in --network_args chose; with verbose=True, each module."""
    if run.settings.dim_from_weights:
        return []
    asked = adapters.options(run.settings, run.models.family)
    lines = [f"chosen by preset {asked.config.preset}"] if asked.config.preset else []
    ranks, rates = asked.config.reg_dims or {}, asked.reg_lrs or {}
    for option, counts in adapters.pattern_choices(asked, run.trained).items():
        lines.append(f"{option}:")
        for pattern, count in counts.items():
            rank = f", rank {ranks[pattern]}" if option == "network_reg_dims" else ""
            rate = f", learning rate {rates[pattern]:g}" if option == "network_reg_lrs" else ""
            gone = " left out" if option == "exclude_patterns" else ""
            lines.append(f"  {pattern}: {count} modules{gone}{rank}{rate}")
    if asked.verbose:
        lines += ["modules:", *(f"  {_described(name, layer)}" for name, layer in _layers(run).items())]
    return lines


def _described(name: ModuleName, layer: Any) -> str:
    change = delta_of(layer, adapters.ADAPTER)
    alpha = alpha_in(change)
    numbers = "" if change.rank is None else f", rank {change.rank}" + ("" if alpha is None else f", alpha {alpha:g}")
    return f"{name}: {change.kind}{numbers}"


def _layers(run: Run) -> dict[ModuleName, Any]:
    return adapters.lora_layers(run.trained)


def _size(group: dict[str, Any]) -> int:
    return sum(parameter.numel() for parameter in group["params"])


def _ranks(layers: Mapping[ModuleName, Any]) -> str:
    ranks = (delta_of(layer, adapters.ADAPTER).rank for layer in layers.values())
    return rank_range(rank for rank in ranks if rank is not None)


def by_block(run: Run) -> list[tuple[str, int, int]]:
    """(place, modules, parameters) of each text encoder and each block of the denoiser, in order."""
    layers = adapters.lora_layers(run.trained)
    counts: dict[tuple[int, str], list[int]] = defaultdict(lambda: [0, 0])
    for name, layer in layers.items():
        entry = counts[_place(name, run.models.family)]
        entry[0] += 1
        parts = (part for _, part in parts_of(layer, adapters.ADAPTER))
        entry[1] += sum(parameter.numel() for part in parts for parameter in part.parameters())
    return [(place, modules, numbers) for (_, place), (modules, numbers) in sorted(counts.items())]


def captions(run: Run) -> list[tuple[str, str]]:
    """(image, caption) of the first images of each subset, with everything done to the caption that options ask."""
    found: list[tuple[str, str]] = []
    shown: Counter[int] = Counter()
    seen: set[int] = set()
    for entry, number in enumerate(run.data.images.entries):
        image = run.data.images.images[number]
        if number not in seen and shown[id(image.subset)] < _CAPTIONS_SHOWN:
            seen.add(number)
            shown[id(image.subset)] += 1
            rng = python_random(run.seed, "caption", 0, entry)
            caption = draw_caption(image.found.caption, image.subset, rng, Moment(0, 0, run.steps))
            found.append((image.found.source.name, caption))
    return found


def memory(run: Run) -> dict[str, int | None]:
    """Bytes of what is certain beforehand: weights of the base, the adapter with gradients, the optimizer's state."""
    trained = sum(p.numel() * p.element_size() for p in run.parameters)
    encoders = torch.nn.ModuleList(run.models.text_encoders)
    denoiser = run.models.family.denoiser_title
    parts = {denoiser: run.models.denoiser, "text encoders": encoders, "VAE": run.models.vae}
    found: dict[str, int | None] = {
        name: sum(p.numel() * p.element_size() for p in part.parameters() if not p.requires_grad)
        for name, part in parts.items()
    }
    optimizer = f"optimizer ({optimizer_name(run.settings)})"
    return {**found, "adapter and gradients": 2 * trained, optimizer: state_bytes(run.settings, run.parameters)}


def _shown(size: int | None) -> str:
    return "not known on this device" if size is None else f"{size / _MIB:,.1f} MiB"


def _place(name: ModuleName, family: TrainingFamily) -> tuple[int, str]:
    if is_text_encoder(name.component):
        return (-1, name.component)
    block = family.block(name.path)
    return (sys.maxsize, "other") if block is None else (block, f"{name.component} block {block}")
