"""Names of saved files, states to resume from, and the removal of old saves."""

import contextlib
import json
import logging
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lora_adapters.convert.errors import first_line
from lora_adapters.convert.parsing import json_value
from lora_adapters.convert.storage import atomic
from lora_adapters.convert.storage.atomic import delete_folder, remove, replacing_folder, sync
from lora_adapters.convert.storage.files import load_plain, save_pickle
from lora_adapters.train.errors import TrainingError
from lora_adapters.train.options.settings import Settings
from lora_adapters.types.layers import is_factor

log = logging.getLogger(__name__)

_STATE, _POSITION = "state.pt", "train_state.json"
_PARTS = ("weights", "optimizer", "schedule")


@dataclass
class Position:
    """The progress of a run: optimizer steps, complete epochs, and batches (per process) of the current epoch."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    batches_per_epoch: int = 0
    seed: int = 0


def ending(settings: Settings) -> str:
    """The suffix of the saved files."""
    return f".{settings.save_model_as or 'safetensors'}"


def step_name(settings: Settings, step: int) -> str:
    """The name of the save after a step."""
    return f"{settings.output_name or 'at'}-step{step:08d}"


def epoch_name(settings: Settings, epoch: int) -> str:
    """The name of the save after an epoch."""
    return f"{settings.output_name or 'epoch'}-{epoch:06d}"


def final_name(settings: Settings) -> str:
    """The name of the last save."""
    return settings.output_name or "last"


# --- states ----------------------------------------------------------------------------------------------------------


def save_state(folder: Path, state: dict[str, Any], position: Position) -> None:
    """Write a state atomically: into a temporary folder, which is then renamed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder.parent)
    try:
        with replacing_folder(folder) as partial:  # `remove_leftovers` cleans up if the process is killed here
            save_pickle(state, partial / _STATE)
            entries = {"current_epoch": position.epoch, "current_step": position.step, **asdict(position)}
            (partial / _POSITION).write_text(json.dumps(entries, indent=1), encoding="utf-8")
            for name in (_STATE, _POSITION):
                sync(partial / name)
    except OSError as error:
        raise TrainingError(f"state {folder} cannot be written ({error.strerror or error})") from error


def load_state(folder: Path) -> tuple[dict[str, Any], Position]:
    """Load a state that `save_state` wrote. TrainingError if there is none."""
    position = load_position(folder)
    try:
        # Optimizers keep the loaded tensors. On Windows a memory-mapped file could then not be deleted or replaced.
        state = load_plain(folder / _STATE, mapped=not atomic.LOCKING)
    except (ValueError, OSError) as error:
        raise TrainingError(f"--resume {folder} cannot be read ({first_line(error)})") from None
    if not isinstance(state, dict) or not all(isinstance(state.get(name), dict) for name in _PARTS):
        raise TrainingError(f"--resume {folder}: {_STATE} is not a state saved by this program")
    if not all(isinstance(weight, torch.Tensor) for weight in state["weights"].values()):
        raise TrainingError(f"--resume {folder}: {_STATE} has invalid weights")
    return state, position


def load_position(folder: Path) -> Position:
    """Read the position and seed of a state that `save_state` wrote. TrainingError if there is none."""
    _bring_back(folder.parent)
    try:
        for name in (_POSITION, _STATE):
            if not (folder / name).is_file():
                raise TrainingError(f"--resume {folder}: not a saved state ({name} is missing)")
        entries = json_value((folder / _POSITION).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise TrainingError(f"--resume {folder} cannot be read ({first_line(error)})") from None
    known = {key: entries[key] for key in asdict(Position()) if key in entries} if isinstance(entries, dict) else {}
    if "step" not in known or not all(
        type(value) is int and (value >= 0 or key == "seed") for key, value in known.items()
    ):
        raise TrainingError(f"--resume {folder}: {_POSITION} has no valid step, epoch and batch")
    return Position(**known)


def trainable_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's weights by name, on the CPU."""
    return {name: weight.detach().cpu().clone() for name, weight in _adapter_weights(module).items()}


def load_trainable_state(module: torch.nn.Module, state: dict[str, torch.Tensor], source: Path) -> None:
    """Load the adapter's weights from a state. TrainingError if its modules or shapes differ from the adapter's."""
    own = _adapter_weights(module)
    differing = sorted(own.keys() ^ state.keys())
    differing += [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    if differing:
        raise TrainingError(f"--resume {source} was made with other network options: {differing[0]} differs")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])


def _adapter_weights(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if is_factor(name)}


def remove_leftovers(folder: Path) -> None:
    """Delete incomplete states of a killed run; a state that it had moved aside but not replaced is restored."""
    for partial in folder.glob(".*-state.*.partial"):
        delete_folder(partial)
    _bring_back(folder)
    for old in folder.glob(".*-state.*.old"):
        delete_folder(old)


def _bring_back(folder: Path) -> None:
    for old in folder.glob(".*-state.*.old"):
        state = old.with_name(old.name[1:].removesuffix(".old").rpartition(".")[0])
        if not state.exists():
            with contextlib.suppress(OSError):  # a read-only folder
                old.rename(state)


# --- pruning ---------------------------------------------------------------------------------------------------------


def prune_epochs(settings: Settings, output: Path, epoch: int, every: int) -> None:
    """Delete all epoch saves and states except the last --save_last_n_epochs, counted in saves of `every` epochs."""
    keep = settings.save_last_n_epochs
    keep_state = keep if settings.save_last_n_epochs_state is None else settings.save_last_n_epochs_state
    name = re.escape(settings.output_name or "epoch")
    if keep:
        _remove(output, rf"{name}-(\d{{6}})(?:-ema)?{re.escape(ending(settings))}", epoch - every * keep)
    if keep_state:
        _remove(output, rf"{name}-(\d{{6}})-state", epoch - every * keep_state)


def prune_steps(settings: Settings, output: Path, step: int) -> None:
    """Delete step saves older than --save_last_n_steps, and step states likewise."""
    keep = settings.save_last_n_steps
    keep_state = keep if settings.save_last_n_steps_state is None else settings.save_last_n_steps_state
    name = re.escape(settings.output_name or "at")
    if keep:
        _remove(output, rf"{name}-step(\d{{8}})(?:-ema)?{re.escape(ending(settings))}", step - keep - 1)
    if keep_state:
        _remove(output, rf"{name}-step(\d{{8}})-state", step - keep_state - 1)


def _remove(output: Path, pattern: str, newest: int) -> None:
    """Delete files and folders that match `pattern` with a number of at most `newest`."""
    for path in output.iterdir():
        match = re.fullmatch(pattern, path.name)
        if match and int(match.group(1)) <= newest:
            log.info("removing %s", path)
            if not remove(path):
                log.warning("%s cannot be removed (is it open in another program?)", path)
