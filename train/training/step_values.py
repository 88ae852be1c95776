"""The values of a step, moved to the CPU in one transfer, so that a step synchronises with the device only once."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from lora_adapters.train.errors import TrainingError
from lora_adapters.train.stopping import SIGNALS, signalled


@dataclass(frozen=True)
class StepValues:
    """loss: the mean over all processes. stop: the signal that a process received, or 0. others: log name -> value."""

    loss: float
    stop: int
    others: dict[str, float]


def fetch(accelerator: Any, loss: torch.Tensor, flags: torch.Tensor, others: dict[str, torch.Tensor]) -> StepValues:
    """Fetch a step's values. loss: () of this process. flags: of StopSignals. others: (), the same in all processes."""
    shared = accelerator.reduce(torch.cat([loss.detach().float().view(1), flags]), reduction="mean")
    own = [value.detach().float().view(1) for value in others.values()]
    values = torch.cat([shared, *own]).tolist()
    signals = 1 + len(SIGNALS)
    return StepValues(values[0], signalled(values[1:signals]), dict(zip(others, values[signals:], strict=True)))


def check_finite(values: StepValues, step: int, scaled: bool) -> None:
    """Stop training if the loss or the gradient is NaN or infinite.

    Args:
        values: The loss and the gradient norm of the step.
        step: The number of the step, from 1.
        scaled: Whether a gradient scaler is used: it skips steps with an infinite gradient, which are then allowed.

    Raises:
        TrainingError: The loss, or the gradient without a scaler, is NaN or infinite.
    """
    if not math.isfinite(values.loss):
        raise TrainingError(
            f"the loss is {values.loss} at step {step}: training stopped, earlier saves are kept; lower the "
            "learning rate, or train in another precision"
        )
    norm = values.others.get("norm/gradient", 0.0)
    if not math.isfinite(norm) and not scaled:
        raise TrainingError(f"the gradient is {norm} at step {step}: training stopped, earlier saves are kept")
