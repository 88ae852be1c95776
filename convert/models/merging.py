"""Merging adapters into the weights of a model file."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from lora_adapters.convert.deltas.base import Delta
from lora_adapters.convert.deltas.combined import Combination, combined
from lora_adapters.convert.deltas.low_rank import LowRank
from lora_adapters.convert.deltas.scaled_bias import scales_bias, with_base_bias
from lora_adapters.convert.deltas.sum import added
from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.detection import base_model_of, check_one_family
from lora_adapters.convert.families.names import ModuleName, bias_of, nearest
from lora_adapters.convert.families.registry import BASE_VERSION, by_metadata
from lora_adapters.convert.families.spelling import fuses
from lora_adapters.convert.formats.kinds import warn_of_embeddings
from lora_adapters.convert.storage.changed_weights import Change
from lora_adapters.convert.storage.checkpoint import Checkpoint, WeightsFile
from lora_adapters.convert.storage.ema import has_twin, twin, with_ema
from lora_adapters.convert.storage.single_file import is_single_file, write_single_file

from .finite import check_finite


class AdapterData(Protocol):
    """The parts of an adapter that merging needs: changes, metadata and token embeddings."""

    @property
    def modules(self) -> Mapping[ModuleName, Delta]: ...

    @property
    def metadata(self) -> Mapping[str, str]: ...

    @property
    def embeddings(self) -> Mapping[str, torch.Tensor]: ...


def gathered(adapters: Mapping[str, AdapterData], weights: Sequence[float]) -> dict[ModuleName, list[Delta]]:
    """The weighted changes of each module; see `with_weights`."""
    parts = with_weights(adapters, weights)
    return {module: [change.scaled(weight) for change, weight in listed] for module, listed in parts.items()}


def with_weights(
    adapters: Mapping[str, AdapterData], weights: Sequence[float]
) -> dict[ModuleName, list[tuple[Delta, float]]]:
    """The changes of each module with their weights.

    Args:
        adapters: The adapters by their names in error messages.
        weights: One for each adapter. At 0, changes that depend on the model's weights are left out, since a DoRA would
            still add its inner change.

    Returns:
        (change, weight) pairs by module.

    Raises:
        AdapterError: There are no adapters, the number of weights differs, a value is not finite, or the adapters are
            for different models.
    """
    if not adapters:
        raise AdapterError("no adapters were given")
    if len(weights) != len(adapters):
        raise AdapterError(f"{len(weights)} ratios for {len(adapters)} adapters: give one for each adapter")
    check_one_family(adapters)
    parts: dict[ModuleName, list[tuple[Delta, float]]] = {}
    for (name, adapter), weight in zip(adapters.items(), weights, strict=True):
        check_finite(adapter.modules, f"{name}: ")
        for module, change in adapter.modules.items():
            if weight or not change.needs_base:  # left out at 0, where a DoRA would still add its change
                parts.setdefault(module, []).append((change, weight))
    return parts


def combined_changes(
    adapters: Mapping[str, AdapterData], weights: Sequence[float], combination: Combination
) -> dict[ModuleName, Delta]:
    """Combine adapters by TIES, DARE or magnitude pruning.

    Args:
        adapters: The adapters by their names in error messages.
        weights: One for each adapter, applied after pruning and the election of signs, as in PEFT.
        combination: The method and its options. It also prunes the changes of modules that only one adapter has.

    Returns:
        The combined changes by module.

    Raises:
        AdapterError: See `with_weights`.
    """
    parts = with_weights(adapters, weights)
    return {module: combined(str(module), listed, combination) for module, listed in parts.items()}


def _adding(parts: Sequence[Delta]) -> Change:
    def change(weight: torch.Tensor) -> torch.Tensor:
        total = added(parts)  # computed on demand, since all sums together would need too much memory
        if not isinstance(total, LowRank):
            return weight.add_(total.delta(weight, weight.dtype))
        up, down = total.matrices(weight.dtype)
        return weight.reshape(len(weight), -1).addmm_(up, down, alpha=total.scale).reshape(weight.shape)

    return change


def _adding_to_bias(parts: Sequence[Delta]) -> Change:
    def change(bias: torch.Tensor) -> torch.Tensor:
        before = bias.clone()
        for part in parts:
            difference = with_base_bias(part, before).bias(bias.dtype)
            if difference is not None:
                bias.add_(difference)
        return bias

    return change


def _changes(parts: Mapping[ModuleName, Sequence[Delta]], known: Collection[ModuleName]) -> dict[ModuleName, Change]:
    """The functions that compute the known weights and biases; biases are named by `names.bias_of`."""
    changes: dict[ModuleName, Change] = {}
    for module, listed in parts.items():
        of_weight = [part for part in listed if part.changes_weight]
        if of_weight:
            changes[module] = _adding(of_weight)
        scaled = bias_of(module) in known and any(map(scales_bias, listed))
        if scaled or any(part.bias() is not None for part in listed):
            changes[bias_of(module)] = _adding_to_bias(listed)
    return changes


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
    """Merge adapters into a model: write it with Σ weight · ΔW added to its weights and biases.

    Changes that depend on the model's weights (DoRA, OFT, ...) are computed from the weights of the unmerged model.
    Tensors that no adapter changes are copied bit for bit; the others are computed in float32. If anything fails,
    nothing is written.

    Args:
        model: A checkpoint file or a Diffusers folder.
        target: The output path. A file is written as a file and a folder as a folder. If target ends in .safetensors or
            .ckpt, a folder is written as one file in the original layout.
        adapters: The adapters to add.
        weights: One for each adapter.
        names: The adapters' names for error messages.
        dtype: The dtype of all floating point tensors; None keeps the dtype of each.
        metadata: Entries for the file's metadata.
        keep_metadata: Whether to keep the model's own entries too.
        ema: What to do with EMA weights in a checkpoint file; see `ema.with_ema`.

    Returns:
        The path that was written.

    Raises:
        AdapterError: An adapter does not fit the model, or the target cannot be written.
    """
    checkpoint = model if isinstance(model, Checkpoint) else Checkpoint.open(model)
    labels = list(names or (f"adapter {number}" for number in range(1, len(adapters) + 1)))
    labels = [label if labels.count(label) == 1 else f"{label} ({at + 1})" for at, label in enumerate(labels)]
    named = dict(zip(labels, adapters, strict=True))
    parts = gathered(named, weights)
    known = checkpoint.parameters
    for label, adapter in named.items():
        _check_fits(checkpoint, label, adapter, known)
        warn_of_embeddings(adapter.embeddings, f"a model into which {label} is merged")
    changes = _changes(parts, known)
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
    if base.family is not checkpoint.family and not _may_be_for(checkpoint, adapter):
        raise AdapterError(
            f"{name} is for {base.title}, but {checkpoint.path} is {' or '.join(checkpoint.family.titles)}"
        )
    for module, delta in adapter.modules.items():
        if module not in known:
            checkpoint.check_absent()
            parts = {module.component for module in known}
            hint = nearest(str(module), map(str, known)) if module.component in parts else f"; no {module.component}"
            raise AdapterError(
                f"{name} changes {module}, which {checkpoint.path} does not have{hint} (--skip_unknown leaves it out)"
            )
        known[module].check(module)
        shape = tuple(checkpoint.weight(module, known[module]).shape)
        if not delta.fits(shape):
            raise AdapterError(
                f"{name} expects {module} of {_made_for(delta)}, but in {checkpoint.path} it is {list(shape)}: "
                "they are for different versions of the model"
            )
        _check_bias(checkpoint, name, module, delta, known)


def _may_be_for(checkpoint: Checkpoint, adapter: AdapterData) -> bool:
    """Whether the adapter's family follows only from its module names, and the model's family has all of them."""
    stated = by_metadata(adapter.metadata) if adapter.metadata.get(BASE_VERSION) else None
    family = checkpoint.family
    return stated is None and fuses(family) and family.has(adapter.modules)


def _made_for(change: Delta) -> str:
    """The shape of the weight that a change expects, as far as it is known."""
    if isinstance(change, LowRank):
        return str([*change.out_in, *change.kernel][: 4 if change.kernel != (1, 1) else 2])
    return repr(change)


def _check_bias(
    checkpoint: Checkpoint, name: str, module: ModuleName, change: Delta, known: Mapping[ModuleName, WeightsFile]
) -> None:
    difference, bias = change.bias(), bias_of(module)
    if difference is None:
        return
    if bias not in known:
        raise AdapterError(f"{name} changes {bias}, which {checkpoint.path} does not have")
    known[bias].check(bias)
    shape = tuple(checkpoint.weight(bias, known[bias]).shape)
    if tuple(difference.shape) != shape:
        raise AdapterError(f"{name} has {bias} of {list(difference.shape)}, but {checkpoint.path} has {list(shape)}")
