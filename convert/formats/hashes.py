"""The hashes by which A1111's extensions identify a file, computed without a copy of the file in memory."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from itertools import chain

import torch

# The safetensors library sorts the tensors of a file by dtype, in this order, and then by name.
_ORDER = {
    name: (number, code)
    for number, (name, code) in enumerate(
        {
            "uint64": "U64", "int64": "I64", "float64": "F64", "complex64": "C64", "float32": "F32", "uint32": "U32",
            "int32": "I32", "bfloat16": "BF16", "float16": "F16", "uint16": "U16", "int16": "I16",
            "float8_e8m0fnu": "F8_E8M0", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "int8": "I8",
            "uint8": "U8", "bool": "BOOL",
        }.items()
    )
}  # fmt: skip
_START, _STOP = 0x100000, 0x110000  # the range of bytes for the legacy hash


def hashes(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The hashes of a file, as A1111's extensions compute them.

    Args:
        tensors: The tensors of the file.
        metadata: The metadata of the file; only entries whose keys begin with ss_ are used.

    Returns:
        sshs_model_hash, the SHA-256 of all bytes after the header; sshs_legacy_hash, the first 8 digits of the SHA-256
        of 64 KiB at the offset 1 MiB, for a file with only the ss_* metadata.
    """
    ss_only = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    ordered = dict(sorted(tensors.items(), key=lambda item: (*_ORDER[_name(item[1])], item[0])))
    whole, short, at = hashlib.sha256(), hashlib.sha256(), 0
    for view in chain([memoryview(_header(ordered, ss_only))], _bytes(ordered)):
        if at:
            whole.update(view)
        short.update(view[max(_START - at, 0) : max(_STOP - at, 0)])
        at += len(view)
    return {"sshs_model_hash": whole.hexdigest(), "sshs_legacy_hash": short.hexdigest()[:8]}


def _name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _header(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    table: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        code = _ORDER[_name(tensor)][1]
        table[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensors: Mapping[str, torch.Tensor]) -> Iterator[memoryview]:
    for tensor in tensors.values():
        yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
