"""Timestep and noise sampling for a training step. All random numbers depend only on (seed, number of the sample).

Each sample of the run has its own generator on the CPU. So the n-th sample of a run gets the same noise on every
device, with every batch size and number of processes, and after resuming.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lora_adapters.train.moving import moved
from lora_adapters.train.options.settings import Settings
from lora_adapters.train.seeding import derive


@dataclass(frozen=True)
class NoiseOptions:
    """The options of the noise, named as on the command line."""

    min_timestep: int = 0
    max_timestep: int = 1000
    noise_offset: float | None = None
    noise_offset_random_strength: bool = False
    adaptive_noise_scale: float | None = None
    multires_noise_iterations: int | None = None
    multires_noise_discount: float = 0.3
    ip_noise_gamma: float | None = None
    ip_noise_gamma_random_strength: bool = False

    @classmethod
    def of(cls, settings: Settings) -> "NoiseOptions":
        """The noise options in the settings of a run."""
        return cls(
            min_timestep=settings.min_timestep or 0,
            max_timestep=1000 if settings.max_timestep is None else settings.max_timestep,
            noise_offset=settings.noise_offset,
            noise_offset_random_strength=settings.noise_offset_random_strength,
            adaptive_noise_scale=settings.adaptive_noise_scale,
            multires_noise_iterations=settings.multires_noise_iterations,
            multires_noise_discount=settings.multires_noise_discount,
            ip_noise_gamma=settings.ip_noise_gamma,
            ip_noise_gamma_random_strength=settings.ip_noise_gamma_random_strength,
        )


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator whose seed depends only on `key`."""
    return torch.Generator().manual_seed(derive(*key))


def draw_timesteps(generators: list[torch.Generator], options: NoiseOptions) -> torch.Tensor:
    """Draw one timestep per sample, (n,), uniformly from min_timestep <= t < max_timestep."""
    low, high = options.min_timestep, options.max_timestep
    return torch.cat([torch.randint(low, high, (1,), generator=g) for g in generators])


def draw_noise(latents: torch.Tensor, generators: list[torch.Generator], options: NoiseOptions) -> torch.Tensor:
    """Draw the noise (n, channels, height, width) that is the target, with offset and multi-resolution noise."""
    noise = _normal(latents, generators)
    if options.noise_offset:
        strength = _strength(options.noise_offset, options.noise_offset_random_strength, generators, latents)
        if options.adaptive_noise_scale:
            mean = latents.mean(dim=(2, 3), keepdim=True).abs()
            strength = (strength + options.adaptive_noise_scale * mean).clamp(min=0)
        channels = torch.stack([torch.randn(latents.shape[1], 1, 1, generator=g) for g in generators])
        noise = noise + strength * moved(channels, latents)
    if options.multires_noise_iterations:
        levels, discount = options.multires_noise_iterations, options.multires_noise_discount
        parts = [multires(part, levels, discount, g) for part, g in zip(noise, generators, strict=True)]
        noise = torch.stack(parts)
    return noise


def perturbed(noise: torch.Tensor, generators: list[torch.Generator], options: NoiseOptions) -> torch.Tensor:
    """The noise that is added to the latents: `noise`, and with ip_noise_gamma more that is not in the target."""
    if not options.ip_noise_gamma:
        return noise
    strength = _strength(options.ip_noise_gamma, options.ip_noise_gamma_random_strength, generators, noise)
    return noise + strength * _normal(noise, generators)


def multires(noise: torch.Tensor, levels: int, discount: float, generator: torch.Generator) -> torch.Tensor:
    """Multi-resolution noise: add increasingly coarse noise, and scale the sum to a standard deviation of 1.

    Layer i has the strength discount^i and is r^i times coarser, with r drawn from [2, 4). The last layer is the first
    one with a side of one pixel.

    Args:
        noise: (channels, height, width).
        levels: The largest number of layers.
        discount: The strength of a layer relative to the one before.
        generator: Draws the layers, on the CPU.

    Returns:
        (channels, height, width).
    """
    channels, height, width = noise.shape
    for level in range(levels):
        factor = (2 + 2 * torch.rand((), generator=generator).item()) ** level
        size = max(1, int(height / factor)), max(1, int(width / factor))
        coarse = torch.randn(1, channels, *size, generator=generator)
        layer = F.interpolate(coarse, (height, width), mode="bilinear")[0]
        noise = noise + discount**level * moved(layer, noise)
        if 1 in size:
            break
    return noise / noise.std()


def _normal(like: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
    return moved(torch.stack([torch.randn(like.shape[1:], generator=g) for g in generators]), like)


def _strength(
    strength: float, random: bool, generators: list[torch.Generator], like: torch.Tensor
) -> torch.Tensor | float:
    """`strength`, or if `random` a tensor (n, 1, 1, 1) of numbers between 0 and `strength` on the device of `like`."""
    if not random:
        return strength
    drawn = torch.stack([torch.rand((), generator=g) for g in generators])
    return moved((strength * drawn).view(-1, 1, 1, 1), like.device)


def signal_to_noise(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """SNR of each timestep (steps,): alpha-bar / (1 - alpha-bar), in float64."""
    alphas = alphas_cumprod.double()
    return alphas / (1 - alphas)


def velocity_share(snr: torch.Tensor) -> torch.Tensor:
    """snr / (snr + 1): the factor that turns the loss of v into the loss of the noise."""
    return snr / (snr + 1)


def huber_width(
    timesteps: torch.Tensor, alphas_cumprod: torch.Tensor, schedule: str, c: float, scale: float
) -> torch.Tensor:
    """The width c of the Huber loss at each timestep.

    Args:
        timesteps: (n,), integers.
        alphas_cumprod: (steps,), of the noise schedule.
        schedule: "constant" is c; "exponential" falls from 1 at timestep 0 to c at the last; "snr" is (1 - c) / (1 +
            sigma)^2 + c with sigma^2 = 1 / SNR.
        c: The smallest width.
        scale: Multiplies the widths of the first two schedules.

    Returns:
        (n,), float64.
    """
    if schedule == "constant":
        return torch.full(timesteps.shape, c * scale, dtype=torch.float64)
    if schedule == "exponential":
        return scale * torch.exp(math.log(c) / len(alphas_cumprod) * timesteps.double())
    sigma = signal_to_noise(alphas_cumprod)[timesteps].rsqrt()
    return (1 - c) / (1 + sigma) ** 2 + c
