"""Learning-rate schedules by name, from transformers, diffusers and PyTorch."""

from typing import Any

import torch

from lora_adapters.train.errors import OptionError, TrainingError
from lora_adapters.train.options.settings import Settings
from lora_adapters.train.options.values import did_you_mean
from lora_adapters.train.training.optimizers import find_class, literals, uses_relative_step

NAMES = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "cosine_with_min_lr", "warmup_stable_decay", "piecewise_constant",
)  # fmt: skip


def as_steps(value: int | float, total: int) -> int:
    """A number of steps unchanged, or a share of `total` (a float below 1) as a number of steps."""
    return int(value * total) if isinstance(value, float) and value < 1 else int(value)


def check_schedule(settings: Settings) -> None:
    """Raise TrainingError for a schedule that does not exist or contradicts other options."""
    name = settings.lr_scheduler
    if settings.lr_scheduler_type:
        return
    if name.startswith("adafactor") or uses_relative_step(settings):
        if not uses_relative_step(settings):
            raise OptionError("--lr_scheduler adafactor is for --optimizer_type AdaFactor with relative_step")
        return
    if name not in NAMES:
        raise OptionError(f"--lr_scheduler {name}: not one of {', '.join(NAMES)}{did_you_mean(name, NAMES)}")
    if name == "constant" and settings.lr_warmup_steps:
        raise TrainingError(
            "--lr_scheduler constant has no warm-up; use constant_with_warmup, or drop --lr_warmup_steps"
        )


def create_schedule(settings: Settings, optimizer: torch.optim.Optimizer, total: int) -> Any:
    """Create the schedule for `total` optimizer steps; call its `step()` after each."""
    check_schedule(settings)
    arguments = literals(settings.lr_scheduler_args, "lr_scheduler_args")
    if settings.lr_scheduler_type:
        kind = find_class(settings.lr_scheduler_type, "torch.optim.lr_scheduler")
        try:
            return kind(optimizer, **arguments)
        except (TypeError, ValueError) as error:
            raise TrainingError(f"{settings.lr_scheduler_type} does not accept these arguments: {error}") from None
    if uses_relative_step(settings):
        from transformers.optimization import AdafactorSchedule

        named = settings.lr_scheduler.partition(":")[2]
        return AdafactorSchedule(optimizer, float(named) if named else settings.learning_rate)
    return _named(settings, optimizer, total, arguments)


def _named(settings: Settings, optimizer: torch.optim.Optimizer, total: int, arguments: dict[str, Any]) -> Any:
    from diffusers.optimization import get_piecewise_constant_schedule
    from transformers import get_constant_schedule, get_constant_schedule_with_warmup, get_scheduler

    name = settings.lr_scheduler
    warmup, decay = as_steps(settings.lr_warmup_steps, total), as_steps(settings.lr_decay_steps, total)
    if name == "piecewise_constant":
        if "step_rules" not in arguments:
            raise TrainingError("--lr_scheduler piecewise_constant needs --lr_scheduler_args \"step_rules='1:10,0.1'\"")
        return get_piecewise_constant_schedule(optimizer, **arguments)
    # get_scheduler ignores the arguments of these two schedules.
    if name == "constant":
        return get_constant_schedule(optimizer, **arguments)
    if name == "constant_with_warmup":
        return get_constant_schedule_with_warmup(optimizer, warmup, **arguments)
    if name == "warmup_stable_decay" and warmup + decay > total:
        raise TrainingError(f"warm-up ({warmup}) and decay ({decay}) are longer than the run ({total} steps)")
    own = _schedule_options(settings, decay).get(name, {})
    return get_scheduler(name, optimizer, warmup, total, scheduler_specific_kwargs=own | arguments)


def _schedule_options(settings: Settings, decay: int) -> dict[str, dict[str, Any]]:
    """Options of the schedules as arguments of transformers' functions; schedules without options are absent."""
    lowest, cycles = settings.lr_scheduler_min_lr_ratio or 0.0, settings.lr_scheduler_num_cycles
    return {
        "cosine_with_restarts": {"num_cycles": cycles},
        "polynomial": {"power": settings.lr_scheduler_power},
        "inverse_sqrt": {"timescale": settings.lr_scheduler_timescale},
        "cosine_with_min_lr": {"num_cycles": cycles / 2, "min_lr_rate": lowest},
        "warmup_stable_decay": {"num_decay_steps": decay, "num_cycles": cycles / 2, "min_lr_ratio": lowest},
    }
