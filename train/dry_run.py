"""What a run would do, in a few lines: --dry_run."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch

from lora_adapters.convert.low_rank import rank_range
from lora_adapters.convert.names import ModuleName, architecture_of, block_index
from lora_adapters.train import adapters
from lora_adapters.train.run import Run

_MIB = 1024 * 1024


def report(run: Run) -> str:
    """Pictures and buckets, steps, modules and parameters in each block, and the memory that weights will take."""
    settings, layers = run.settings, adapters.lora_layers(run.trained)
    parameters = sum(p.numel() for p in run.parameters)
    batch = settings.gradient_accumulation_steps * run.accelerator.num_processes
    lines = [
        run.data.summary(),
        f"steps: {run.steps} in {run.epochs} epochs of {run.steps_per_epoch}; {batch} batches a step",
        f"adapter: {settings.network_module}, rank {_ranks(layers)}, {len(layers)} modules, {parameters:,} parameters",
        *(f"  {place}: {count} modules, {numbers:,} parameters" for place, count, numbers in by_block(run)),
        "memory for weights, gradients and optimizer (activations come on top):",
        *(f"  {name}: {size / _MIB:,.1f} MiB" for name, size in memory(run).items()),
    ]
    return "\n".join(lines)


def _ranks(layers: Mapping[ModuleName, Any]) -> str:
    return rank_range(len(layer.lora_A[adapters.ADAPTER].weight) for layer in layers.values())


def by_block(run: Run) -> list[tuple[str, int, int]]:
    """(place, modules, parameters) of each text encoder and each block of the U-Net, in order."""
    layers = adapters.lora_layers(run.trained)
    unet = [name for name in layers if name.component == "unet"]
    architecture = architecture_of(unet) if unet else "sd"
    counts: dict[tuple[int, str], list[int]] = defaultdict(lambda: [0, 0])
    for name, layer in layers.items():
        weights = (layer.lora_A[adapters.ADAPTER].weight, layer.lora_B[adapters.ADAPTER].weight)
        entry = counts[_place(name, architecture)]
        entry[0] += 1
        entry[1] += sum(weight.numel() for weight in weights)
    return [(place, modules, numbers) for (_, place), (modules, numbers) in sorted(counts.items())]


def memory(run: Run) -> dict[str, int]:
    """Bytes of what is certain beforehand: weights of the base, the adapter with gradients, two optimizer states."""
    trained = sum(p.numel() * p.element_size() for p in run.parameters)
    encoders = torch.nn.ModuleList(run.models.text_encoders)
    parts = {"U-Net": run.models.unet, "text encoders": encoders, "VAE": run.models.vae}
    found = {
        name: sum(p.numel() * p.element_size() for p in part.parameters() if not p.requires_grad)
        for name, part in parts.items()
    }
    return {**found, "adapter and gradients": 2 * trained, "optimizer (two values a weight)": 2 * trained}


def _place(name: ModuleName, architecture: str) -> tuple[int, str]:
    if name.component != "unet":
        return (-1, name.component)
    block = block_index(name.path, architecture)
    return (100, "other") if block is None else (block, f"unet block {block}")
