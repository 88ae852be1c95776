"""Loads the batches of an epoch with torch's DataLoader, in this process or in worker processes."""

import atexit
import logging
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from lora_adapters.train.data.batches import Batch
from lora_adapters.train.data.loader import BatchReader, Order
from lora_adapters.train.data_error import DataError
from lora_adapters.train.stopping import ignore_signals

logger = logging.getLogger(__name__)


class EpochLoader:
    """Runs a BatchReader in torch's DataLoader. Persistent workers stay alive between epochs.

    damaged: the images that could not be used so far: name -> reason.
    """

    def __init__(self, reader: BatchReader, persistent: bool, pin_memory: bool) -> None:
        self.reader, self.persistent, self.pin_memory = reader, persistent, pin_memory
        self.orders = _Orders()
        self.loader: DataLoader | None = None
        self.damaged: dict[str, str] = {}
        self._running: list[list[Any]] = []  # lists with one iterator each, emptied when it is closed
        _loaders.add(self)

    def restart(self) -> None:
        """Discard workers, which have an older state of the reader."""
        self.loader = None

    def close(self) -> None:
        """End the worker processes. Iterators of `batches` end too.

        Workers ignore signals: without this, the program would wait for them when it exits.
        """
        for running in self._running:
            for iterator in running:
                # A traceback may keep the iterator alive, which would delay its own shutdown.
                getattr(iterator, "_shutdown_workers", lambda: None)()
            running.clear()
        self.loader = None

    def batches(self, epoch: int, start: int, rank: int, world_size: int, workers: int) -> Iterator[Batch]:
        """The batches of an epoch. Arguments: see `TrainingData.batches`."""
        self.orders.orders = self.reader.orders(epoch, start, rank, world_size)
        if self.loader is None or self.loader.num_workers != workers:
            self.loader = DataLoader(
                self.reader,
                batch_size=None,
                sampler=self.orders,
                num_workers=workers,
                collate_fn=_itself,
                worker_init_fn=ignore_signals,
                persistent_workers=self.persistent and workers > 0,
                pin_memory=self.pin_memory,
                generator=torch.Generator(),  # otherwise each epoch would draw from torch's global generator
            )
        running = [iter(self.loader)]
        self._running.append(running)
        try:
            while running and (batch := next(running[0], None)) is not None:
                if isinstance(batch, DataError):
                    raise batch
                self._note(batch.damaged)
                yield batch
        finally:
            running.clear()
            self._running = [other for other in self._running if other is not running]

    def _note(self, damaged: dict[str, str]) -> None:
        for name, reason in damaged.items():
            if name not in self.damaged:
                self.damaged[name] = reason
                logger.warning("another image is used in place of %s", reason)


class _Orders(Sampler):
    """The orders of the current epoch, which a DataLoader that lives for several epochs reads at the start of each."""

    def __init__(self) -> None:
        self.orders: list[Order] = []

    def __iter__(self) -> Iterator[Order]:
        return iter(self.orders)

    def __len__(self) -> int:
        return len(self.orders)


def _itself(batch: Any) -> Any:
    return batch


_loaders: weakref.WeakSet[EpochLoader] = weakref.WeakSet()


@atexit.register  # runs before the handlers of torch and multiprocessing, registered earlier, which wait for workers
def _close_all() -> None:
    for loader in list(_loaders):
        loader.close()
