"""Applies options that save memory or time, and refuses options that this machine does not support."""

import logging

import torch
from diffusers.hooks import apply_layerwise_casting
from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN

from lora_adapters.compat import checkpoint_activations
from lora_adapters.train.errors import OptionError, TrainingError
from lora_adapters.train.models.base import BaseModels
from lora_adapters.train.models.block_swap import check_block_swap
from lora_adapters.train.models.quantised import bitsandbytes
from lora_adapters.train.options.settings import Settings

log = logging.getLogger(__name__)

ATTENTION = ("mem_eff_attn", "xformers", "sdpa")


def attention(settings: Settings) -> str | None:
    """The chosen attention option; if several are given, the one that kohya's trainer uses."""
    return next((name for name in ATTENTION if getattr(settings, name)), None)


def check_machine(settings: Settings) -> None:
    """Raise TrainingError for options that this machine does not support, and OptionError for contradictions."""
    chosen = attention(settings)
    for name in ATTENTION:
        if getattr(settings, name) and name != chosen:
            log.warning("--%s has no effect together with --%s", name, chosen)
    for full, precision in ((settings.full_bf16, "bf16"), (settings.full_fp16, "fp16")):
        if full and settings.mixed_precision != precision:
            raise OptionError(f"--full_{precision} needs --mixed_precision {precision}")
    if settings.full_fp16:
        log.warning(
            "--full_fp16: the adapter's weights, gradients and optimizer state stay in fp32, to avoid underflow; "
            "frozen weights and the forward pass are in fp16, as with --mixed_precision fp16 alone"
        )
    if settings.quantize_base:
        if settings.fp8_base or settings.fp8_base_unet:
            raise OptionError("--quantize_base and --fp8_base exclude each other")
        bitsandbytes()
    check_block_swap(settings)
    instead = {}
    if settings.mixed_precision == "fp16":
        instead["--mixed_precision fp16"] = "--mixed_precision bf16 or no"
    if chosen == "xformers":
        instead["--xformers"] = "--sdpa"
    if instead and not torch.cuda.is_available():
        need = f"need{'s' if len(instead) == 1 else ''} a CUDA device"
        raise TrainingError(f"{' and '.join(instead)} {need}; use {' and '.join(instead.values())}")
    if chosen == "xformers":
        try:
            import xformers  # noqa: F401
        except ImportError:
            raise TrainingError("--xformers: the package xformers is not installed; use --sdpa") from None


def apply_memory_options(models: BaseModels, settings: Settings, trained_text: bool) -> None:
    """Set the attention kernels and gradient checkpointing. Call it before adapters are injected.

    Checkpointing is active in modules in training mode only; see `set_training`.

    Args:
        models: The base model, changed in place.
        settings: The settings of the run.
        trained_text: Whether text encoders are trained, so that they need checkpointing.

    Raises:
        TrainingError: The denoiser does not support --mem_eff_attn.
    """
    chosen = attention(settings)
    if chosen == "mem_eff_attn" and not hasattr(models.denoiser, "set_attention_slice"):
        title = models.family.denoiser_title
        raise TrainingError(f"--mem_eff_attn: the {title} does not support sliced attention; leave it out")
    if chosen == "xformers":
        models.denoiser.enable_xformers_memory_efficient_attention()
        models.vae.enable_xformers_memory_efficient_attention()
    elif chosen == "mem_eff_attn":
        models.denoiser.set_attention_slice("auto")
    elif chosen == "sdpa" and hasattr(models.denoiser, "set_attention_slice"):  # other models always use SDPA
        from diffusers.models.attention_processor import AttnProcessor2_0

        models.denoiser.set_attn_processor(AttnProcessor2_0())
    if settings.gradient_checkpointing:
        models.denoiser.enable_gradient_checkpointing()
        for encoder in models.text_encoders if trained_text else ():
            checkpoint_activations(encoder)


def keep_in_float8(models: BaseModels, settings: Settings) -> None:
    """With --fp8_base, store the weights of the denoiser's linear layers in float8 and cast each layer for its forward
    pass.

    Norms and position embeddings keep their dtype, as in diffusers. So do convolutions, whose backward pass needs the
    weight again. Call it after adapters are injected; their weights are not converted.

    Args:
        models: The base model, changed in place.
        settings: The settings of the run.
    """
    if not (settings.fp8_base or settings.fp8_base_unet):
        return
    if not settings.gradient_checkpointing:
        log.warning(
            "--fp8_base saves no memory without --gradient_checkpointing: the weights of all layers are kept in the "
            "run's precision until the backward pass"
        )
    own = tuple(getattr(models.denoiser, "_skip_layerwise_casting_patterns", None) or ())
    apply_layerwise_casting(
        models.denoiser,
        torch.float8_e4m3fn,
        weight_type(settings.mixed_precision),
        skip_modules_pattern=(*DEFAULT_SKIP_MODULES_PATTERN, *own, "lora_"),
        skip_modules_classes=(torch.nn.Conv2d,),
    )


def set_training(models: BaseModels, training: bool, text: bool) -> None:
    """Set training or evaluation mode of the denoiser, and with `text` also of the text encoders."""
    models.denoiser.train(training)
    for encoder in models.text_encoders:
        encoder.train(training and text)


def weight_type(mixed_precision: str) -> torch.dtype:
    """The dtype of frozen weights for a --mixed_precision."""
    return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[mixed_precision]
