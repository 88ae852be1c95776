"""Averaged weights (EMA) in checkpoints: a second copy of the U-Net, named `model_ema.<name without dots>`.

Most programs use the tensors that are not averaged, which adapters are merged into by default.
"""

from dataclasses import replace

from lora_adapters.convert.choices import EMA
from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.names import ModuleName
from lora_adapters.convert.families.registry import role_of
from lora_adapters.convert.families.tensor_slice import TensorSlice

from .checkpoint import Checkpoint, WeightsFile

_START, _MODEL = "model_ema.", "model."


def ema_keys(checkpoint: Checkpoint) -> list[str]:
    """The keys of the averaged tensors in a checkpoint file."""
    return [key for file in checkpoint.files for key in file.tensors if key.startswith(_START)]


def has_twin(module: ModuleName) -> bool:
    """Whether a module can have averaged weights: only modules of the denoiser can."""
    return role_of(module.component) == "denoiser"


def twin(module: ModuleName) -> ModuleName:
    """The name of the averaged copy of a module."""
    return module._replace(component="unet_ema")


def with_ema(checkpoint: Checkpoint, chosen: str) -> Checkpoint:
    """Apply a choice about the averaged weights (`model_ema.*`) of a checkpoint.

    Args:
        checkpoint: The checkpoint.
        chosen: "keep" (the checkpoint is returned unchanged), "drop" (without the averaged weights), or "merge" (the
            averaged weights become modules, so that changes apply to them too).

    Returns:
        A checkpoint of the same path.

    Raises:
        AdapterError: The choice is unknown, or the checkpoint has no averaged weights to drop or merge.
    """
    if chosen not in EMA:
        raise AdapterError(f"unknown value {chosen} of ema: choose one of {', '.join(EMA)}")
    if chosen == "keep":
        return checkpoint
    if not ema_keys(checkpoint):
        raise AdapterError(f"{checkpoint.path} has no EMA weights (model_ema.*) to {chosen}")
    change = _without if chosen == "drop" else _with_places
    return replace(checkpoint, files=tuple(change(file) for file in checkpoint.files))


def _without(file: WeightsFile) -> WeightsFile:
    return replace(file, tensors={key: tensor for key, tensor in file.tensors.items() if not key.startswith(_START)})


def _with_places(file: WeightsFile) -> WeightsFile:
    twins = {}
    for module, place in (*file.places.items(), *file.others.items()):
        key = _START + place.key.removeprefix(_MODEL).replace(".", "")
        if has_twin(module) and key in file.tensors:
            twins[twin(module)] = TensorSlice(key)
    return replace(file, places={**file.places, **twins})
