"""The space that a family's denoiser works in: what a VAE's latents are, and how they are normalised."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class LatentSpace:
    """Normalised latents are (latents - shift) * scale.

    Args:
        channels: of a latent.
        factor: pixels of the image per latent, along each side.
        scale: the VAE's scaling factor.
        shift: the VAE's shift factor, 0 where it has none.
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
        """The VAE's latents (n, channels, h, w) as the denoiser reads them."""
        return (latents - self.shift if self.shift else latents) * self.scale

    def unnormalised(self, latents: torch.Tensor) -> torch.Tensor:
        """The reverse: the denoiser's latents (n, channels, h, w) as the VAE decodes them."""
        return latents / self.scale + self.shift if self.shift else latents / self.scale
