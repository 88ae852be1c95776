"""Options: flow matching, and text encoding for transformers (Flux.1, SD3)."""

from dataclasses import dataclass
from typing import Any, ClassVar

from lora_adapters.train.options.model import ZERO
from lora_adapters.train.options.option import Inert, option

_POSITIONS = "positions are those that diffusers' transformer gives each size"


def _rate(what: str) -> Any:
    """An option for the dropout rate of a text encoder's output."""
    reason = "the outputs of single text encoders are not dropped: use caption_dropout_rate in the dataset file"
    case = Inert(lambda value, _: value == 0, "0 drops nothing")
    return option(None, f"dropout rate of {what}'s output", parse=float, unsupported=reason, inert=(case,))


@dataclass
class FlowOptions:
    """Flow matching."""

    title: ClassVar[str] = "flow matching (Flux.1, SD3)"
    timestep_sampling: str = option(
        "sigma",
        "how timesteps are sampled",
        choices=["sigma", "uniform", "sigmoid", "shift", "flux_shift"],
        metadata=True,
    )
    sigmoid_scale: float = option(
        1.0, "scale factor for --timestep_sampling sigmoid, shift and flux_shift", metadata=True
    )
    discrete_flow_shift: float = option(
        3.0, "shift of timesteps towards noise, for --timestep_sampling sigma and shift", above=0, metadata=True
    )
    training_shift: float = option(1.0, "SD3: shift of timesteps towards noise", above=0, metadata=True)
    model_prediction_type: str = option(
        "raw",
        "what the loss compares: the velocity (raw), or the image computed from it (sigma_scaled)",
        choices=["raw", "additive", "sigma_scaled"],
        metadata=True,
    )
    weighting_scheme: str | None = option(
        None,
        "distribution of timesteps for --timestep_sampling sigma (logit_normal, mode), or loss weighting for "
        "--model_prediction_type sigma_scaled (sigma_sqrt, cosmap)",
        unset="none",
        choices=["sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform"],
        metadata=True,
    )
    logit_mean: float = option(0.0, "mean for --weighting_scheme logit_normal", metadata=True)
    logit_std: float = option(1.0, "standard deviation for --weighting_scheme logit_normal", above=0, metadata=True)
    mode_scale: float = option(1.29, "scale for --weighting_scheme mode", metadata=True)
    guidance_scale: float = option(3.5, "guidance scale given to Flux.1 dev in training", metadata=True)
    t5xxl_max_token_length: int | None = option(
        None,
        "maximum number of T5 tokens in a caption",
        unset="512; Flux.1 schnell and SD3: 256",
        at_least=1,
        metadata=True,
    )
    apply_t5_attn_mask: bool = option(False, "mask T5's padding tokens in attention", metadata=True)
    apply_lg_attn_mask: bool = option(
        False,
        "SD3: mask CLIP's padding tokens in attention",
        unsupported="CLIP's padding is read, as diffusers' pipeline reads it",
    )
    pos_emb_random_crop_rate: float | None = option(
        None, "SD3.5: rate of randomly cropped position embeddings", unsupported=_POSITIONS, inert=(ZERO,)
    )
    enable_scaled_pos_embed: bool = option(
        False, "SD3.5: position embeddings scaled to the image size", unsupported=_POSITIONS
    )
    clip_l_dropout_rate: float | None = _rate("CLIP-L")
    clip_g_dropout_rate: float | None = _rate("CLIP-G")
    t5_dropout_rate: float | None = _rate("T5")
    blocks_to_swap: int | None = option(
        None,
        "number of transformer blocks whose weights stay in CPU memory, counted as in kohya's trainer; requires "
        "--gradient_checkpointing (CUDA)",
        at_least=1,
        inert=(ZERO,),
    )
    split_mode: bool = option(
        False, "train half of the model at a time", unsupported="give --blocks_to_swap, which is faster"
    )
