"""Reading tensors from files without trusting them, and writing files that are whole or not there."""

import os
import pickle
import secrets
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .errors import AdapterError


def read_tensors(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors of a .safetensors file or of a PyTorch pickle, memory-mapped, and the metadata ({} of a pickle).

    Pickles are read without executing anything (`weights_only`). AdapterError where the file is missing, truncated,
    or not what its ending says.
    """
    if file.is_dir():
        raise AdapterError(f"{file} is a folder, not a file")
    if not file.exists():
        raise AdapterError(f"{file} does not exist")
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                names = opened.keys()  # not a dict: it has no iterator of its own
                return {name: opened.get_tensor(name) for name in names}, dict(opened.metadata() or {})
        # Pickles from before PyTorch 1.6 are no zip archives and cannot be mapped.
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except SafetensorError as error:
        raise AdapterError(f"{file} is truncated or no safetensors file ({error})") from None
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise AdapterError(f"{file} cannot be read as plain weights ({reason})") from None
    except OSError as error:
        raise AdapterError(f"{file} cannot be read ({error.strerror or error})") from None
    if isinstance(loaded, dict):
        loaded = loaded.get("state_dict", loaded)
    if not isinstance(loaded, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in loaded.values()):
        raise AdapterError(f"{file} holds no table of named tensors")
    return loaded, {}


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path beside `target` to write to; renamed to it when the block ends well, removed when it does not.

    The target's folder is made where it is missing. Until the rename, an existing target stays as it was. AdapterError
    where the folder cannot be written to or the disk is full.
    """
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise AdapterError(f"{target} is a folder: name a file in it")
        yield partial
        partial.replace(target)
    except SafetensorError as error:
        raise AdapterError(f"{target} cannot be written ({error})") from None
    except OSError as error:
        raise AdapterError(f"{target} cannot be written ({error.strerror or error})") from None
    finally:
        with suppress(OSError):  # it is not there, or its folder is none: what went wrong is told by now
            partial.unlink(missing_ok=True)


def sync(file: Path) -> None:
    """Ask the system to bring a written file to the disk, so that the rename after it cannot come first."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
