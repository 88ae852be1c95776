"""Measures the held-out loss with the same images, noise and timesteps each time, so that measurements compare."""

from dataclasses import dataclass
from typing import Any

import torch

from lora_adapters.train.data.dataset import TrainingData
from lora_adapters.train.objective.step_loss import StepLoss
from lora_adapters.train.training.samples import spread
from lora_adapters.types.dylora.rank_controller import controllers, set_rank

TIMESTEPS_A_SAMPLE = 4


@dataclass(frozen=True)
class HeldOut:
    """A measurement: the step, the DyLoRA rank (None for other adapters) and the mean loss over held-out images."""

    step: int
    rank: int | None
    loss: float


def fixed_timesteps(low: int, high: int, count: int = TIMESTEPS_A_SAMPLE) -> list[int]:
    """The midpoints of `count` equal intervals of low <= t < high."""
    return [low + int((high - low) * (i + 0.5) / count) for i in range(count)]


def held_out_losses(
    step_loss: StepLoss,
    data: TrainingData,
    models: list[torch.nn.Module],
    step: int,
    accelerator: Any,
    most: int | None,
) -> list[HeldOut]:
    """Measure the held-out loss, for DyLoRA at up to eight ranks.

    Args:
        step_loss: Computes the loss of a batch.
        data: The images; the held-out ones are divided among the processes.
        models: The models with the adapter, in evaluation mode.
        step: The step number, which is stored in the results.
        accelerator: Accelerate's `Accelerator`.
        most: The largest number of batches; None uses all.

    Returns:
        One measurement, or one for each rank.
    """
    dials = controllers(models)
    at = {id(dial): dial.rank for dial in dials}
    ranks: list[int | None] = list(spread(max((dial.ranks for dial in dials), key=len), 8)) if dials else [None]
    try:
        measured = []
        for rank in ranks:
            if rank is not None:
                set_rank(models, rank)
            measured.append(HeldOut(step, rank, mean_loss(step_loss, data, accelerator, most)))
    finally:
        for dial in dials:
            dial.set_rank(at[id(dial)])
    return measured


def mean_loss(step_loss: StepLoss, data: TrainingData, accelerator: Any, most: int | None) -> float:
    """The mean held-out loss over the images of all processes. Images with loss weight 0 (fillers) are not counted."""
    options = step_loss.options.noise
    timesteps = fixed_timesteps(options.min_timestep, options.max_timestep)
    measured: list[torch.Tensor] = []
    weights: list[torch.Tensor] = []
    world = accelerator.num_processes
    for number, batch in enumerate(data.batches(0, rank=accelerator.process_index, world_size=world)):
        if most is not None and number >= most:
            break
        with accelerator.autocast():
            measured.append(step_loss.held_out(batch, timesteps))
        weights.append(batch.loss_weights)
    # Weights correct for batches that do not divide evenly among processes. Here they only tell fillers (weight 0).
    counts = (torch.cat(weights) > 0).double()
    total = torch.stack([(torch.cat(measured).cpu().double() * counts).sum(), counts.sum()])
    total = accelerator.reduce(total.to(accelerator.device, torch.float32), reduction="sum").cpu()
    return (total[0] / total[1]).item()
