"""The memory that mapped files take, given back while what they hold is copied.

A page of a mapped file counts as memory of the process from its first use until the file is unmapped. To copy a whole
file so takes twice its size, although a page that has been copied is not needed any more.
"""

import ctypes
import mmap
import os
from collections.abc import Collection, Iterable
from pathlib import Path

import torch

from lora_adapters.convert.deltas.base import Delta, tensor_fields

_MAPS = Path("/proc/self/maps")  # of Linux alone, which alone drops pages at once
_MOST = 4 << 20  # bytes that are used between two times of giving back


class MappedPages:
    """The pages of mapped files that the tensors of an adapter lie in.

    The tensors stay as they are: what is used again is read from the file again. Their numbers must not have been
    changed in place, since such changes are in the pages and not in the file. Where the system is not Linux, or the
    tensors are not mapped, there are no pages, and nothing happens.

    Args:
        spans: Of each mapping the first address and the one after its last.
    """

    def __init__(self, spans: Iterable[tuple[int, int]] = ()):
        self._spans, self._used = list(spans), 0

    @classmethod
    def of(cls, path: Path, changes: Collection[Delta]) -> "MappedPages":
        """The pages of changes that were read from a file or folder.

        Args:
            path: The file, or the folder, which may have one for each component.
            changes: The changes that were read.

        Returns:
            The pages that the changes occupy.
        """
        return cls(span for span in _mapped(path) if _holds(span, changes))

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in these pages."""
        return any(start <= tensor.data_ptr() < end for start, end in self._spans)

    def use(self, count: int) -> None:
        """Count what was copied; after every 4 MiB of it, all pages are given back.

        Args:
            count: The number of bytes.
        """
        self._used += count
        if self._used >= _MOST:
            self.give_back()

    def give_back(self) -> None:
        """Give back all pages that are in memory at present."""
        self._used = 0
        for start, end in self._spans:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def _mapped(path: Path) -> list[tuple[int, int]]:
    """Where the file, or files of the folder, are mapped."""
    try:
        lines = _MAPS.read_bytes().splitlines()
    except OSError:
        return []
    files = [*path.glob("*"), *path.glob("*/*")] if path.is_dir() else [path]
    names = {os.fsencode(os.path.realpath(file)) for file in files}
    found = []
    for line in lines:
        # addresses, rights ("p": changes stay in this process), offset, device, inode, path
        parts = line.split(maxsplit=5)
        if len(parts) == 6 and parts[5] in names and parts[1].endswith(b"p"):
            start, end = (int(address, 16) for address in parts[0].split(b"-"))
            found.append((start, end))
    return found


def _holds(span: tuple[int, int], changes: Iterable[Delta]) -> bool:
    """Whether a tensor of a change lies there."""
    tensors = (tensor for change in changes for tensor in tensor_fields(change).values())
    return any(span[0] <= tensor.untyped_storage().data_ptr() < span[1] for tensor in tensors)
