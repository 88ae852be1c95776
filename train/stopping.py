"""Signals that stop training: the step is finished, the state is saved, and the exit status is 128 + the signal."""

import contextlib
import os
import signal
import time
from types import FrameType
from typing import TYPE_CHECKING, Any

from lora_adapters.convert.errors import StoppedError

if TYPE_CHECKING:  # not imported for --help
    import torch

# Ctrl-C, the signal of batch systems and containers before they kill, and a closed terminal (not on Windows).
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

SAME = 5.0  # seconds within which repeated signals count as one


class Interrupted(StoppedError):
    """A signal stopped the run. `number`: the signal. `resume_from`: the state for --resume, or None."""

    def __init__(self, number: int, resume_from: str | None = None):
        super().__init__(number)
        self.number, self.resume_from = number, resume_from
        self.status = 128 + number

    def __str__(self) -> str:
        name = signal.Signals(self.number).name
        if self.resume_from is None:
            return f"stopped by {name}; saved files and states are whole"
        return f"stopped by {name}; the state is saved, continue with --resume={self.resume_from}"


class StopSignals:
    """A context in which the first of SIGNALS is stored in `asked`, to stop after the step; a later one stops at once.

    A launcher forwards signals that its processes have received already, so signals within SAME seconds count as one.
    With `at_once` the first signal stops at once too. Ignored signals, as under nohup, stay ignored. Outside of the
    main thread, where Python handles no signals, this does nothing.
    """

    def __init__(self, at_once: bool = False):
        self.at_once, self.asked, self.since = at_once, 0, 0.0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        with contextlib.suppress(ValueError):  # not in the main thread
            for number in SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self.before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def flags(self, device: "torch.device | str") -> "torch.Tensor":
        """One-hot encoding (len(SIGNALS),) of the received signal, to be summed over processes."""
        import torch

        return torch.stack([torch.full((), float(self.asked == number), device=device) for number in SIGNALS])

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.at_once or (self.asked and time.monotonic() - self.since >= SAME):
            raise Interrupted(number)
        if self.asked:
            return
        self.asked, self.since = number, time.monotonic()
        name = signal.Signals(number).name
        with contextlib.suppress(OSError):  # logging is not safe in a handler, and the terminal may be closed
            os.write(2, f"\n{name}: stopping after this step; send it again to stop at once\n".encode())


def signalled(flags: list[float]) -> int:
    """The signal that any process has received, from the sum or mean of all processes' flags; 0 if there is none."""
    return next((int(number) for number, flag in zip(SIGNALS, flags, strict=True) if flag > 0), 0)


def ignore_signals(_: int = 0) -> None:
    """Ignore signals in worker processes, which the main process ends: a signal to the group must not kill them."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
