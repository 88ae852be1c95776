"""Flow matching: x_t = (1 - t) x_0 + t e, and the denoiser predicts the velocity e - x_0 (arXiv 2210.02747).

t is in [0, 1]; a timestep is 1000 t. The options for sampling t and for the loss have kohya's names.
"""

import math
from dataclasses import dataclass

import torch
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from lora_adapters.train.errors import OptionError
from lora_adapters.train.moving import moved
from lora_adapters.train.objective.losses import LossOptions
from lora_adapters.train.objective.noise import NoiseOptions
from lora_adapters.train.objective.objectives import Objective
from lora_adapters.train.options.settings import Settings

_STEPS = 1000
_SHIFTS = (256, 0.5), (4096, 1.15)  # Flux.1: (image tokens, logarithm of the shift), interpolated linearly


@dataclass(frozen=True)
class FlowOptions:
    """The options of flow matching, named as on the command line.

    timestep_sampling can also be "density" (SD3): t itself is drawn with the density of the weighting scheme. shift is
    --discrete_flow_shift, or SD3's --training_shift.
    """

    timestep_sampling: str = "sigma"
    sigmoid_scale: float = 1.0
    shift: float = 3.0
    sigma_scaled: bool = False
    weighting_scheme: str = "none"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29

    @classmethod
    def of(cls, settings: Settings, image_loss: bool = False) -> "FlowOptions":
        """The options of a run; `image_loss` is the family's. OptionError for --model_prediction_type additive."""
        if settings.model_prediction_type == "additive":
            raise OptionError(
                "--model_prediction_type additive does not fit flow matching models, which predict a velocity; give raw"
            )
        return cls(
            timestep_sampling="density" if image_loss else settings.timestep_sampling,
            sigmoid_scale=settings.sigmoid_scale,
            shift=settings.training_shift if image_loss else settings.discrete_flow_shift,
            sigma_scaled=image_loss or settings.model_prediction_type == "sigma_scaled",
            weighting_scheme=settings.weighting_scheme or "none",
            logit_mean=settings.logit_mean,
            logit_std=settings.logit_std,
            mode_scale=settings.mode_scale,
        )


def shifted(t: torch.Tensor, shift: float) -> torch.Tensor:
    """Shift t towards noise: s t / (1 + (s - 1) t)."""
    return shift * t / (1 + (shift - 1) * t)


def flux_shift(tokens: int) -> float:
    """Flux.1's shift for an image with this number of tokens (2x2 patches of latents)."""
    (x, low), (x_high, high) = _SHIFTS
    return math.exp(low + (tokens - x) * (high - low) / (x_high - x))


def draw(generators: list[torch.Generator], options: FlowOptions, size: torch.Size) -> torch.Tensor:
    """Draw one t per sample, (n,) in float32, for latents of size (..., height, width)."""
    if options.timestep_sampling == "density":
        return (shifted(_density(generators, options), options.shift) * _STEPS).floor() / _STEPS
    if options.timestep_sampling == "sigma":
        numbers = (_density(generators, options) * _STEPS).floor().clamp(0, _STEPS - 1)
        return shifted((_STEPS - numbers) / _STEPS, options.shift)
    if options.timestep_sampling == "uniform":
        return torch.cat([torch.rand(1, generator=g) for g in generators])
    normal = torch.cat([torch.randn(1, generator=g) for g in generators])
    t = torch.sigmoid(options.sigmoid_scale * normal)
    if options.timestep_sampling == "sigmoid":
        return t
    tokens = (size[-2] // 2) * (size[-1] // 2)
    return shifted(t, options.shift if options.timestep_sampling == "shift" else flux_shift(tokens))


def _density(generators: list[torch.Generator], options: FlowOptions) -> torch.Tensor:
    """Draw one number in [0, 1] per sample, (n,), with the density of the weighting scheme (arXiv 2403.03206)."""
    scheme = (options.weighting_scheme, 1, options.logit_mean, options.logit_std, options.mode_scale)
    return torch.cat([compute_density_for_timestep_sampling(*scheme, generator=g) for g in generators])


@dataclass(frozen=True)
class FlowTables:
    """Weights and Huber widths of timesteps, computed on demand since timesteps are continuous."""

    flow: FlowOptions
    loss: LossOptions

    def weight_at(self, timesteps: torch.Tensor) -> torch.Tensor:
        """The loss weights (n,); 1 if the loss compares velocities."""
        sigmas = (timesteps.float() / _STEPS).clamp(min=1 / _STEPS)
        if not self.flow.sigma_scaled:
            return torch.ones_like(sigmas)
        return compute_loss_weighting_for_sd3(self.flow.weighting_scheme, sigmas)

    def width_at(self, timesteps: torch.Tensor) -> torch.Tensor | None:
        """Huber's c (n,), or None for other losses."""
        if self.loss.loss_type not in ("huber", "smooth_l1"):
            return None
        c, scale = self.loss.huber_c, self.loss.huber_scale
        if self.loss.huber_schedule == "constant":
            return torch.full_like(timesteps, c * scale, dtype=torch.float32)
        return scale * torch.exp(math.log(c) / _STEPS * timesteps.float())


class FlowMatching(Objective):
    """The target is the velocity v = e - x_0, or with `sigma_scaled` the image x_0 = x_t - t v."""

    def __init__(self, options: FlowOptions):
        self.options = options

    def draw(self, generators: list[torch.Generator], noise: NoiseOptions, latents: torch.Tensor) -> torch.Tensor:
        low, high = noise.min_timestep, noise.max_timestep
        return low + (high - low) * draw(generators, self.options, latents.shape)

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        t = _broadcast(timesteps, latents)
        return (1 - t) * latents + t * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return latents if self.options.sigma_scaled else noise - latents

    def compared(self, predicted: torch.Tensor, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return noisy - _broadcast(timesteps, noisy) * predicted if self.options.sigma_scaled else predicted

    def tables(self, options: LossOptions, device: torch.device | str) -> FlowTables:
        return FlowTables(self.options, options)


def _broadcast(timesteps: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return moved(timesteps, like.device).float().view(-1, 1, 1, 1) / _STEPS
