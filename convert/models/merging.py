"""Adapters added to the weights of a whole model."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from lora_adapters.convert.deltas.low_rank import LowRank, add_up
from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.detection import base_model_of, check_one_family
from lora_adapters.convert.families.names import ModuleName, nearest
from lora_adapters.convert.storage.checkpoint import Checkpoint, WeightsFile
from lora_adapters.convert.storage.ema import has_twin, twin, with_ema
from lora_adapters.convert.storage.single_file import is_single_file, write_single_file

from .finite import check_finite


class AdapterData(Protocol):
    """What is needed of an adapter here: its changes, and the metadata that say what it is for."""

    @property
    def modules(self) -> Mapping[ModuleName, LowRank]: ...

    @property
    def metadata(self) -> Mapping[str, str]: ...


def gathered(adapters: Mapping[str, AdapterData], weights: Sequence[float]) -> dict[ModuleName, list[LowRank]]:
    """The weighted changes of each module.

    Args:
        adapters: by the names that errors shall show.
        weights: the factor of each.

    Raises:
        AdapterError: there are none, not as many weights, numbers that are not finite, or different models.
    """
    if not adapters:
        raise AdapterError("there are no adapters to add up")
    if len(weights) != len(adapters):
        raise AdapterError(f"{len(weights)} ratios for {len(adapters)} adapters: one for each is needed")
    check_one_family(adapters)
    parts: dict[ModuleName, list[LowRank]] = {}
    for (name, adapter), weight in zip(adapters.items(), weights, strict=True):
        check_finite(adapter.modules, f"{name}: ")
        for module, one in adapter.modules.items():
            parts.setdefault(module, []).append(one.scaled(weight))
    return parts


def _adding(parts: Sequence[LowRank]) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(weight: torch.Tensor) -> torch.Tensor:
        one = add_up(parts)  # only now: all of them together would need the memory of all adapters
        up, down = one.matrices(weight.dtype)
        return weight.reshape(len(weight), -1).addmm_(up, down, alpha=one.scale).reshape(weight.shape)

    return change


def merge_into_model(
    model: str | Path | Checkpoint,
    target: str | Path,
    adapters: Sequence[AdapterData],
    weights: Sequence[float],
    names: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    keep_metadata: bool = True,
    ema: str = "keep",
) -> Path:
    """Write a model with Σ weight · ΔW added to its weights; its path is given back.

    A file is written as a file and a Diffusers folder as a folder, or, where target ends in .safetensors or .ckpt, as
    one file in the original layout.
    Tensors that no adapter touches are copied bit for bit; the others are computed in float32 and written in their old
    dtype. With `dtype` all floating point tensors are written in that. The whole is written or nothing. `names` are the
    adapters' for error messages. ema: what becomes of averaged weights in a checkpoint file, see `ema.with_ema`.
    """
    checkpoint = model if isinstance(model, Checkpoint) else Checkpoint.open(model)
    labels = list(names or (f"adapter {number}" for number in range(1, len(adapters) + 1)))
    labels = [label if labels.count(label) == 1 else f"{label} ({at + 1})" for at, label in enumerate(labels)]
    named = dict(zip(labels, adapters, strict=True))
    parts = gathered(named, weights)
    known = checkpoint.modules
    for label, adapter in named.items():
        _check_fits(checkpoint, label, adapter, known)
    changes = {module: _adding(listed) for module, listed in parts.items()}
    checkpoint = with_ema(checkpoint, ema)
    if ema == "merge":
        changes |= {twin(module): change for module, change in changes.items() if has_twin(module)}
    facts = {**(metadata or {})} if keep_metadata else None
    if checkpoint.is_folder and is_single_file(target):
        return write_single_file(checkpoint, target, changes, dtype, facts)
    return checkpoint.write(target, changes, dtype, facts)


def _check_fits(
    checkpoint: Checkpoint, name: str, adapter: AdapterData, known: Mapping[ModuleName, WeightsFile]
) -> None:
    base = base_model_of(adapter.modules, adapter.metadata)
    if base.family is not checkpoint.family:
        raise AdapterError(
            f"{name} is for {base.title}, but {checkpoint.path} is {' or '.join(checkpoint.family.titles)}"
        )
    for module, one in adapter.modules.items():
        if module not in known:
            checkpoint.check_absent()
            parts = {found.component for found in known}
            hint = nearest(str(module), map(str, known)) if module.component in parts else f"; no {module.component}"
            raise AdapterError(
                f"{name} changes {module}, which {checkpoint.path} does not have{hint} (--skip_unknown leaves it out)"
            )
        known[module].check(module)
        shape = tuple(checkpoint.weight(module, known[module]).shape)
        if not one.fits(shape):
            made = [*one.out_in, *one.kernel][: 4 if one.kernel != (1, 1) else 2]
            raise AdapterError(
                f"{name} is for a {module} of {made}, but in {checkpoint.path} it is {list(shape)}: "
                "they are for different versions of the model"
            )
