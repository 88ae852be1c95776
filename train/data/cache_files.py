"""Caches of latents and text-encoder outputs next to the images, in files that are compatible with kohya's scripts.

`<stem>_<width>x<height>_<family>.npz` (size of the image, with at least four digits) contains an entry for each bucket
size: `latents_<h>x<w>` (height and width in latent pixels) and, with the same suffix, original_size, crop_ltrb and
optionally latents_flipped and alpha_mask. Files of older versions have one entry without a suffix.
`<stem>_te_outputs.npz` contains text-encoder outputs. Additional keys, which kohya's scripts do not write, record what
an entry was made from (vae, interpolation, and as "picture" the date and size of the image file; caption, encoder). An
entry without them is assumed to be valid. `checksum` ties these keys to the latents, since another program may replace
the latents without updating the keys.
"""

import contextlib
import hashlib
import io
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_adapters.convert.errors import first_line
from lora_adapters.convert.storage.atomic import replacing
from lora_adapters.train.data.buckets import Size
from lora_adapters.train.data.config import VAE_FACTOR
from lora_adapters.train.data_error import DataError

_ENCODER = ("encoder.", "quant_conv.")
TEXT_ENDING = "_te_outputs.npz"
_FILE = "picture"  # key of the image file's date and size; another name would invalidate existing caches
_OF_ENTRY = (
    "latents", "latents_flipped", "alpha_mask", "original_size", "crop_ltrb",
    "vae", "interpolation", _FILE, "checksum",
)  # fmt: skip
LARGEST = 1 << 30  # maximum bytes of an array: a small compressed file may claim to contain terabytes


@dataclass(frozen=True)
class CachedLatents:
    """Unscaled float32 latents (c, height/8, width/8) of an image and its mirror image, and a mask (height, width)."""

    latents: torch.Tensor
    flipped: torch.Tensor | None = None
    mask: torch.Tensor | None = None


@dataclass(frozen=True)
class LatentsRequest:
    """What an entry of a latents file must match to be used. Sizes are (width, height).

    `modified` (ns) and `length` (bytes) describe the image file; `interpolation` is resize_interpolation.
    """

    size: Size
    bucket: Size
    flip: bool
    alpha_mask: bool
    vae: str
    modified: int = 0
    length: int = 0
    interpolation: str = ""


@dataclass(frozen=True)
class LatentFiles:
    """The names and content of a family's latent cache files.

    Args:
        ending: The part of a file's name after the size, such as "_sd.npz".
        unsized: The ending of older files, whose names have no size; None for a family without such files.
        normalised: Whether the files contain latents normalised for the denoiser, instead of the VAE's latents.
    """

    ending: str
    unsized: str | None = None
    normalised: bool = False

    def path(self, stem: str, size: Size) -> str:
        """The file for the latents of the image at `stem` (its path without suffix)."""
        return f"{stem}_{size[0]:04d}x{size[1]:04d}{self.ending}"

    def existing(self, stem: str, request: LatentsRequest, *, check: bool) -> str | None:
        """The usable file, or None. Without `check` any file with latents of the bucket's size is usable."""
        if self.unsized is not None and latents_fit(f"{stem}{self.unsized}", request):
            return f"{stem}{self.unsized}"
        path = self.path(stem, request.size)
        usable = latents_fit(path, request) if check else _has_latents(path, request.bucket)
        return path if usable else None


def _has_latents(path: str, bucket: Size) -> bool:
    try:
        with opened(path) as file:
            _entry(file, bucket)
            return True
    except Exception:  # of many kinds: see opened
        return False


def _entry(file: Any, bucket: Size) -> str:
    """The suffix of the keys of this bucket's entry in an open file; KeyError if there is none."""
    height, width = bucket[1] // VAE_FACTOR, bucket[0] // VAE_FACTOR
    for suffix in (f"_{height}x{width}", ""):
        if f"latents{suffix}" in file and _shape(file, f"latents{suffix}")[-2:] == (height, width):
            return suffix
    raise KeyError(f"latents_{height}x{width}")


