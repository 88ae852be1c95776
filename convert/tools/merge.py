"""Weighted sums of adapters, and adapters put into a model's weights."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from lora_adapters.convert.adapter import Adapter
from lora_adapters.convert.deltas.low_rank import LowRank, add_up, common_scale
from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.detection import check_one_family, family_of
from lora_adapters.convert.families.names import ModuleName, nearest
from lora_adapters.convert.formats.metadata import merged_facts
from lora_adapters.convert.storage.checkpoint import Checkpoint, WeightsFile
from lora_adapters.convert.storage.ema import twin, with_ema
from lora_adapters.convert.storage.single_file import is_single_file, write_single_file

from .inputs import check_finite


def weighted_sum(adapters: Mapping[str, Adapter], weights: Sequence[float]) -> Adapter:
    """Σ weight · ΔW, exactly, of adapters under the names that errors shall show; modules of only some stay.

    Metadata: the base model's, the tags and trigger words of all; AdapterError where adapters are for different models.
    """
    modules, gathered = {}, _gathered(adapters, weights)
    scale = common_scale(one for parts in gathered.values() for one in parts)  # one for all: see `low_rank.to_narrow`
    for module, parts in gathered.items():
        try:
            modules[module] = add_up(parts, scale)
        except AdapterError as error:
            names = [name for name, adapter in adapters.items() if module in adapter.modules]
            raise AdapterError(f"{' and '.join(names)} differ in {module}: {error}") from None
    first = next(iter(adapters.values()))
    base = {key: first.metadata[key] for key in ("ss_v2", "ss_base_model_version") if key in first.metadata}
    return Adapter(modules, {**base, **merged_facts([one.metadata for one in adapters.values()])})


def _gathered(adapters: Mapping[str, Adapter], weights: Sequence[float]) -> dict[ModuleName, list[LowRank]]:
    """The weighted changes of each module."""
    if not adapters:
        raise AdapterError("there are no adapters to add up")
    if len(weights) != len(adapters):
        raise AdapterError(f"{len(weights)} ratios for {len(adapters)} adapters: one for each is needed")
    check_one_family(adapters)
    parts: dict[ModuleName, list[LowRank]] = {}
    for (name, adapter), weight in zip(adapters.items(), weights, strict=True):
        check_finite(adapter, f"{name}: ")
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
    adapters: Sequence[Adapter],
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
    parts = _gathered(named, weights)
    known = checkpoint.modules
    for label, adapter in named.items():
        _check_fits(checkpoint, label, adapter, known)
    changes = {module: _adding(listed) for module, listed in parts.items()}
    checkpoint = with_ema(checkpoint, ema)
    if ema == "merge":
        changes |= {twin(module): change for module, change in changes.items() if module.component == "unet"}
    facts = {**(metadata or {})} if keep_metadata else None
    if checkpoint.is_folder and is_single_file(target):
        return write_single_file(checkpoint, target, changes, dtype, facts)
    return checkpoint.write(target, changes, dtype, facts)


def fitting(checkpoint: Checkpoint, adapter: Adapter, name: str) -> tuple[Adapter, list[ModuleName]]:
    """The adapter without the modules that the model does not have, and those modules.

    AdapterError, with the adapter's name, where the model has none of its modules.
    """
    known = checkpoint.modules
    missing = [module for module in adapter.modules if module not in known]
    if len(missing) == len(adapter.modules):
        raise AdapterError(f"{checkpoint.path} has none of the modules that {name} changes")
    kept = {module: one for module, one in adapter.modules.items() if module in known}
    return adapter.with_modules(kept), missing


def _check_fits(checkpoint: Checkpoint, name: str, adapter: Adapter, known: Mapping[ModuleName, WeightsFile]) -> None:
    family, model = family_of(adapter), "SDXL" if checkpoint.architecture == "sdxl" else "SD1.x or SD2.x"
    if (family == "SDXL") != (checkpoint.architecture == "sdxl"):
        raise AdapterError(f"{name} is for {family}, but {checkpoint.path} is {model}")
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
