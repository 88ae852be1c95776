"""Computes the loss of a batch."""

from dataclasses import dataclass
from typing import Any

import torch

from lora_adapters.train.models.base import BaseModels
from lora_adapters.train.models.text_encoding import Encoded, Tokens
from lora_adapters.train.moving import moved
from lora_adapters.train.objective.losses import LossOptions, loss_per_sample
from lora_adapters.train.objective.noise import NoiseOptions, draw_noise, generator, perturbed
from lora_adapters.train.objective.objectives import Objective, objective


class Denoiser(torch.nn.Module):
    """Denoiser and text encoders as one module, so that accelerate wraps a single forward pass."""

    def __init__(self, models: BaseModels, clip_skip: int | None, train_text: bool):
        super().__init__()
        self.family = models.family
        self.add_module(self.family.denoiser, models.denoiser)
        self.text_encoders = torch.nn.ModuleList(models.text_encoders)
        self.clip_skip, self.train_text = clip_skip, train_text

    def forward(
        self,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        text: Encoded | list[Tokens],
        conditions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predict from noised latents.

        Args:
            noisy: (n, channels, h, w).
            timesteps: (n,).
            text: The outputs of the text encoders, or tokens for each of them.
            conditions: See `TrainingFamily.conditions`.

        Returns:
            The prediction, (n, channels, h, w).
        """
        encoded = text if isinstance(text, Encoded) else self.encode(text)
        return self.family.predict(getattr(self, self.family.denoiser), noisy, timesteps, encoded, conditions)

    def encode(self, tokens: list[Tokens]) -> Encoded:
        """Encode tokens, with gradients only if text encoders are trained."""
        with torch.set_grad_enabled(self.train_text and torch.is_grad_enabled()):
            return self.family.encode(tokens, list(self.text_encoders), self.clip_skip)


@dataclass(frozen=True)
class StepOptions:
    """The options that all steps of a run share. `chunks` is the number of windows of 75 tokens."""

    noise: NoiseOptions
    loss: LossOptions
    chunks: int = 1
    weighted_captions: bool = False


class StepLoss:
    """Computes the loss of batches. `denoiser` may be wrapped by accelerate.

    `schedule` is a DDPM schedule, or an `Objective` (flow matching). Nothing here synchronises with the device: copies
    to it are asynchronous, and no values are read back.
    """

    def __init__(self, models: BaseModels, denoiser: Any, schedule: Any, options: StepOptions, device: Any):
        self.models, self.denoiser, self.options, self.device = models, denoiser, options, device
        own = isinstance(schedule, Objective)
        self.objective = schedule if own else objective(options.loss.objective, schedule)
        self.tables = self.objective.tables(options.loss, device)

    def training(self, batch: Any) -> torch.Tensor:
        """The mean loss of a batch, for the backward pass. Each sample's seed decides its timestep and noise."""
        seeds = batch.sample_seeds.tolist()
        latents = self.latents(batch, [generator("latents", seed) for seed in seeds])
        generators = [generator("noise", seed) for seed in seeds]
        timesteps = self.objective.draw(generators, self.options.noise, latents)
        losses = self._losses(batch, latents, timesteps, generators, self.text(batch))
        return (losses * moved(batch.loss_weights, losses)).mean()

    @torch.no_grad()
    def held_out(self, batch: Any, timesteps: list[int]) -> torch.Tensor:
        """Losses (n,) of a batch, averaged over `timesteps`. The noise depends on the sample's seed and timestep."""
        latents, text = self.latents(batch, None), self.text(batch)
        if not isinstance(text, Encoded):
            text = self.denoiser_module.encode(text)
        total = torch.zeros(len(latents), device=self.device)
        for timestep in timesteps:
            generators = [generator("held out", seed, timestep) for seed in batch.sample_seeds.tolist()]
            total += self._losses(batch, latents, torch.full((len(latents),), timestep), generators, text)
        return total / len(timesteps)

    @property
    def denoiser_module(self) -> Denoiser:
        return getattr(self.denoiser, "module", self.denoiser)

    def _losses(
        self,
        batch: Any,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        generators: list[torch.Generator],
        text: Encoded | list[Tokens],
    ) -> torch.Tensor:
        noise = draw_noise(latents, generators, self.options.noise)
        timesteps = moved(timesteps, self.device)
        noisy = self.objective.noised(latents, perturbed(noise, generators, self.options.noise), timesteps)
        # Without gradients the DDP wrapper, which communicates between processes at every call, is not needed.
        denoiser = self.denoiser if torch.is_grad_enabled() else self.denoiser_module
        conditions = self.models.family.conditions(batch, self.models)
        if conditions is not None:
            conditions = moved(conditions, self.device)
        predicted = self.objective.compared(denoiser(noisy, timesteps, text, conditions), noisy, timesteps)
        target = self.objective.target(latents, noise, timesteps)
        return loss_per_sample(predicted, target, timesteps, self.tables, self.options.loss.loss_type, batch.masks)

    @torch.no_grad()
    def latents(self, batch: Any, generators: list[torch.Generator] | None) -> torch.Tensor:
        """Normalised latents (n, channels, h, w) in float32, cached or from the VAE (its mean if no generators)."""
        if batch.latents is not None:
            latents = moved(batch.latents, self.device, torch.float32)
            if self.models.family.latent_files.normalised:
                return latents
        else:
            vae = self.models.vae
            posterior = vae.encode(moved(batch.images, self.device, vae.dtype)).latent_dist
            latents = posterior.mean.float()
            if generators is not None:
                noise = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in generators])
                latents = latents + posterior.std.float() * moved(noise, latents)
        return self.models.latent_space.normalised(latents)

    def text(self, batch: Any) -> Encoded | list[Tokens]:
        """The cached outputs of the text encoders, or tokens."""
        if batch.text is not None:
            return self.models.family.from_cache(batch.text).to(self.device)
        return self.models.tokenize(list(batch.captions), self.options.chunks, self.options.weighted_captions)
