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
    """A number of steps: "100", or a share of the run: "0.1" or "10%"."""
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
    max_train_steps: int = option(1600, "optimizer steps", at_least=1)
    max_train_epochs: int | None = option(None, "epochs; wins over --max_train_steps", at_least=1, inert=(ZERO,))
    gradient_accumulation_steps: int = option(1, "batches an optimizer step", at_least=1, metadata=True)
    max_grad_norm: float = option(1.0, "clip gradients to this norm; 0: not at all", metadata=True)
    max_data_loader_n_workers: int = option(8, "processes that read images (at most one a core)", at_least=0)
    persistent_data_loader_workers: bool = option(False, "keep these processes from epoch to epoch")
    initial_epoch: int | None = option(
        None,
        "start in this epoch",
        unsupported=_RESUME,
        inert=(Inert(lambda value, _: value in (0, 1), "a run starts there anyway"),),
    )
    initial_step: int | None = option(
        None,
        "start at this step",
        unsupported=_RESUME,
        inert=(Inert(lambda value, _: value == 0, "a run starts there anyway"),),
    )
    skip_until_initial_step: bool = option(
        False,
        "skip the images before the initial step",
        unsupported=_RESUME,
        inert=(Inert(lambda _, settings: _starts_at_first(settings), "there is no initial step to skip to"),),
    )
    dry_run: bool = option(False, "load everything, print what would be trained, train nothing")


@dataclass
class OptimizerOptions:
    """The optimizer and the learning rate over time."""

    title: ClassVar[str] = "optimizer and schedule"
    optimizer_type: str = option("", "AdamW, AdamW8bit, Lion, Prodigy, ... or a dotted class name", unset="AdamW")
    optimizer_args: list[str] | dict[str, Any] | None = option(
        None, "arguments of the optimizer, as Python literals", metavar="KEY=VALUE"
    )
    use_8bit_adam: bool = option(False, "the same as --optimizer_type AdamW8bit")
    use_lion_optimizer: bool = option(False, "the same as --optimizer_type Lion")
    fused_backward_pass: bool = option(
        False,
        "accepted; an adapter's few weights are stepped at once",
        inert=(Inert(lambda *_: True, "an adapter's few weights are stepped at once, as without it"),),
    )
    learning_rate: float = option(2.0e-6, "learning rate", metadata=True)
    unet_lr: float | None = option(None, "learning rate of the U-Net's adapter", unset="--learning_rate", metadata=True)
    text_encoder_lr: list[float] | None = option(
        None, "learning rate of the text encoders' adapters, one or all", unset="--learning_rate", metadata=True
    )
    ema_decay: float | None = option(
        None,
        "average the weights over the steps with this decay, such as 0.999: saved beside as NAME-ema, and what is "
        "sampled and measured",
        metadata=True,
        at_least=0,
        at_most=1,
        inert=(ZERO,),
    )
    lr_scheduler: str = option(
        "constant", "linear, cosine, cosine_with_restarts, polynomial, constant, ...", metadata=True
    )
    lr_scheduler_type: str = option("", "dotted name of a scheduler class; wins over --lr_scheduler")
    lr_scheduler_args: list[str] | dict[str, Any] | None = option(
        None, "arguments of --lr_scheduler_type", metavar="KEY=VALUE"
    )
    lr_warmup_steps: int | float = option(
        0, "warm-up: steps, a share of the run (0.1) or 10%", parse=steps, metadata=True
    )
    lr_decay_steps: int | float = option(0, "decay of warmup_stable_decay, written like the warm-up", parse=steps)
    lr_scheduler_num_cycles: int = option(1, "cycles of cosine_with_restarts")
    lr_scheduler_power: float = option(1, "power of polynomial")
    lr_scheduler_timescale: int | None = option(
        None, "time scale of inverse_sqrt", unset="the warm-up", at_least=1, inert=(ZERO,)
    )
    lr_scheduler_min_lr_ratio: float | None = option(
        None, "lowest rate of cosine_with_min_lr, warmup_stable_decay", unset="0"
    )


@dataclass
class LossOptions:
    """What is minimised, and the noise that is added to the latents."""

    title: ClassVar[str] = "loss and noise"
    prior_loss_weight: float = option(1.0, "weight of the loss on regularisation images", metadata=True)
    min_snr_gamma: float | None = option(None, "min-SNR weighting of timesteps; 5 is usual", metadata=True)
    noise_offset: float | None = option(None, "strength of noise that is constant over a channel", metadata=True)
    noise_offset_random_strength: bool = option(False, "draw that strength between 0 and --noise_offset", metadata=True)
    adaptive_noise_scale: float | None = option(
        None,
        "add this times the latents' absolute mean to the noise offset",
        metadata=True,
        inert=(Inert(lambda _, settings: not settings.noise_offset, "it has no effect without --noise_offset"),),
    )
    multires_noise_iterations: int | None = option(None, "levels of multi-resolution noise", metadata=True)
    multires_noise_discount: float = option(0.3, "strength of each level against the last", metadata=True)
    ip_noise_gamma: float | None = option(
        None, "input perturbation: extra noise that is not to be predicted", metadata=True
    )
    ip_noise_gamma_random_strength: bool = option(
        False, "draw that strength between 0 and --ip_noise_gamma", metadata=True
    )
    zero_terminal_snr: bool = option(False, "rescale the noise schedule to end in pure noise", metadata=True)
    min_timestep: int | None = option(None, "lowest timestep", unset="0")
    max_timestep: int | None = option(None, "timesteps stay below this", unset="1000")
    loss_type: str = option("l2", "loss", choices=["l1", "l2", "huber", "smooth_l1"], metadata=True)
    huber_schedule: str = option(
        "snr",
        "Huber's c over time",
        choices=["constant", "exponential", "snr"],
        metadata=True,
        unread=lambda settings: settings.loss_type not in _HUBER,
    )
    huber_c: float = option(
        0.1,
        "Huber's c",
        metadata=True,
        above=0,
        inert=(
            Inert(
                lambda value, settings: value <= 0 and settings.loss_type not in _HUBER,
                "it has no effect with --loss_type {settings.loss_type}",
            ),
        ),
    )
    huber_scale: float = option(1.0, "scale of c (schedules constant and exponential)", metadata=True)
    scale_v_pred_loss_like_noise_pred: bool = option(False, "weight the v loss as the noise loss would be")
    v_pred_like_loss: float | None = option(None, "add this much of a v-like loss to the noise loss")
    debiased_estimation_loss: bool = option(
        False, "debiased estimation weighting of timesteps", metadata="ss_debiased_estimation"
    )
    masked_loss: bool = option(False, "multiply the loss by the images' masks")
    weighted_captions: bool = option(False, "captions with weights: (word:1.3), (word), [word]")


@dataclass
class TrainingOptions(StepOptions, OptimizerOptions, LossOptions):
    """How it is trained."""
