"""Encodes images and captions once, before training."""

import torch
from accelerate import Accelerator

from lora_adapters.train.data.cache_files import text_identity
from lora_adapters.train.data.dataset import TrainingData
from lora_adapters.train.errors import OptionError
from lora_adapters.train.models.base import BaseModels
from lora_adapters.train.objective.step_loss import Denoiser, StepOptions
from lora_adapters.train.options.settings import Settings


def cache(
    settings: Settings,
    models: BaseModels,
    denoiser: Denoiser,
    data: TrainingData,
    accelerator: Accelerator,
    options: StepOptions,
) -> None:
    """Encode images and captions in advance if the settings ask for it, and move models that are no longer needed to
    the CPU (except with --highvram).

    Args:
        settings: The settings of the run.
        models: The base model.
        denoiser: The denoiser together with the text encoders, which are removed from it if captions are encoded.
        data: The images.
        accelerator: Accelerate's `Accelerator`.
        options: The options of a step; only those for captions are used.

    Raises:
        OptionError: The text encoders are trained, so that their outputs cannot be cached.
    """
    place = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    check_disk = not settings.skip_cache_check
    away = "cpu" if not settings.highvram else accelerator.device
    if settings.cache_latents or settings.cache_latents_to_disk:
        data.cache_latents(
            models.vae,
            models.family.latent_files,
            to_disk=settings.cache_latents_to_disk,
            batch_size=settings.vae_batch_size,
            device=accelerator.device,
            check=check_disk,
            **place,
        )
        models.vae.to(away)
    if settings.cache_text_encoder_outputs or settings.cache_text_encoder_outputs_to_disk:
        if denoiser.train_text:
            raise OptionError("--cache_text_encoder_outputs needs --network_train_unet_only")
        widths = [encoder.config.hidden_size for encoder in models.text_encoders]

        @torch.no_grad()
        def encode(captions: list[str]) -> dict[str, torch.Tensor]:
            encoded = denoiser.encode(models.tokenize(captions, options.chunks, options.weighted_captions))
            return {name: part.float().cpu() for name, part in models.family.to_cache(encoded, widths).items()}

        made, to_disk = "", settings.cache_text_encoder_outputs_to_disk
        if to_disk:  # hashing all weights takes a while, and only cache files need the hash
            made = f"{text_identity(models.text_encoders)} clip_skip={settings.clip_skip} chunks={options.chunks}"
            made += " weighted" if options.weighted_captions else ""
        choices = models.choices
        if models.family.has_flow:
            made += f" t5={choices.t5_length} mask={choices.t5_mask}"
        ending = models.family.text_ending
        data.cache_text(encode, to_disk=to_disk, encoder=made, ending=ending, check=check_disk, **place)
        denoiser.text_encoders = torch.nn.ModuleList()  # accelerate would take them back to the device
        for encoder in models.text_encoders:
            encoder.to(away)
    accelerator.wait_for_everyone()
