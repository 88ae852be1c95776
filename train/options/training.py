"""Command-line options: steps, optimizer, schedule, loss and noise."""

import argparse

from lora_adapters.convert.parsing import number
from lora_adapters.train.options.parser import adders


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


def add_steps(group: argparse._ArgumentGroup) -> None:
    flag, option = adders(group)
    option("--max_train_steps", type=int, default=1600, help="optimizer steps")
    option("--max_train_epochs", type=int, help="epochs; wins over --max_train_steps")
    option("--gradient_accumulation_steps", type=int, default=1, help="batches an optimizer step")
    option("--max_grad_norm", type=number, default=1.0, help="clip gradients to this norm; 0: not at all")
    option("--max_data_loader_n_workers", type=int, default=8, help="processes that read pictures (at most one a core)")
    flag("--persistent_data_loader_workers", help="keep these processes from epoch to epoch")
    option("--initial_epoch", type=int, help="start in this epoch")
    option("--initial_step", type=int, help="start at this step")
    flag("--skip_until_initial_step", help="skip the pictures before the initial step")
    flag("--dry_run", help="load everything, print what would be trained, train nothing")


def add_optimizer(group: argparse._ArgumentGroup) -> None:
    flag, option = adders(group)
    option("--optimizer_type", default="", help="AdamW (default), AdamW8bit, Lion, Prodigy, ... or a dotted class name")
    option("--optimizer_args", nargs="*", metavar="KEY=VALUE", help="arguments of the optimizer, as Python literals")
    flag("--use_8bit_adam", help="the same as --optimizer_type AdamW8bit")
    flag("--use_lion_optimizer", help="the same as --optimizer_type Lion")
    flag("--fused_backward_pass", help="accepted; an adapter's few weights are stepped at once")
    option("--learning_rate", type=number, default=2.0e-6, help="learning rate")
    option("--unet_lr", type=number, help="learning rate of the U-Net's adapter")
    option("--text_encoder_lr", type=number, nargs="*", help="learning rate of the text encoders' adapters, one or all")
    option("--lr_scheduler", default="constant", help="linear, cosine, cosine_with_restarts, polynomial, constant, ...")
    option("--lr_scheduler_type", default="", help="dotted name of a scheduler class; wins over --lr_scheduler")
    option("--lr_scheduler_args", nargs="*", metavar="KEY=VALUE", help="arguments of --lr_scheduler_type")
    option("--lr_warmup_steps", type=steps, default=0, help="warm-up: steps, a share of the run (0.1) or 10%%")
    option("--lr_decay_steps", type=steps, default=0, help="decay of warmup_stable_decay, written like the warm-up")
    option("--lr_scheduler_num_cycles", type=int, default=1, help="cycles of cosine_with_restarts")
    option("--lr_scheduler_power", type=number, default=1, help="power of polynomial")
    option("--lr_scheduler_timescale", type=int, help="time scale of inverse_sqrt (default: the warm-up)")
    option("--lr_scheduler_min_lr_ratio", type=number, help="lowest rate of cosine_with_min_lr, warmup_stable_decay")


def add_loss(group: argparse._ArgumentGroup) -> None:
    flag, option = adders(group)
    option("--prior_loss_weight", type=number, default=1.0, help="weight of the loss on regularisation pictures")
    option("--min_snr_gamma", type=number, help="min-SNR weighting of timesteps; 5 is usual")
    option("--noise_offset", type=number, help="strength of noise that is constant over a channel")
    flag("--noise_offset_random_strength", help="draw that strength between 0 and --noise_offset")
    option("--adaptive_noise_scale", type=number, help="add this times the latents' absolute mean to the noise offset")
    option("--multires_noise_iterations", type=int, help="levels of multi-resolution noise")
    option("--multires_noise_discount", type=number, default=0.3, help="strength of each level against the last")
    option("--ip_noise_gamma", type=number, help="input perturbation: extra noise that is not to be predicted")
    flag("--ip_noise_gamma_random_strength", help="draw that strength between 0 and --ip_noise_gamma")
    flag("--zero_terminal_snr", help="rescale the noise schedule to end in pure noise")
    option("--min_timestep", type=int, help="lowest timestep (default 0)")
    option("--max_timestep", type=int, help="timesteps stay below this (default 1000)")
    option("--loss_type", default="l2", choices=["l1", "l2", "huber", "smooth_l1"], help="loss")
    option("--huber_schedule", default="snr", choices=["constant", "exponential", "snr"], help="Huber's c over time")
    option("--huber_c", type=number, default=0.1, help="Huber's c")
    option("--huber_scale", type=number, default=1.0, help="scale of c (schedules constant and exponential)")
    flag("--scale_v_pred_loss_like_noise_pred", help="weight the v loss as the noise loss would be")
    option("--v_pred_like_loss", type=number, help="add this much of a v-like loss to the noise loss")
    flag("--debiased_estimation_loss", help="debiased estimation weighting of timesteps")
    flag("--masked_loss", help="multiply the loss by the pictures' masks")
    flag("--weighted_captions", help="captions with weights: (word:1.3), (word), [word]")
