"""Saves adapters and states at steps, epochs and the end of a run, and resumes from a state."""

import errno
import glob
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lora_adapters.adapter import Adapter
from lora_adapters.convert.deltas.base import with_tensors
from lora_adapters.convert.errors import OneLineError, first_line
from lora_adapters.train.errors import TrainingError
from lora_adapters.train.training import adapters
from lora_adapters.train.training import checkpoints as files
from lora_adapters.train.training.checkpoints import Position
from lora_adapters.train.training.metadata import for_save
from lora_adapters.train.training.optimizers import settle_weights, weights_to_keep
from lora_adapters.train.training.setup import Run

log = logging.getLogger(__name__)

PATIENCE = (10, 60, 300)  # seconds between attempts at the last save

_PRECISION = {None: None, "float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def trained_adapter(run: Run, position: Position) -> Adapter:
    """The adapter with its present weights and the metadata of a save at this position."""
    epoch = position.epoch + (1 if position.batch else 0)
    metadata = for_save(run.metadata, run.settings, position.step, epoch)
    live = Adapter.from_models(run.trained, adapter_name=adapters.ADAPTER, metadata=metadata)
    return live.map(lambda change: with_tensors(change, lambda _, tensor: _copy(tensor)))


def save_at_step(run: Run, position: Position) -> None:
    """Save after a step, with the state if --save_state is set, and remove old step saves."""
    if _save(run, position, files.step_name(run.settings, position.step), run.settings.save_state):
        _prune(lambda: files.prune_steps(run.settings, run.output, position.step))


def save_at_epoch(run: Run, position: Position) -> None:
    """Save after an epoch, with the state if --save_state is set, and remove old epoch saves."""
    if _save(run, position, files.epoch_name(run.settings, position.epoch), run.settings.save_state):
        _prune(lambda: files.prune_epochs(run.settings, run.output, position.epoch, run.save_every_n_epochs or 1))


def save_interrupted(run: Run, position: Position) -> Path | None:
    """Save the adapter and the state when a signal stops the run. Returns the state's folder, or None on failure."""
    name = files.step_name(run.settings, position.step)
    _save(run, position, name, with_state=True)
    folder = _state_folder(run, name)
    return folder if folder.exists() else None


def save_final(run: Run, position: Position) -> Adapter:
    """Save the adapter at the end of a run. Afterwards the models have the weights that were saved.

    If the disk is full, saving is retried for some minutes, since the training would be lost otherwise.

    Args:
        run: The run.
        position: The step and epoch that the run has reached.

    Returns:
        The adapter that was saved.
    """
    settings = run.settings
    with weights_to_keep(run.optimizer):
        adapter = trained_adapter(run, position)
    if run.accelerator.is_main_process:
        _patiently(lambda: _write(run, adapter, files.final_name(settings)))
        _patiently(lambda: _write_average(run, position, files.final_name(settings)))
        if settings.save_state or settings.save_state_on_train_end:
            _patiently(lambda: _save_state(run, position, files.final_name(settings)))
        if run.uploads is not None:
            subsets = [loaded for loaded in run.data.images.subsets if not loaded.config.is_reg]
            captions = [image.caption for loaded in subsets for image in loaded.images]
            run.uploads.final(final_file(run), captions, run.samples)
    run.accelerator.wait_for_everyone()
    settle_weights(run.optimizer)
    return adapter


def final_file(run: Run) -> Path:
    """The path of the adapter that is saved at the end of the run."""
    return _file(run, files.final_name(run.settings))


def latest_state(run: Run) -> Path | None:
    """The folder of the most recent state; None if there is none."""
    name = files.final_name(run.settings)
    states = [folder for folder in run.output.glob(f"{glob.escape(name)}*-state") if folder.is_dir()]
    return max(states, key=lambda folder: folder.stat().st_mtime_ns, default=None)


def _save(run: Run, position: Position, name: str, with_state: bool) -> bool:
    """Save during training, in the main process. Returns whether everything was written.

    Errors are only logged: a full disk or a missing network share may be available again at the next save.
    """
    written = False
    if run.accelerator.is_main_process:
        try:
            with weights_to_keep(run.optimizer):
                _write(run, trained_adapter(run, position), name)
                _write_average(run, position, name)
            if with_state:
                _save_state(run, position, name)
            written = True
        except (OneLineError, OSError) as error:
            log.error("step %d is not saved: %s", position.step, first_line(error))
    run.accelerator.wait_for_everyone()
    return written


def _patiently(save: Callable[[], None]) -> None:
    """Save, and retry while the disk is full. The error of the last attempt is raised."""
    for seconds in PATIENCE:
        try:
            return save()
        except (OneLineError, OSError) as error:
            if not _disk_is_full(error):
                raise
            log.error("%s; trying again in %d s: free some disk space", first_line(error), seconds)
            time.sleep(seconds)
    return save()


def _disk_is_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


def _prune(remove: Callable[[], None]) -> None:
    try:
        remove()
    except OSError as error:
        log.error("old saves cannot be removed: %s", first_line(error))


def _write(run: Run, adapter: Adapter, name: str) -> None:
    file = _file(run, name)
    adapter.save(file, dtype=_PRECISION[run.settings.save_precision])
    log.info("saved %s", file)
    if run.uploads is not None:
        run.uploads.file(file)


def _write_average(run: Run, position: Position, name: str) -> None:
    """With --ema_decay, save the averaged weights as <name>-ema."""
    if run.average is not None:
        with run.average.applied():
            _write(run, trained_adapter(run, position), f"{name}-ema")


def _file(run: Run, name: str) -> Path:
    return run.output / f"{name}{files.ending(run.settings)}"


def _state_folder(run: Run, name: str) -> Path:
    return run.output / f"{name}-state"


def _save_state(run: Run, position: Position, name: str) -> None:
    folder = _state_folder(run, name)
    files.save_state(folder, _state(run), position)
    if run.uploads is not None:
        run.uploads.state(folder)


def _state(run: Run) -> dict[str, Any]:
    """Everything that later steps depend on, except the seed and step, which decide data, noise, dropout and ranks."""
    scaler = run.accelerator.scaler
    return {
        "weights": files.trainable_state(run.plain),
        "optimizer": run.optimizer.state_dict(),
        "schedule": run.schedule.state_dict(),
        "average": None if run.average is None else run.average.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else None,
    }


def go_on_from(run: Run, folder: Path) -> Position:
    """Load a state into the run to resume from it. Returns the position at which it was saved."""
    state, position = files.load_state(folder)
    files.load_trainable_state(run.plain, state["weights"], folder)
    try:
        run.optimizer.load_state_dict(state["optimizer"])
        run.schedule.load_state_dict(state["schedule"])
        if run.average is not None and state.get("average"):
            run.average.load_state_dict(state["average"])
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise TrainingError(
            f"--resume {folder} was made with another optimizer or schedule ({first_line(error)})"
        ) from None
    if run.average is not None and not state.get("average"):
        log.warning("--resume %s was made without --ema_decay: the average starts at this step", folder)
        run.average.restart()
    if run.accelerator.scaler is not None and state["scaler"] is not None:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    if position.seed != run.settings.seed:
        log.warning("--resume %s was made with --seed %d: a different seed is used from here on", folder, position.seed)
    if position.batches_per_epoch != run.batches_per_epoch:
        log.warning("%s was made with other data or devices: the epoch in which it stopped is restarted", folder)
        position.batch, position.batches_per_epoch = 0, run.batches_per_epoch
    log.info("resuming after step %d, in epoch %d", position.step, position.epoch + 1)
    return position


def _copy(weight: torch.Tensor) -> torch.Tensor:
    """A copy of the weight on the CPU, since training changes the weight in place."""
    return weight.detach().to("cpu", copy=True)
