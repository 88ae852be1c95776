"""Averaged weights (EMA) in checkpoints: a twin of each of the U-Net's tensors, `model_ema.` and its name without dots.

Most programs read the other tensors, and those are what an adapter is merged into.
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
    """The names of the averaged tensors in a checkpoint file."""
    return [key for file in checkpoint.files for key in file.tensors if key.startswith(_START)]


def has_twin(module: ModuleName) -> bool:
    """Whether a module can have averaged weights: those of the denoiser can."""
    return role_of(module.component) == "denoiser"


def twin(module: ModuleName) -> ModuleName:
    """What a module of the U-Net is called among the places of its averaged weights."""
    return module._replace(component="unet_ema")


def with_ema(checkpoint: Checkpoint, chosen: str) -> Checkpoint:
    """Apply a choice about the averaged weights (`model_ema.*`) of a checkpoint.

    Args:
        checkpoint: The checkpoint.
        chosen: "keep" (nothing is changed), "drop" (without them), or "merge" (they become modules that changes apply
            to).

    Returns:
        A checkpoint of the same path.

    Raises:
        AdapterError: The choice is unknown, or there are no averaged weights to drop or merge.
    """
    if chosen not in EMA:
        raise AdapterError(f"ema {chosen}: {', '.join(EMA)} are known")
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