def latents_fit(path: str, request: LatentsRequest) -> bool:
    """Whether a file has an entry that matches the request: the present image file, the VAE and the options."""
    shape = (request.bucket[1] // VAE_FACTOR, request.bucket[0] // VAE_FACTOR)
    try:
        with opened(path) as file:
            of = {name: name + _entry(file, request.bucket) for name in _OF_ENTRY}
            if of[_FILE] in file:
                if tuple(file[of[_FILE]].tolist()) != (request.modified, request.length):
                    return False
            elif os.stat(path).st_mtime_ns < request.modified:
                return False
            if of["checksum"] in file and int(file[of["checksum"]]) != _stored_checksum(file, of["latents"]):
                return False
            if tuple(int(side) for side in file[of["original_size"]]) != request.size or of["crop_ltrb"] not in file:
                return False
            for name in ("vae", "interpolation"):
                if of[name] in file and str(file[of[name]]) != getattr(request, name):
                    return False
            if of["alpha_mask"] in file and not request.alpha_mask:
                return False  # the mask would be read and applied to the loss
            mask_fits = not request.alpha_mask or _shape(file, of["alpha_mask"]) == request.bucket[::-1]
            return mask_fits and (not request.flip or _shape(file, of["latents_flipped"])[-2:] == shape)
    except Exception:  # of many kinds: see opened
        return False


def read_latents(path: str, bucket: Size) -> CachedLatents:
    """Read the entry for a bucket (width, height) of a latents file; DataError if it is missing or damaged."""
    try:
        with opened(path) as file:
            suffix = _entry(file, bucket)
            latents, flipped, mask = (
                torch.from_numpy(file[name + suffix]).float() if name + suffix in file else None
                for name in ("latents", "latents_flipped", "alpha_mask")
            )
    except KeyError:
        raise DataError(
            f"{path}: no latents for a {bucket[0]}x{bucket[1]} bucket; delete the file, or leave out --skip_cache_check"
        ) from None
    except Exception as error:  # of many kinds: see opened
        raise DataError(f"{path}: damaged latents cache ({first_line(error)}); delete the file") from None
    if latents is None or not torch.isfinite(latents).all():
        raise DataError(f"{path}: contains NaN; delete the file")
    return CachedLatents(latents, flipped, mask)


def write_latents(path: str, cached: CachedLatents, request: LatentsRequest, *, keep_all: bool = False) -> None:
    """Write the entry for a bucket into a latents file, atomically. Entries for other buckets are kept.

    Args:
        path: The .npz file.
        cached: The latents, and those of the flipped image and the mask if there are any.
        request: The image and the options that the latents were made with; stored for later checks.
        keep_all: Keep entries without `picture` even if the file is older than the image. By default these are removed,
            since the new date of the file no longer shows that they are outdated.
    """
    latents = cached.latents.float().numpy()
    entry: dict[str, Any] = {
        "latents": latents,
        "original_size": np.array(request.size),
        "crop_ltrb": np.array(_box_in_bucket(request.bucket, request.size)),
        "vae": np.array(request.vae),
        "interpolation": np.array(request.interpolation),
        _FILE: np.array([request.modified, request.length], np.int64),
        "checksum": np.array(_checksum(latents)),
    }
    if cached.flipped is not None:
        entry["latents_flipped"] = cached.flipped.float().numpy()
    if cached.mask is not None:
        entry["alpha_mask"] = cached.mask.float().numpy()
    suffix = "_{}x{}".format(*latents.shape[-2:])
    others = _other_entries(path, suffix, 0 if keep_all else request.modified)
    write_npz(path, others | {name + suffix: array for name, array in entry.items()})


def _other_entries(path: str, suffix: str, modified: int) -> dict[str, Any]:
    """The arrays of a latents file, without those of the entry `suffix` and of outdated entries (`write_latents`)."""
    try:
        outdated = os.stat(path).st_mtime_ns < modified
        with opened(path) as file:
            replaced = {name + suffix for name in _OF_ENTRY}
            return {
                name: file[name]
                for name in file
                if name not in replaced and not (outdated and f"{_FILE}{_suffix(name)}" not in file)
            }
    except Exception:  # many kinds, see `opened`: the file does not exist, or is damaged and will be replaced
        return {}


def _suffix(name: str) -> str:
    match = re.search(r"_[0-9]+x[0-9]+$", name)
    return match[0] if match else ""


def _checksum(array: np.ndarray) -> int:
    """The checksum that an .npz file stores for this array."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array)
    return zlib.crc32(buffer.getvalue())


def _stored_checksum(file: Any, name: str) -> int:
    """The checksum of an array in an open .npz file, from the archive's directory."""
    return file.zip.getinfo(f"{name}.npy").CRC


def read_text(path: str) -> dict[str, torch.Tensor]:
    """Read text-encoder outputs from a file; DataError if it is damaged."""
    try:
        with opened(path) as file:
            return {name: torch.from_numpy(file[name]).float() for name in file if name not in ("caption", "encoder")}
    except Exception as error:  # of many kinds: see opened
        raise DataError(f"{path}: damaged text-encoder cache ({first_line(error)}); delete the file") from None


def text_fits(path: str, caption: str, encoder: str, like: Mapping[str, torch.Tensor]) -> bool:
    """Whether a file has usable text-encoder outputs for a caption.

    Args:
        path: The .npz file.
        caption: The caption that the outputs must be made from.
        encoder: The identity of the text encoders.
        like: Tensors with the expected names and shapes. Scalars record options, and must be equal.

    Returns:
        Whether it is usable; False for a missing or damaged file.
    """
    try:
        with opened(path) as file:
            same = all(name not in file or str(file[name]) == text for name, text in _origin(caption, encoder).items())
            return same and all(
                file[name].shape == tuple(value.shape) and (value.dim() > 0 or float(file[name]) == float(value))
                for name, value in like.items()
            )
    except Exception:  # of many kinds: see opened
        return False


def write_text(path: str, outputs: Mapping[str, torch.Tensor], caption: str, encoder: str) -> None:
    """Write text-encoder outputs in float32, atomically."""
    arrays = {name: value.float().numpy() for name, value in outputs.items()}
    write_npz(path, arrays | {name: np.array(text) for name, text in _origin(caption, encoder).items()})


def write_npz(path: str, arrays: Mapping[str, Any]) -> None:
    """Write an uncompressed .npz file atomically."""
    try:
        with replacing(Path(path)) as partial, partial.open("wb") as file:
            np.savez(file, **arrays)
    except OSError as error:
        raise DataError(f"{path}: cannot write the cache ({error.strerror or error})") from None


@contextlib.contextmanager
def opened(path: str) -> Iterator[Any]:
    """Open an .npz file, whose arrays are read on access.

    Args:
        path: The file.

    Yields:
        The arrays by name, as `numpy.load` returns them.

    Raises:
        ValueError: The file is not an archive, or an array is too large. For damaged files, numpy and zipfile may raise
            almost any other exception.
    """
    with np.load(path, allow_pickle=False) as file:
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("not an .npz archive")
        for member in file.zip.infolist() if file.zip is not None else ():
            if member.file_size > LARGEST:
                raise ValueError(f"{member.filename} has {member.file_size} bytes, more than {LARGEST}")
        yield file


def vae_identity(vae: torch.nn.Module) -> str:
    """A short hash of the VAE encoder's weights, equal for the same VAE in float32 and float16."""
    return _identity((name, value) for name, value in vae.state_dict().items() if name.startswith(_ENCODER))


def text_identity(encoders: Iterable[torch.nn.Module]) -> str:
    """A short hash of all weights of the text encoders, including merged adapters."""
    return _identity(
        (f"{i}.{name}", value) for i, encoder in enumerate(encoders) for name, value in encoder.state_dict().items()
    )


def _identity(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(weights, key=lambda item: item[0]):
        digest.update(name.encode() + value.detach().half().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _shape(file: Any, name: str) -> tuple[int, ...]:
    """The shape of an array in an open .npz file, read from its header; KeyError if it is missing."""
    with file.zip.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return read(member)[0]


def _origin(caption: str, encoder: str) -> dict[str, str]:
    # numpy strings drop trailing NULs, but captions have none.
    return {"caption": caption, "encoder": encoder}


def _box_in_bucket(bucket: Size, size: Size) -> tuple[float, float, float, float]:
    """crop_ltrb as other programs expect it: the box of the whole image, fitted into the bucket and centred.

    It is not the box of the actual crop, which is computed from both sizes when it is needed.
    """
    scale = min(bucket[0] / size[0], bucket[1] / size[1])
    width, height = size[0] * scale, size[1] * scale
    left, top = (bucket[0] - width) // 2, (bucket[1] - height) // 2
    return left, top, left + width, top + height
