"""The latent space of a VAE: its size, and the normalisation of latents for the denoiser."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class LatentSpace:
    """Normalised latents are (latents - shift) * scale.

    Args:
        channels: The number of latent channels.
        factor: Image pixels per latent pixel, along each side.
        scale: The VAE's scaling factor.
        shift: The VAE's shift factor, or 0 if it has none.
    """

    channels: int
    factor: int
    scale: float
    shift: float = 0.0

    @classmethod
    def of(cls, vae: Any) -> "LatentSpace":
        """The latent space of a diffusers VAE, from its config."""
        config = vae.config
        factor = 2 ** (len(config.block_out_channels) - 1)
        return cls(config.latent_channels, factor, config.scaling_factor, getattr(config, "shift_factor", None) or 0.0)

    def normalised(self, latents: torch.Tensor) -> torch.Tensor:
        """Normalise the VAE's latents (n, channels, h, w) for the denoiser."""
        return (latents - self.shift if self.shift else latents) * self.scale

    def unnormalised(self, latents: torch.Tensor) -> torch.Tensor:
        """The reverse of `normalised`: the denoiser's latents (n, channels, h, w) for the VAE's decoder."""
        return latents / self.scale + self.shift if self.shift else latents / self.scale
