"""Options: steps, optimizer, schedule, loss and noise."""

import argparse
from dataclasses import dataclass
from typing import Any, ClassVar

from lora_adapters.convert.parsing import number
from lora_adapters.train.options.model import ZERO
from lora_adapters.train.options.option import Inert, option

_RESUME = (
    "starting in the middle is not supported; use --resume with a saved state, which continues exactly where it was"
)
_HUBER = ("huber", "smooth_l1")


def steps(text: str) -> int | float:
    """Parse a number of steps ("100") or a share of the run ("0.1" or "10%")."""
    try:
        if text.endswith("%"):
            return number(text[:-1]) / 100
        count = number(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of steps, a share below 1, or a percentage"
        ) from None
    if count < 0 or (count >= 1 and count != int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of steps, a share below 1, or a percentage")
    return int(count) if count >= 1 or count == 0 else count


def _starts_at_first(settings: Any) -> bool:
    return settings.initial_epoch is None and settings.initial_step is None


@dataclass
class StepOptions:
    """How long to train."""

    title: ClassVar[str] = "steps"
    max_train_steps: int = option(1600, "number of optimizer steps", at_least=1)
    max_train_epochs: int | None = option(
        None, "number of epochs; overrides --max_train_steps", at_least=1, inert=(ZERO,)
    )
    gradient_accumulation_steps: int = option(1, "batches per optimizer step", at_least=1, metadata=True)
    max_grad_norm: float = option(1.0, "clip gradients to this norm; 0 disables clipping", metadata=True)
    max_data_loader_n_workers: int = option(8, "data loader processes, at most one per core", at_least=0)
    persistent_data_loader_workers: bool = option(False, "keep the data loader processes between epochs")
    initial_epoch: int | None = option(
        None,
        "epoch to start from",
        unsupported=_RESUME,
        inert=(Inert(lambda value, _: value in (0, 1), "a run starts there anyway"),),
    )
    initial_step: int | None = option(
        None,
        "step to start from",
        unsupported=_RESUME,
        inert=(Inert(lambda value, _: value == 0, "a run starts there anyway"),),
    )
    skip_until_initial_step: bool = option(
        False,
        "skip the images before the initial step",
        unsupported=_RESUME,
        inert=(Inert(lambda _, settings: _starts_at_first(settings), "there is no initial step to skip to"),),
    )
    dry_run: bool = option(False, "load everything and print what would be trained, without training")


@dataclass
class OptimizerOptions:
    """The optimizer and the learning rate over time."""

    title: ClassVar[str] = "optimizer and schedule"
    optimizer_type: str = option(
        "", "AdamW, AdamW8bit, Lion, Prodigy, ... or a class (package.module.Class)", unset="AdamW"
    )
    optimizer_args: list[str] | dict[str, Any] | None = option(
        None, "optimizer arguments; values are Python literals", metavar="KEY=VALUE"
    )
    use_8bit_adam: bool = option(False, "the same as --optimizer_type AdamW8bit")
    use_lion_optimizer: bool = option(False, "the same as --optimizer_type Lion")
    fused_backward_pass: bool = option(
        False,
        "accepted; has no effect, since an adapter has few weights",
        inert=(Inert(lambda *_: True, "an adapter's few weights are stepped at once, as without it"),),
    )
    learning_rate: float = option(2.0e-6, "learning rate", metadata=True)
    unet_lr: float | None = option(
        None, "learning rate of the U-Net's or transformer's adapter", unset="--learning_rate", metadata=True
    )
    text_encoder_lr: list[float] | None = option(
        None,
        "learning rate of the text encoders' adapters: one for all, or one for each",
        unset="--learning_rate",
        metadata=True,
    )
    ema_decay: float | None = option(
        None,
        "keep an exponential moving average (EMA) of the weights with this decay, such as 0.999; it is saved as "
        "NAME-ema, and used for sample images and validation",
        metadata=True,
        at_least=0,
        at_most=1,
        inert=(ZERO,),
    )
    lr_scheduler: str = option(
        "constant",
        "learning rate scheduler: linear, cosine, cosine_with_restarts, polynomial, constant, ...",
        metadata=True,
    )
    lr_scheduler_type: str = option("", "scheduler class (package.module.Class); overrides --lr_scheduler")
    lr_scheduler_args: list[str] | dict[str, Any] | None = option(
        None, "arguments of --lr_scheduler_type", metavar="KEY=VALUE"
    )
    lr_warmup_steps: int | float = option(
        0, "warmup: a number of steps, or a share of all steps (0.1 or 10%)", parse=steps, metadata=True
    )
    lr_decay_steps: int | float = option(0, "decay of warmup_stable_decay, given like --lr_warmup_steps", parse=steps)
    lr_scheduler_num_cycles: int = option(1, "number of cycles of cosine_with_restarts")
    lr_scheduler_power: float = option(1, "power of the polynomial scheduler")
    lr_scheduler_timescale: int | None = option(
        None, "timescale of inverse_sqrt", unset="the warmup steps", at_least=1, inert=(ZERO,)
    )
    lr_scheduler_min_lr_ratio: float | None = option(
        None, "minimum of cosine_with_min_lr and warmup_stable_decay, as a ratio of the learning rate", unset="0"
    )


@dataclass
class LossOptions:
    """The loss, and the noise that is added to the latents."""

    title: ClassVar[str] = "loss and noise"
    prior_loss_weight: float = option(1.0, "loss weight of regularisation images", metadata=True)
    min_snr_gamma: float | None = option(None, "gamma of Min-SNR loss weighting; 5 is usual", metadata=True)
    noise_offset: float | None = option(
        None, "noise offset: strength of extra noise that is constant within each channel", metadata=True
    )
    noise_offset_random_strength: bool = option(
        False, "choose the strength at random between 0 and --noise_offset", metadata=True
    )
    adaptive_noise_scale: float | None = option(
        None,
        "add this factor times the absolute mean of the latents to the noise offset",
        metadata=True,
        inert=(Inert(lambda _, settings: not settings.noise_offset, "it has no effect without --noise_offset"),),
    )
    multires_noise_iterations: int | None = option(None, "number of levels of multi-resolution noise", metadata=True)
    multires_noise_discount: float = option(
        0.3, "multi-resolution noise: strength of each level relative to the previous one", metadata=True
    )
    ip_noise_gamma: float | None = option(
        None, "input perturbation: strength of extra noise that is not part of the target", metadata=True
    )
    ip_noise_gamma_random_strength: bool = option(
        False, "choose the strength at random between 0 and --ip_noise_gamma", metadata=True
    )
    zero_terminal_snr: bool = option(False, "rescale the noise schedule to zero terminal SNR", metadata=True)
    min_timestep: int | None = option(None, "minimum timestep in training", unset="0")
    max_timestep: int | None = option(None, "timesteps in training are below this", unset="1000")
    loss_type: str = option("l2", "loss function", choices=["l1", "l2", "huber", "smooth_l1"], metadata=True)
    huber_schedule: str = option(
        "snr",
        "how c of the Huber loss depends on the timestep",
        choices=["constant", "exponential", "snr"],
        metadata=True,
        unread=lambda settings: settings.loss_type not in _HUBER,
    )
    huber_c: float = option(
        0.1,
        "c of the Huber and smooth L1 losses",
        metadata=True,
        above=0,
        inert=(
            Inert(
                lambda value, settings: value <= 0 and settings.loss_type not in _HUBER,
                "it has no effect with --loss_type {settings.loss_type}",
            ),
        ),
    )
    huber_scale: float = option(1.0, "scale of c, for the schedules constant and exponential", metadata=True)
    scale_v_pred_loss_like_noise_pred: bool = option(
        False, "v-prediction: weight the loss like that of noise prediction"
    )
    v_pred_like_loss: float | None = option(
        None, "noise prediction: add a loss like that of v-prediction, with this weight"
    )
    debiased_estimation_loss: bool = option(
        False, "debiased estimation loss weighting", metadata="ss_debiased_estimation"
    )
    masked_loss: bool = option(False, "multiply the loss by masks (see --alpha_mask and --conditioning_data_dir)")
    weighted_captions: bool = option(False, "enable weights in captions: (word:1.3), (word), [word]")


@dataclass
class TrainingOptions(StepOptions, OptimizerOptions, LossOptions):
    """All options for training."""
