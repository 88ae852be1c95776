"""Adapter files for an unknown model: the layer names of the file are kept.

Changes of any kind are read. The spelling of a name decides how it is written: flat names with kohya's tensors
(`lora_down`, `lora_up`, `alpha`), dotted names with PEFT's (`lora_A`, `lora_B`) and alphas multiplied into the weights,
as other programs expect.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from lora_adapters.convert.deltas.base import Delta, alpha_in
from lora_adapters.convert.deltas.casting import cast_changes
from lora_adapters.convert.deltas.low_rank import LowRank
from lora_adapters.convert.deltas.sum import as_pair
from lora_adapters.convert.errors import UnknownModuleError
from lora_adapters.convert.families.names import ModuleName
from lora_adapters.convert.families.registry import FAMILIES
from lora_adapters.convert.families.spelling import fuses, targets_of
from lora_adapters.convert.families.unlisted import COMPONENT, is_flat

from .contents import Contents, WriteOptions, most_common
from .diffusers import kohya_metadata
from .kinds import unread
from .lycoris import resolve
from .spelled import change_of, group_tensors, missing_alpha, split_key
from .writing import bundled, tensors_of, write_hashed

_HALVES = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}


def is_of_known_model(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether a known family has more than half of a file's modules, or the file is not an adapter."""
    splits = {key: split_key(key) for key in tensors}
    names = dict.fromkeys(parts[0] for parts in splits.values() if parts is not None)
    if None in splits.values():
        return True
    transformers = [[targets_of(family, name) is not None for name in names] for family in FAMILIES if fuses(family)]
    return any(2 * sum(known) > len(names) for known in [*transformers, [_is_of_unet(name) for name in names]])


def _is_of_unet(name: str) -> bool:
    """Whether a name belongs to a layer of a U-Net or its text encoders."""
    try:
        resolve(name)
    except UnknownModuleError:
        return False
    return True


def read(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Contents:
    """Read an adapter without knowing its model.

    Args:
        tensors: The tensors of the file; they are not copied.
        metadata: The metadata of the file, which may contain alphas.

    Returns:
        The changes, whose modules have the component `model` and the names in the file, and the metadata.

    Raises:
        AdapterError: A key does not belong to an adapter, a pair is incomplete, or shapes do not match.
    """
    splits = {key: split_key(key) for key in tensors}
    strange = next((key for key, parts in splits.items() if parts is None), None)
    if strange is not None:
        raise unread(tensors, f"{strange:.120} is not a key of an adapter file")
    modules: dict[ModuleName, Delta] = {}
    for name, group in group_tensors(tensors, splits).items():
        alpha = missing_alpha(ModuleName(*name.split(".", 1)), group, metadata) if "." in name else None
        whole = group if alpha is None else {**group, "alpha": alpha}
        modules[ModuleName(COMPONENT, name)] = change_of(name, whole)
    return Contents(modules, kohya_metadata(metadata))


def write(path: Path, contents: Contents, options: WriteOptions) -> None:
    """Write the changes under the names that they were read with."""
    changes = {module.path: as_pair(change) or change for module, change in contents.modules.items()}
    tensors: dict[str, torch.Tensor] = {}
    for name, change in cast_changes(changes, options.dtype).items():
        if isinstance(change, LowRank) and not is_flat(name):
            tensors |= _with_pefts_ends(name, change)
        else:
            tensors |= tensors_of({name: change})
    metadata = {**_facts(contents, changes), **contents.metadata} if any(map(is_flat, changes)) else contents.metadata
    kept = {key: text for key, text in metadata.items() if options.modelspec or not key.startswith("modelspec.")}
    write_hashed(path, {**tensors, **bundled(contents.embeddings)}, kept)


def _with_pefts_ends(name: str, pair: LowRank) -> dict[str, torch.Tensor]:
    """A pair's tensors under PEFT's keys, without an alpha: the scale is 1."""
    tensors = tensors_of({name: pair.without_alpha()})
    return {f"{name}.{end}": tensors[f"{name}.{half}"] for half, end in _HALVES.items()}


def _facts(contents: Contents, changes: Mapping[str, Delta]) -> dict[str, str]:
    """The metadata entries that readers of kohya's files need."""
    module = "networks.lora" if contents.has_only_pairs else "lycoris.kohya"
    alpha = most_common(alpha for change in changes.values() if (alpha := alpha_in(change)) is not None) or 0.0
    return {"ss_network_module": module, "ss_network_dim": str(contents.rank), "ss_network_alpha": str(float(alpha))}
