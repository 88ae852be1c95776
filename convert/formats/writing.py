"""Writing tensors to a single file, shared by the formats."""

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch

from lora_adapters.convert.deltas.base import Delta
from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.storage.files import replacing, save_pickle

from .hashes import hashes

_BUNDLED = "bundle_emb."  # the key prefix of embeddings that are stored in an adapter file


def write_file(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors atomically: as .safetensors with metadata, or else as torch's pickle without metadata."""
    table = apart(tensors)
    with replacing(path, durable=True) as partial:
        if path.suffix == ".safetensors":
            safetensors.torch.save_file(table, partial, dict(metadata))
        else:
            save_pickle(table, partial)


def write_hashed(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Like `write_file`, with the hashes of the tensors added to the metadata."""
    table = apart(tensors)
    write_file(path, table, {**metadata, **hashes(table, metadata)})


def tensors_of(changes: Mapping[str, Delta]) -> dict[str, torch.Tensor]:
    """The tensors of changes by their keys in a file.

    Args:
        changes: The changes by the name of their module in the file.

    Returns:
        The tensors, in the dtypes of the changes. alpha is a scalar tensor with the dtype of the weights, or float32 if
        that dtype would round it.

    Raises:
        AdapterError: A change cannot be written; the message names its module.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, change in changes.items():
        try:
            tensors |= {f"{name}.{end}": tensor for end, tensor in change.tensors().items()}
        except AdapterError as error:
            raise AdapterError(f"{name}: {error}") from None
    return tensors


def apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, contiguous and without shared memory: the parts of a fused layer share their `down`."""
    table: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for key, tensor in tensors.items():
        whole = tensor.contiguous()
        table[key] = whole.clone() if whole.numel() and whole.data_ptr() in seen else whole
        seen.add(whole.data_ptr())
    return table


def bundled(embeddings: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The embeddings under their keys in a file."""
    return {f"{_BUNDLED}{end}": tensor for end, tensor in embeddings.items()}
