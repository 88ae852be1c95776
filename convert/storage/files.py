"""Safe reading of tensors from untrusted files, and atomic writing of files."""

import re
import secrets
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lora_adapters.convert import parsing
from lora_adapters.convert.errors import AdapterError, first_line
from lora_adapters.convert.parsing import json_value

from . import atomic
from .stand_ins import STAND_INS, Array, Inert

_LONGEST_HEADER = 100_000_000  # bytes, as in the safetensors library


def check_regular(file: Path) -> None:
    """Raise AdapterError if the file is missing, a folder, or a pipe or device, which could block forever."""
    try:
        mode = file.stat().st_mode
    except FileNotFoundError:
        raise AdapterError(f"{file} does not exist") from None
    except (OSError, ValueError) as error:
        raise AdapterError(f"{file} cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if stat.S_ISDIR(mode):
        raise AdapterError(f"{file} is a folder, not a file")
    if not stat.S_ISREG(mode):
        raise AdapterError(f"{file} is a pipe or a device: give a regular file")


def read_text(file: Path) -> str:
    """The text of a configuration file; ValueError if it is not text, AdapterError if it cannot be read."""
    check_regular(file)
    try:
        return parsing.read_text(file)
    except OSError as error:
        raise AdapterError(f"{file} cannot be read ({error.strerror or error})") from None


def is_index(file: Path) -> bool:
    """Whether the file is an index of weights that are split into several files (`<name>.safetensors.index.json`)."""
    return file.name.endswith(".index.json")


def shards(index: Path) -> list[Path]:
    """The files listed in an index; AdapterError if it is not an index, or lists files in other folders."""
    try:
        places = json_value(read_text(index))["weight_map"]
        names = sorted(set(places.values()))
        plain = all(Path(name).name == name for name in names)
    except (ValueError, KeyError, TypeError, AttributeError):
        plain = False
    if not plain:
        raise AdapterError(f"{index} is not an index of weights: it needs a weight_map with files in the same folder")
    return [index.parent / name for name in names]


def read_tensors(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read the tensors of a .safetensors file or a PyTorch pickle, memory-mapped.

    The type of the file is recognised by its first bytes, not by its name. For an index (.index.json), all listed files
    are read. Pickles are read without executing any code (`weights_only`).

    Args:
        file: The file.

    Returns:
        The tensors by name, and the metadata (empty for a pickle).

    Raises:
        AdapterError: The file is missing, truncated, contains anything but named tensors, or is a pickle named
            .safetensors.
    """
    check_regular(file)
    if is_index(file):
        parts = [read_tensors(shard) for shard in shards(file)]
        joined = {name: tensor for tensors, _ in parts for name, tensor in tensors.items()}
        if len(joined) != sum(len(tensors) for tensors, _ in parts):
            raise AdapterError(f"{file}: two of its files contain a tensor of the same name")
        return joined, {key: text for _, metadata in parts for key, text in metadata.items()}
    try:
        if is_safetensors(file):
            with safe_open(file, framework="pt") as opened:
                names = opened.keys()  # the file object itself is not iterable
                return {name: opened.get_tensor(name) for name in names}, dict(opened.metadata() or {})
    except SafetensorError as error:
        raise AdapterError(f"{file} is truncated or not a safetensors file ({first_line(error)})") from None
    except OSError as error:
        raise AdapterError(f"{file} cannot be read ({error.strerror or error})") from None
    except Exception as error:  # such as a dtype that this PyTorch does not have, or a name that is not text
        raise AdapterError(f"{file} has contents that cannot be read ({first_line(error)})") from None
    if file.suffix.lower() == ".safetensors":
        if _is_pickle(file):
            raise AdapterError(f"{file} is a PyTorch pickle despite its name: rename it to .ckpt")
        raise AdapterError(f"{file} is truncated or not a safetensors file")
    loaded = load_plain(file)
    if isinstance(loaded, dict):
        loaded = loaded.get("state_dict", loaded)
    if not isinstance(loaded, dict):
        raise AdapterError(f"{file} contains {_described(loaded)}, not a dictionary of tensors")
    loaded = _tensors_of(loaded)
    for name, tensor in loaded.items():
        if not isinstance(tensor, torch.Tensor):
            raise AdapterError(f"{file}: {name!s:.80} is {_described(tensor)}, not a tensor: remove it from the file")
        if not isinstance(name, str) or not _is_plain(tensor):
            raise AdapterError(f"{file}: {name!s:.80} is not a dense tensor with a text as its name")
    # Materialise lazily conjugated or negated views; both calls return other tensors unchanged.
    return {name: tensor.detach().resolve_conj().resolve_neg() for name, tensor in loaded.items()}, {}


_DEEPEST = 4  # the maximum number of nested dictionaries around the tensors


def _tensors_of(table: dict[Any, Any]) -> dict[Any, Any]:
    """The tensors of a pickle, which may be in a nested dictionary; alphas that are numbers become tensors.

    Numbers, strings and None under names without a dot, such as `epoch`, are notes of the training and are left out.
    """
    for _ in range(_DEEPEST):
        if any(isinstance(value, torch.Tensor | Array) for value in table.values()):
            break
        tables = [value for value in table.values() if isinstance(value, dict) and value]
        inner = [value for value in tables if _holds_tensors(value)] or tables
        if len(inner) != 1:
            break
        table = inner[0]
    found: dict[Any, Any] = {}
    for name, value in table.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and str(name).endswith(".alpha"):
            found[name] = torch.tensor(float(value))
        elif isinstance(value, Array):
            found[name] = value if value.value is None else value.value
        elif "." in str(name) or not isinstance(value, int | float | str | None):
            found[name] = value
    return found


def _holds_tensors(table: dict[Any, Any]) -> bool:
    return all(isinstance(value, torch.Tensor | Array) or str(name).endswith(".alpha") for name, value in table.items())


def _described(value: object) -> str:
    """Describe a value for an error message."""
    name = "an object of a training program" if isinstance(value, Inert) else f"of the type {type(value).__name__}"
    return f"{name} ({value!s:.40})" if isinstance(value, int | float | str) else name


def is_safetensors(file: Path) -> bool:
    """Whether a file begins like a safetensors file: with the length of the header (8 bytes) and a brace."""
    with file.open("rb") as opened:
        start = opened.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= _LONGEST_HEADER


def _is_pickle(file: Path) -> bool:
    """Whether a file begins like one of torch.save: a zip archive, or, before PyTorch 1.6, a pickle of protocol 2."""
    with file.open("rb") as opened:
        return opened.read(4).startswith((b"PK\x03\x04", b"\x80\x02"))


def load_plain(file: Path, mapped: bool = True) -> Any:
    """Load a PyTorch pickle to the CPU without executing any code in it.

    Args:
        file: The file.
        mapped: Memory-map the tensors if the file allows it.

    Returns:
        The object in the file, usually a dictionary.

    Raises:
        AdapterError: The file cannot be read, or contains objects that are not plain data.
    """
    check_regular(file)
    try:
        with file.open("rb") as opened:
            if opened.read(4) == b"GGUF":
                raise AdapterError(f"{file} is a GGUF file with quantised weights: use the model in fp16 or bf16")
        with torch.serialization.safe_globals(STAND_INS):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped and _can_be_mapped(file))
    except AdapterError:
        raise
    except OSError as error:
        raise AdapterError(f"{file} cannot be read ({error.strerror or error})") from None
    except Exception as error:  # PyTorch's unpickler raises almost anything on damaged files
        reason = first_line(error)
        if "weights_only" in str(error):
            strange = re.search(r"GLOBAL (\S+)", str(error))
            reason = f"it contains {strange[1] if strange else 'an object'}, which is not data and could run code"
            reason += "" if strange else "; supported are .safetensors and files of torch.save"
        raise AdapterError(f"{file} cannot be read as plain weights ({reason})") from None


# Limits of the unpacked size of compressed members: the larger of 256 MiB and 8 times the size of the file.
_MOST_UNPACKED = 256 << 20  # bytes
_MOST_TIMES = 8  # weights never compress so well


def _can_be_mapped(file: Path) -> bool:
    """Whether a pickle can be memory-mapped: it must be an uncompressed zip archive (since PyTorch 1.6).

    Raises AdapterError for an archive with a password, and for one that would unpack to far more than its size.
    """
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
    if any(member.flag_bits & 1 for member in members):
        raise AdapterError(f"{file} is an archive with a password, which is not supported")
    packed = [member for member in members if member.compress_type != zipfile.ZIP_STORED]
    size = sum(member.file_size for member in packed)
    if size > max(_MOST_UNPACKED, _MOST_TIMES * file.stat().st_size):
        raise AdapterError(f"{file} would unpack to {size / 1e9:.1f} GB, far more than weights can: it is not read")
    return not packed


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is dense and stores all of its values: with stride 0 a few bytes can pose as terabytes."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


@contextmanager
def replacing(target: Path, durable: bool = False) -> Iterator[Path]:
    """Like `atomic.replacing`; AdapterError if the folder cannot be written to or the disk is full."""
    if target.exists() and not target.is_file() and not target.is_dir():
        raise AdapterError(f"{target} is a pipe or a device: give a regular file")
    try:
        with atomic.replacing(target, durable) as partial:
            yield partial
    except IsADirectoryError:
        raise AdapterError(f"{target} is a folder: give a file in it") from None
    except SafetensorError as error:
        raise AdapterError(f"{target} cannot be written ({error})") from None
    except OSError as error:
        raise AdapterError(f"{target} cannot be written ({error.strerror or error})") from None


@contextmanager
def all_or_none(folder: Path) -> Iterator[Path]:
    """Write several files into a folder, all of them or none.

    They replace existing files of the same name.

    Args:
        folder: The folder; created if it is missing.

    Yields:
        An empty temporary folder in `folder` to write to. Its files are moved to `folder` when the block ends without
        an error, and deleted otherwise.

    Raises:
        AdapterError: The folder cannot be written to, or contains a folder with the name of a new file.
    """
    made = [part for part in (folder, *folder.parents) if not part.exists()]
    own = folder / f".{secrets.token_hex(4)}.partial"
    try:
        own.mkdir(parents=True)
        yield own
        made = []
        for file in sorted(own.rglob("*")):
            target = folder / file.relative_to(own)
            if file.is_dir():
                target.mkdir(exist_ok=True)
            elif target.is_dir():
                raise AdapterError(f"{target} is a folder, but a file of that name is to be written")
        for file in [file for file in own.rglob("*") if file.is_file()]:
            target = folder / file.relative_to(own)
            if target.exists():
                file.chmod(target.stat().st_mode)
            atomic.move(file, target)
    except OSError as error:
        raise AdapterError(f"{folder} cannot be written to ({error.strerror or error})") from None
    finally:
        atomic.delete_folder(own)
        with suppress(OSError):
            for part in made:  # delete the folders that were created before the error
                part.rmdir()


def save_pickle(table: Any, file: Path) -> None:
    """`torch.save`, with an OSError if the disk is full; the file is then closed, so that it can be deleted."""
    with file.open("wb") as opened:
        try:
            torch.save(table, opened)
        except RuntimeError as error:  # raised by torch.save if the disk is full
            raise OSError(f"the disk may be full: {first_line(error)}") from error
