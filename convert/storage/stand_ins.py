"""What stands in for foreign objects in pickles, so that weights beside them are read and no code of theirs is run.

A pickle names classes and functions, and what to call these with. PyTorch calls the harmless ones of its own alone;
here are others that weights come with: numpy's numbers and arrays, which become plain numbers and tensors, and the
notes of training programs, which become nothing.
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
    """An object of a training program, without what it held."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


class Array(Inert):
    """A numpy array. `value` is its tensor, or None for a dtype that PyTorch has not."""

    value: torch.Tensor | None = None

    def __setstate__(self, state: Any) -> None:
        try:
            _, shape, dtype, is_fortran, data = state
            values = _values(dtype, data)
            if values is not None:
                sizes = tuple(shape)
                self.value = values.reshape(sizes[::-1]).T if is_fortran and len(sizes) == 2 else values.reshape(sizes)
        except (TypeError, ValueError, RuntimeError):  # a state of another version, or one that was made up
            self.value = None


class _DType(Inert):
    """A numpy dtype: its name, such as "f4", for numbers in the order of bytes that all usual machines have."""

    def __init__(self, name: object = "", *_: object) -> None:
        self.name = str(name)

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] == ">":
            self.name = ""


def _values(dtype: object, data: object) -> torch.Tensor | None:
    """The numbers in the bytes of an array or scalar, in one dimension; None if they are of no known dtype."""
    kind = _DTYPES.get(dtype.name) if isinstance(dtype, _DType) else None
    if kind is None or not isinstance(data, bytes):
        return None
    return torch.frombuffer(bytearray(data), dtype=kind) if data else torch.zeros(0, dtype=kind)


def _scalar(dtype: object = None, data: object = b"", *_: object) -> Any:
    """A numpy number, as Python's; an inert object for other scalars."""
    values = _values(dtype, data)
    return Inert() if values is None or values.numel() != 1 else values.item()


def _reconstructed(*_: object) -> Array:
    return Array()


def _encoded(text: object = "", encoding: object = "", *_: object) -> object:
    """The bytes that pickles of old protocols write as text."""
    return text.encode("latin1") if isinstance(text, str) and encoding == "latin1" else Inert()


def _no_bytes(*_: object) -> bytes:
    """What pickles of old protocols write for an array without numbers."""
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

# What PyTorch's reading of pickles takes: what stands in, and the name that it stands for.
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
