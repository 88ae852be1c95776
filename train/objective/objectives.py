"""Training objectives: what a denoiser predicts, by the prediction_type of scheduler configs.

An objective draws timesteps, adds noise to latents, and computes the target and the loss tables. The objectives of a
DDPM schedule are here; flow matching is in `flow_matching`.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch

from lora_adapters.train.errors import TrainingError
from lora_adapters.train.objective.losses import LossOptions, TimestepTables
from lora_adapters.train.objective.noise import NoiseOptions, draw_timesteps


class Objective(ABC):
    """A training objective. Latents, noise and targets are (n, channels, h, w), timesteps (n,)."""

    @abstractmethod
    def draw(self, generators: list[torch.Generator], noise: NoiseOptions, latents: torch.Tensor) -> torch.Tensor:
        """Draw one timestep per sample."""

    @abstractmethod
    def noised(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Add noise to latents at `timesteps`."""

    @abstractmethod
    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The target of the loss."""

    def compared(self, predicted: torch.Tensor, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The tensor that the loss compares with the target: the prediction, or a value computed from it."""
        return predicted

    @abstractmethod
    def tables(self, options: LossOptions, device: torch.device | str) -> Any:
        """The loss weights and Huber widths of timesteps, as an object with `weight_at` and `width_at`."""


class NoisePrediction(Objective):
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e under a DDPM schedule; the target is the noise e (arXiv 2006.11239)."""

    def __init__(self, schedule: Any):
        self.schedule = schedule

    def draw(self, generators: list[torch.Generator], noise: NoiseOptions, latents: torch.Tensor) -> torch.Tensor:
        return draw_timesteps(generators, noise)

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return self.schedule.add_noise(latents, noise, timesteps)

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return noise

    def tables(self, options: LossOptions, device: torch.device | str) -> TimestepTables:
        return TimestepTables.of(self.schedule.alphas_cumprod, options, device)


class VelocityPrediction(NoisePrediction):
    """The same x_t; the target is the velocity v = sqrt(a_t) e - sqrt(1 - a_t) x_0 (arXiv 2202.00512)."""

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return self.schedule.get_velocity(latents, noise, timesteps)


OBJECTIVES: dict[str, type[NoisePrediction]] = {"epsilon": NoisePrediction, "v_prediction": VelocityPrediction}


def objective(name: str, schedule: Any) -> Objective:
    """The objective called `name` with a base model's noise schedule. TrainingError if the name is unknown."""
    if name not in OBJECTIVES:
        raise TrainingError(f"unknown training objective {name}: {', '.join(OBJECTIVES)} are known")
    return OBJECTIVES[name](schedule)
