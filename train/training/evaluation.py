"""Measures held-out losses and draws sample images during training."""

import logging

import torch
from accelerate.utils import gather_object

from lora_adapters.convert.errors import first_line
from lora_adapters.train.training.checkpoints import Position
from lora_adapters.train.training.progress import Progress
from lora_adapters.train.training.samples import sample, write_samples
from lora_adapters.train.training.setup import Run
from lora_adapters.train.training.sorting import as_if_sorted
from lora_adapters.train.training.trackers import log_image
from lora_adapters.train.training.validation import HeldOut, held_out_losses

log = logging.getLogger(__name__)
_NAMES_SHOWN = 10


def measure(run: Run, measured: list[HeldOut], step: int, progress: Progress) -> None:
    """Measure the held-out loss if images are held out and it was not yet measured at this step."""
    data = run.data.validation
    if data is None or any(measurement.step == step for measurement in measured):
        return
    run.training_mode(False)
    most = run.settings.max_validation_steps
    with run.averaged(), as_if_sorted(run):
        now = held_out_losses(run.loss, data, list(run.trained.values()), step, run.accelerator, most)
    measured += now
    progress.held_out(step, {_name(measurement): measurement.loss for measurement in now})


def show_samples(run: Run, position: Position) -> None:
    """Draw sample images and write them to --output_dir and the logs. An error is logged, and training continues."""
    if run.accelerator.is_main_process:
        try:
            _draw(run, position)
        except Exception as error:  # out of memory, a full disk, a prompt that the pipeline refuses
            log.error("no sample images at step %d (%s)", position.step, first_line(error))
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    run.accelerator.wait_for_everyone()


def _draw(run: Run, position: Position) -> None:
    run.training_mode(False)
    with run.averaged(), as_if_sorted(run):
        image = sample(run.models, run.settings, run.prompts, run.accelerator.device, run.accelerator.autocast)
    run.samples = write_samples(image, run.settings, f"{run.settings.output_name or 'sample'}-step{position.step:08d}")
    log_image(run.accelerator, "samples", image, position.step)


def name_damaged(run: Run) -> dict[str, str]:
    """The images that any process could not use: name -> reason. Every process must call it, at the end of a run."""
    damaged = dict(gather_object(list(run.data.damaged.items())))
    if damaged and run.accelerator.is_main_process:
        names = sorted(damaged)[:_NAMES_SHOWN] + (["..."] if len(damaged) > _NAMES_SHOWN else [])
        log.warning("%d images could not be used and were replaced by others: %s", len(damaged), ", ".join(names))
    return damaged


def _name(measurement: HeldOut) -> str:
    return "loss/validation" if measurement.rank is None else f"loss/validation_rank{measurement.rank}"
