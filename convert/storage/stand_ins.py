"""Replacements for foreign classes in pickles, so that weights can be read without executing foreign code.

A pickle contains names of classes and functions to call. PyTorch's safe reader only allows harmless ones of PyTorch
itself. This module replaces others that occur in files with weights: numpy's scalars and arrays become plain numbers
and tensors, and objects of training programs become empty objects.
"""

from collections.abc import Callable
from typing import Any

import torch

_DTYPES = {
    "f2": torch.float16,
    "f4": torch.float32,
    "f8": torch.float64,
    "i1": torch.int8,
    "i2": torch.int16,
    "i4": torch.int32,
    "i8": torch.int64,
    "u1": torch.uint8,
    "b1": torch.bool,
}


class Inert:
    """An object of a training program, without its contents."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


class Array(Inert):
    """A numpy array. `value` is its tensor, or None for a dtype that PyTorch does not have."""

    value: torch.Tensor | None = None

    def __setstate__(self, state: Any) -> None:
        try:
            _, shape, dtype, is_fortran, data = state
            values = _values(dtype, data)
            if values is not None:
                sizes = tuple(shape)
                self.value = values.reshape(sizes[::-1]).T if is_fortran and len(sizes) == 2 else values.reshape(sizes)
        except (TypeError, ValueError, RuntimeError):  # the state is from another version, or invalid
            self.value = None


class _DType(Inert):
    """A numpy dtype: `name` is its name, such as "f4", or "" for big-endian values."""

    def __init__(self, name: object = "", *_: object) -> None:
        self.name = str(name)

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] == ">":
            self.name = ""


def _values(dtype: object, data: object) -> torch.Tensor | None:
    """Decode the bytes of an array or scalar to a 1-D tensor; None for an unknown dtype."""
    kind = _DTYPES.get(dtype.name) if isinstance(dtype, _DType) else None
    if kind is None or not isinstance(data, bytes):
        return None
    return torch.frombuffer(bytearray(data), dtype=kind) if data else torch.zeros(0, dtype=kind)


def _scalar(dtype: object = None, data: object = b"", *_: object) -> Any:
    """A numpy scalar as a Python number; an inert object for other scalars."""
    values = _values(dtype, data)
    return Inert() if values is None or values.numel() != 1 else values.item()


def _reconstructed(*_: object) -> Array:
    return Array()


def _encoded(text: object = "", encoding: object = "", *_: object) -> object:
    """Bytes, which pickles of old protocols store as text."""
    return text.encode("latin1") if isinstance(text, str) and encoding == "latin1" else Inert()


def _no_bytes(*_: object) -> bytes:
    """Empty bytes, as pickles of old protocols store them for an empty array."""
    return b""


def _table(*_: object) -> dict[object, object]:
    return {}


_OF_NUMPY: dict[str, Callable[..., Any]] = {
    "multiarray.scalar": _scalar,
    "multiarray._reconstruct": _reconstructed,
}
_NOTES = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.ModelCheckpoint",
    "argparse.Namespace",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath",
)
_TABLES = (
    "collections.defaultdict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
)

# The argument of torch.serialization.safe_globals: the replacements, and the names that they replace.
STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    *((of, f"{home}.{name}") for home in ("numpy.core", "numpy._core") for name, of in _OF_NUMPY.items()),
    (Array, "numpy.ndarray"),
    (_DType, "numpy.dtype"),
    (_encoded, "_codecs.encode"),
    *((Inert, name) for name in _NOTES),
    *((_table, name) for name in _TABLES),
    *((_table, f"builtins.{name}") for name in ("dict", "list")),
    (_no_bytes, "builtins.bytes"),
]
