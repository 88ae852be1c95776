"""The training loop. `train(settings)` runs the whole training, from Python or from the command line."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch

from lora_adapters.adapter import Adapter
from lora_adapters.hub.background import FailedPush
from lora_adapters.train.data.dataset import TrainingData
from lora_adapters.train.models.base import BaseModels
from lora_adapters.train.options.settings import Settings
from lora_adapters.train.seeding import derive
from lora_adapters.train.stopping import Interrupted, StopSignals
from lora_adapters.train.training import adapters
from lora_adapters.train.training.checkpoints import Position
from lora_adapters.train.training.evaluation import measure, name_damaged, show_samples
from lora_adapters.train.training.metadata import run_metadata
from lora_adapters.train.training.optimizers import start_training, weights_to_keep
from lora_adapters.train.training.progress import Progress
from lora_adapters.train.training.regularization import limit_norms, norms
from lora_adapters.train.training.saving import go_on_from, save_at_epoch, save_at_step, save_final, save_interrupted
from lora_adapters.train.training.setup import Run, prepare, workers
from lora_adapters.train.training.sorting import sort_if_due, warmed_up
from lora_adapters.train.training.step_values import StepValues, check_finite, fetch
from lora_adapters.train.training.trackers import end_trackers, start_trackers
from lora_adapters.train.training.uploads import state_folder
from lora_adapters.train.training.validation import HeldOut

log = logging.getLogger(__name__)


@dataclass
class Trained:
    """The result of `train`.

    Attributes:
        adapter: The adapter that was saved last.
        models: The base model with the adapter, in evaluation mode.
        steps: The number of optimizer steps of the run, including those before it was resumed.
        losses: The loss of every optimizer step of this call.
        held_out: All held-out losses.
        not_pushed: Saves that could not be uploaded to the Hub; they are on disk.
        damaged: Images that could not be used: name -> reason.
    """

    adapter: Adapter
    models: BaseModels
    steps: int
    losses: list[float] = field(default_factory=list)
    held_out: list[HeldOut] = field(default_factory=list)
    not_pushed: list[FailedPush] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)


def train(settings: Settings, models: BaseModels | None = None, data: TrainingData | None = None) -> Trained:
    """Train an adapter and save it in --output_dir.

    Args:
        settings: From `arguments.settings(...)` or `arguments.parse(argv)`.
        models: A base model that is already loaded; the adapter stays on it. None loads the base model.
        data: Training data that is already open. None opens the data that the settings name.

    Returns:
        The adapter, and the losses and files of the run.

    Raises:
        TrainingError: The settings or the model are invalid, or the run fails; the message is one line.
        DataError: The images cannot be used.
        AdapterError: An adapter cannot be read.
        Interrupted: The run was stopped; see `train_prepared`.
    """
    run = prepare(settings, models, data)
    return train_prepared(run)


def train_prepared(run: Run) -> Trained:
    """Run the training loop of a prepared run. Waits for uploads in progress, also after an error.

    Args:
        run: From `prepare`.

    Returns:
        The adapter, and the losses and files of the run.

    Raises:
        Interrupted: Ctrl-C, SIGTERM or SIGHUP: the step is finished, and the adapter and the state are saved.
        TrainingError: The run fails, for example because the loss is infinite.
    """
    try:
        with StopSignals() as signals:
            result = _train(run, signals)
    except BaseException:
        if run.uploads is not None:
            run.uploads.finish(interrupted=True)
        raise
    finally:
        run.data.close()
    if run.uploads is not None:
        result.not_pushed = run.uploads.finish()
    return result


def _train(run: Run, signals: StopSignals) -> Trained:
    accelerator, settings = run.accelerator, run.settings
    run.metadata = run_metadata(settings, run.models, run.data, accelerator.num_processes, run.steps, run.epochs)
    position = Position(batches_per_epoch=run.batches_per_epoch, seed=run.seed)
    if settings.resume:
        position = go_on_from(run, state_folder(settings))
    start_trackers(settings, accelerator)
    start_training(run.optimizer)
    result = Trained(Adapter({}), run.models, position.step)
    with Progress(run, position.step) as progress:
        if position.step:
            progress.report.resume(position.step)
        else:
            measure(run, result.held_out, 0, progress)
            if settings.sample_at_first:
                show_samples(run, position)
                progress.report.drawn(0)
        run.training_mode()
        while position.step < run.steps:
            _epoch(run, position, progress, result, signals)
        sort_if_due(run, position.step)  # if sort_at is so high that no step comes after the sorting
        run.training_mode(False)
        result.steps = position.step
        result.adapter = save_final(run, position)
        progress.report.write(position.step, result.held_out)
        result.damaged = name_damaged(run)
    end_trackers(accelerator)
    return result


def _epoch(run: Run, position: Position, progress: Progress, result: Trained, signals: StopSignals) -> None:
    """Train the rest of the epoch from `position` on, or the rest of the run if that is shorter."""
    settings, accelerator = run.settings, run.accelerator
    batches = run.data.batches(
        position.epoch,
        start=position.batch,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        workers=workers(settings),
    )
    left = run.batches_per_epoch - position.batch
    for group in _groups(batches, settings.gradient_accumulation_steps, left):
        values = _step(run, position.step, group, progress.logging, signals)
        result.losses.append(values.loss)
        position.step += 1
        position.batch += len(group)
        ended = position.batch >= run.batches_per_epoch
        if ended:
            position.epoch, position.batch = position.epoch + 1, 0
        progress.stepped(position, values)
        if position.step >= run.steps:
            _after_step(run, position, ended, progress, result)
            return
        if values.stop:
            _stop(run, position, values.stop, progress, result)
        _after_step(run, position, ended, progress, result)


def _step(run: Run, step: int, group: list[Any], logging: bool, signals: StopSignals) -> StepValues:
    """One optimizer step over a group of batches. It synchronises with the device only once, at the end."""
    accelerator, settings = run.accelerator, run.settings
    sort_if_due(run, step)
    # Only dropout draws from the global generator. With this seed it depends only on the run's seed, step and process.
    torch.manual_seed(derive(run.seed, "step", step, accelerator.process_index))
    total = torch.zeros((), device=accelerator.device)
    for number, batch in enumerate(group):
        run.tell_step(step, number, batch)
        last = number == len(group) - 1
        with run.accumulating(last), run.offloading():
            loss = run.loss.training(batch) / len(group)
            total += loss.detach()
            accelerator.backward(loss)
    others: dict[str, torch.Tensor] = {}
    if settings.max_grad_norm:
        others["norm/gradient"] = accelerator.clip_grad_norm_(run.parameters, settings.max_grad_norm)
    with warmed_up(run, step):
        run.optimizer.step()
    if not accelerator.optimizer_step_was_skipped:
        run.schedule.step()
    run.optimizer.zero_grad(set_to_none=True)
    if settings.scale_weight_norms:
        others["norm/limited_modules"] = limit_norms(run.layers, adapters.ADAPTER, settings.scale_weight_norms)
    if run.average is not None and not accelerator.optimizer_step_was_skipped:
        run.average.step()
    if logging:
        of_modules = norms(run.layers, adapters.ADAPTER)
        others |= {"norm/average": of_modules.mean(), "norm/largest": of_modules.max()}
    values = fetch(accelerator, total, signals.flags(accelerator.device), others)
    check_finite(values, step + 1, accelerator.scaler is not None)
    return values


def _stop(run: Run, position: Position, signal_number: int, progress: Progress, result: Trained) -> NoReturn:
    """Save the adapter and the state for --resume, and raise Interrupted."""
    run.training_mode(False)
    state = save_interrupted(run, position)
    progress.report.write(position.step, result.held_out)
    end_trackers(run.accelerator)
    raise Interrupted(signal_number, None if state is None else str(state))


def _after_step(run: Run, position: Position, ended: bool, progress: Progress, result: Trained) -> None:
    """Save, measure the held-out loss and draw sample images, whichever are due after this step."""
    settings, step, epoch = run.settings, position.step, position.epoch
    last = step >= run.steps
    due_held_out = _due(settings.validate_every_n_steps, step)
    if settings.validate_every_n_steps is None or settings.validate_every_n_epochs is not None:
        due_held_out |= ended and _due(settings.validate_every_n_epochs or 1, epoch)
    due_held_out &= run.data.validation is not None
    due_samples = not settings.sample_every_n_epochs and _due(settings.sample_every_n_steps, step)
    due_samples |= ended and _due(settings.sample_every_n_epochs, epoch)
    due_step = _due(settings.save_every_n_steps, step)
    due_epoch = ended and not last and _due(run.save_every_n_epochs, epoch)
    if not (due_held_out or due_samples or due_step or due_epoch or last):
        return
    run.training_mode(False)
    if due_step:
        save_at_step(run, position)
    if due_epoch:
        save_at_epoch(run, position)
    with weights_to_keep(run.optimizer):
        if due_held_out or last:
            measure(run, result.held_out, step, progress)
        if due_samples:
            show_samples(run, position)
            progress.report.drawn(step)
    if (due_step or due_epoch) and not last:  # the end of the run writes its own report
        progress.report.write(step, result.held_out)
    run.training_mode()


def _due(every: int | None, number: int) -> bool:
    return every is not None and number % every == 0


def _groups(batches: Iterator[Any], size: int, left: int) -> Iterator[list[Any]]:
    """Batches in groups of `size`; the last group of an epoch may be smaller."""
    group: list[Any] = []
    for number, batch in enumerate(batches, start=1):
        group.append(batch)
        if len(group) == size or number == left:
            yield group
            group = []
