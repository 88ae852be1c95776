"""Options that trade speed for memory, put on the models; and what needs a GPU, refused without one."""

import argparse

import torch

from lora_adapters.train.base_models import BaseModels
from lora_adapters.train.errors import TrainingError


def check_machine(settings: argparse.Namespace) -> None:
    """Raise TrainingError for options that this machine cannot carry out, or that contradict each other."""
    if sum((settings.xformers, settings.sdpa, settings.mem_eff_attn)) > 1:
        raise TrainingError("give one of --xformers, --sdpa and --mem_eff_attn")
    if settings.full_bf16 and settings.mixed_precision != "bf16":
        raise TrainingError("--full_bf16 needs --mixed_precision bf16")
    if not torch.cuda.is_available():
        if settings.mixed_precision == "fp16":
            raise TrainingError("--mixed_precision fp16 needs a CUDA device; go on with --mixed_precision bf16 or no")
        if settings.xformers:
            raise TrainingError("--xformers needs a CUDA device; go on with --sdpa")
    if settings.xformers:
        try:
            import xformers  # noqa: F401
        except ImportError:
            raise TrainingError("--xformers: the package xformers is not installed; go on with --sdpa") from None


def apply_memory_options(models: BaseModels, settings: argparse.Namespace, trained_text: bool) -> None:
    """Attention kernels and gradient checkpointing. Call it before adapters are added.

    Checkpointing acts on modules in training mode only; `set_training` sees to that.
    """
    if settings.xformers:
        models.unet.enable_xformers_memory_efficient_attention()
        models.vae.enable_xformers_memory_efficient_attention()
    elif settings.mem_eff_attn:
        models.unet.set_attention_slice("auto")
    elif settings.sdpa:
        from diffusers.models.attention_processor import AttnProcessor2_0

        models.unet.set_attn_processor(AttnProcessor2_0())
    if settings.gradient_checkpointing:
        models.unet.enable_gradient_checkpointing()
        for encoder in models.text_encoders if trained_text else ():
            encoder.activation_checkpointing_enable()


def set_training(models: BaseModels, training: bool, text: bool) -> None:
    """Training mode for the U-Net, which gradients flow through in any case, and with `text` for text encoders."""
    models.unet.train(training)
    for encoder in models.text_encoders:
        encoder.train(training and text)


def weight_type(mixed_precision: str) -> torch.dtype:
    """The precision of frozen weights."""
    return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[mixed_precision]
