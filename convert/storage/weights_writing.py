"""Writing large weights files tensor by tensor, so that memory use does not grow with the file.

A .safetensors file consists of the header's length (8 bytes), the header (JSON, padded with spaces), and the tensors.
"""

import errno
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch

from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.progress import progress

from .atomic import aside, delete
from .files import read_tensors, replacing, save_pickle

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.complex64: "C64",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}  # fmt: skip
if hasattr(torch, "float8_e8m0fnu"):  # since PyTorch 2.7
    _NAMES[torch.float8_e8m0fnu] = "F8_E8M0"


class Planned(NamedTuple):
    """A tensor to write: its dtype and shape, and a function that computes it when it is written."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]
    late: bool = False  # computed after all others, because it depends on another one

    @classmethod
    def copy(cls, tensor: torch.Tensor) -> "Planned":
        """A plan that writes a tensor unchanged."""
        return cls(tensor.dtype, tuple(tensor.shape), lambda: tensor)

    @property
    def size(self) -> int:
        """The size in bytes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def _header(tensors: Mapping[str, Planned], metadata: Mapping[str, str]) -> bytes:
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise AdapterError(f"{name} is {tensor.dtype}, which .safetensors cannot store")
        offsets = [at, at + tensor.size]
        table[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        at = offsets[1]
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class _Flusher:
    """Flushes written data to the disk in the background, so that the last fsync is fast."""

    def __init__(self, descriptor: int, every: int = 128 << 20) -> None:
        self.descriptor, self.every, self.waiting = descriptor, every, 0
        self.worker = ThreadPoolExecutor(1)

    def __enter__(self) -> "_Flusher":
        return self

    def __exit__(self, *error: object) -> None:
        self.worker.shutdown(cancel_futures=True)

    def wrote(self, size: int) -> None:
        """Count written bytes."""
        self.waiting += size
        if self.waiting >= self.every:
            self.waiting = 0
            self.worker.submit(os.fsync, self.descriptor)


def stream(file: Path, tensors: Mapping[str, Planned], metadata: Mapping[str, str]) -> None:
    """Write a .safetensors file, computing each tensor only when it is written."""
    # Wide dtypes first, so that all tensors are aligned to their dtype, for readers that map the file.
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    with file.open("wb") as out, _Flusher(out.fileno()) as flusher:
        header = _header(ordered, metadata)
        out.write(header)
        starts = accumulate((planned.size for planned in ordered.values()), initial=len(header))
        start_of = dict(zip(ordered, starts, strict=False))  # the last one is the end
        in_turn = sorted(ordered.items(), key=lambda item: item[1].late)
        for name, planned in progress(in_turn, "writing", len(ordered)):
            tensor = planned.make()
            assert tensor.dtype == planned.dtype, name
            assert tuple(tensor.shape) == planned.shape, name
            if tensor.numel():
                out.seek(start_of[name])
                _write_bytes(out, tensor, name)
                flusher.wrote(planned.size)


def _write_bytes(out: BinaryIO, tensor: torch.Tensor, name: str) -> None:
    try:
        out.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    except OSError as error:
        if error.errno == errno.EFAULT:  # a mapped source file was truncated
            raise AdapterError(f"{name} cannot be read: its file was truncated meanwhile") from None
        raise


def write(
    target: Path,
    tensors: Mapping[str, Planned],
    metadata: Mapping[str, str],
    wrapped: bool = True,
    replaces: bool | None = None,
) -> None:
    """Write a weights file in the format of its suffix: .safetensors, or a pickle for any other.

    A pickle is made from a temporary .safetensors file, which is streamed and then mapped, so that the tensors need not
    fit into memory together.

    Args:
        target: The file to write.
        tensors: The tensors by name; each is computed when it is written.
        metadata: Entries for the header of a .safetensors file; pickles have none.
        wrapped: Put the tensors of a pickle under the key `state_dict`, as in the checkpoints of Stable Diffusion.
        replaces: Flush the new file to the disk before the rename, because an old file is deleted for it. None means
            True if `target` exists.

    Raises:
        AdapterError: A tensor has a dtype that .safetensors does not support, or its source changed while it was read.
    """
    replaces = target.exists() if replaces is None else replaces
    with replacing(target, durable=replaces) as partial:
        if target.suffix == ".safetensors":
            stream(partial, tensors, metadata)
        else:
            _write_pickle(partial, tensors, wrapped)


def _write_pickle(file: Path, tensors: Mapping[str, Planned], wrapped: bool) -> None:
    streamed = aside(file, "safetensors")
    table: dict[str, torch.Tensor] = {}
    try:
        stream(streamed, tensors, {})
        read, _ = read_tensors(streamed)
        # torch.save fails for mapped empty tensors, which all seem to share their memory.
        table.update((name, read[name] if read[name].numel() else read[name].clone()) for name in tensors)
        read.clear()
        save_pickle({"state_dict": table} if wrapped else table, file)
    finally:
        table.clear()  # Windows cannot delete a mapped file
        delete(streamed)
