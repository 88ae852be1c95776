"""Options that the parser knows and the program refuses: each with its reason."""

import argparse
from typing import Any

from lora_adapters.train.errors import OptionError

_DEEPSPEED = "DeepSpeed is not supported: an adapter's optimizer is small; use several devices through accelerate"
_FP8 = "float8 base weights are not supported; use --mixed_precision bf16"
_RESUME = "starting in the middle is not supported; use --resume with a saved state, which goes on exactly where it was"
UNSUPPORTED: dict[str, str] = {
    "deepspeed": _DEEPSPEED,
    "fp8_base": _FP8,
    "fp8_base_unet": _FP8,
    "initial_epoch": _RESUME,
    "initial_step": _RESUME,
    "skip_until_initial_step": _RESUME,
    "dataset_class": "other dataset classes are not supported; describe the data in --dataset_config",
    "debug_dataset": "showing pictures is not supported; use --dry_run for buckets, steps and captions",
}


def refuse(options: argparse.Namespace, defaults: dict[str, Any]) -> None:
    """Raise TrainingError for the first unsupported option that has another value than its default."""
    for name, reason in UNSUPPORTED.items():
        if getattr(options, name) != defaults[name]:
            raise OptionError(f"--{name}: {reason}")
