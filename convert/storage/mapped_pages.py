"""Releasing the memory of mapped files while their contents are copied.

A page of a mapped file counts as memory of the process from its first use until the file is unmapped. Copying a whole
file would therefore take twice its size, although pages that have been copied are not needed any more.
"""

import ctypes
import mmap
import os
from collections.abc import Collection, Iterable
from pathlib import Path

import torch

from lora_adapters.convert.deltas.base import Delta, tensor_fields

_MAPS = Path("/proc/self/maps")  # exists on Linux only, the only system that releases pages at once
_MOST = 4 << 20  # bytes to copy before the pages are released


class MappedPages:
    """The pages of mapped files that contain the tensors of an adapter.

    The tensors stay valid after a release: their values are read from the file again when needed. They must not have
    been modified in place, since such changes are in the pages only and would be lost. On other systems than Linux, and
    for tensors that are not mapped, this class does nothing.

    Args:
        spans: The first address of each mapping and the address after its last one.
    """

    def __init__(self, spans: Iterable[tuple[int, int]] = ()):
        self._spans, self._used = list(spans), 0

    @classmethod
    def of(cls, path: Path, changes: Collection[Delta]) -> "MappedPages":
        """Find the pages of changes that were read from a file or folder.

        Args:
            path: The file, or the folder, which may have subfolders for components.
            changes: The changes that were read.

        Returns:
            The pages that the changes occupy.
        """
        return cls(span for span in _mapped(path) if _holds(span, changes))

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is in these pages."""
        return any(start <= tensor.data_ptr() < end for start, end in self._spans)

    def use(self, count: int) -> None:
        """Count copied bytes, and release all pages after every 4 MiB.

        Args:
            count: The number of bytes that were copied.
        """
        self._used += count
        if self._used >= _MOST:
            self.give_back()

    def give_back(self) -> None:
        """Release all pages that are in memory."""
        self._used = 0
        for start, end in self._spans:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def _mapped(path: Path) -> list[tuple[int, int]]:
    """The address ranges in which the file, or the files of the folder, are mapped."""
    try:
        lines = _MAPS.read_bytes().splitlines()
    except OSError:
        return []
    files = [*path.glob("*"), *path.glob("*/*")] if path.is_dir() else [path]
    names = {os.fsencode(os.path.realpath(file)) for file in files}
    found = []
    for line in lines:
        # addresses, permissions ("p": private, copy on write), offset, device, inode, path
        parts = line.split(maxsplit=5)
        if len(parts) == 6 and parts[5] in names and parts[1].endswith(b"p"):
            start, end = (int(address, 16) for address in parts[0].split(b"-"))
            found.append((start, end))
    return found


def _holds(span: tuple[int, int], changes: Iterable[Delta]) -> bool:
    """Whether a tensor of one of the changes is in an address range."""
    tensors = (tensor for change in changes for tensor in tensor_fields(change).values())
    return any(span[0] <= tensor.untyped_storage().data_ptr() < span[1] for tensor in tensors)
