"""One run: trains a method on a task, and measures the held-out loss at each of its ranks."""

import copy
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import nn

from lora_adapters import Adapter, scale_component_rates, set_step, sort_components

from .methods import Method
from .tasks import Examples, Task

BATCH = 8
WARM_UP = 10  # steps of learning rate warm-up
NOISES = 16  # noise samples per held-out image, each at another timestep, evenly spaced
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def rate(step: int, steps: int, peak: float, warmup: int = WARM_UP) -> float:
    """The learning rate: linear warm-up and cosine decay to 0, so that every run has converged at its end."""
    return peak * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def train(unet: Any, method: Method, task: Task, lr: float, seed: int, steps: int, kohya: Path | None) -> Adapter:
    """Train the method's layers on the U-Net. Step n of a seed always has the same images, noise and timesteps."""
    unet.train().requires_grad_(False)
    fitted = method.put_on(unet, seed, kohya)
    optimizer = torch.optim.AdamW(fitted.parameters, lr=lr, weight_decay=0.01, fused=True)
    scale_component_rates(unet, optimizer)
    schedule = DDPMScheduler(**SCHEDULE)
    clean, text = task.train.latents, task.train.text
    for step in range(steps):
        if set_step(unet, step, total_steps=steps):
            sort_components(unet, optimizer)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        picked = torch.randint(len(clean), (BATCH,), generator=generator)
        noise = torch.randn(BATCH, *clean.shape[1:], generator=generator)
        timesteps = (torch.randperm(BATCH, generator=generator) + torch.rand(BATCH, generator=generator)) * 1000 / BATCH
        timesteps = timesteps.long()
        noisy = schedule.add_noise(clean[picked], noise, timesteps)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps, lr)
        loss = (unet(noisy, timesteps, text[picked]).sample - noise).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(fitted.parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return fitted.adapter().map(lambda one: one.to(torch.float32))


@contextmanager
def merged(unet: nn.Module, adapter: Adapter | None) -> Iterator[nn.Module]:
    """A context in which the adapter is merged into the base U-Net."""
    before = {}
    try:
        for module, one in (adapter.modules if adapter else {}).items():
            weight = unet.get_submodule(module.path).weight
            before[module.path] = weight.data
            weight.data = weight.data + one.delta().detach().reshape(weight.shape)
        yield unet
    finally:
        for path, data in before.items():
            unet.get_submodule(path).weight.data = data


@torch.no_grad()
def held_out_loss(unet: nn.Module, examples: Examples) -> float:
    """Mean squared error of the predicted noise, with the same noise and timesteps for every adapter."""
    schedule = DDPMScheduler(**SCHEDULE)
    generator = torch.Generator().manual_seed(0)
    count = len(examples.latents)
    total = 0.0
    for number in range(NOISES):
        noise = torch.randn(examples.latents.shape, generator=generator)
        timesteps = ((torch.arange(count) / count + number) * 1000 / NOISES).long()[
            torch.randperm(count, generator=generator)
        ]
        predicted = unet(schedule.add_noise(examples.latents, noise, timesteps), timesteps, examples.text).sample
        total += (predicted - noise).square().mean().item()
    return total / NOISES


def run(
    base: UNet2DConditionModel, method: Method, task: Task, lr: float, seed: int, steps: int, kohya: Path | None
) -> tuple[dict[str, Any], Adapter]:
    """(record, adapter) of a run. The record has the held-out loss by rank, "plain r16" also after SVD truncation."""
    start, cpu = time.perf_counter(), time.process_time()
    adapter = train(copy.deepcopy(base), method, task, lr, seed, steps, kohya)
    trained, trained_cpu = time.perf_counter() - start, time.process_time() - cpu
    base.eval()
    losses, cuts = {}, {}
    highest = max(method.ranks)
    for rank in method.ranks:
        with merged(base, adapter.truncate(rank) if rank < highest else adapter) as unet:
            losses[rank] = held_out_loss(unet, task.held_out)
    if method.name == "plain r16":
        for rank in (1, 2, 4, 8):
            with merged(base, adapter.svd(rank)) as unet:
                cuts[rank] = held_out_loss(unet, task.held_out)
    record = {
        "task": task.name, "method": method.name, "lr": lr, "seed": seed, "steps": steps,
        "losses": losses, "svd": cuts, "seconds": trained, "cpu_seconds": trained_cpu,
        "all_seconds": time.perf_counter() - start,
    }  # fmt: skip
    return record, adapter
