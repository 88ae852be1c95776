"""Signals that end a training: the step is finished, the state is written, and the exit status is 128 + the signal."""

import contextlib
import os
import signal
import time
from types import FrameType
from typing import TYPE_CHECKING, Any

from lora_adapters.convert.errors import StoppedError

if TYPE_CHECKING:  # the programs' --help does without it
    import torch

# Ctrl-C, what batch systems and containers send before they kill, and a terminal that is closed (not on Windows).
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

SAME = 5.0  # seconds


class Interrupted(StoppedError):
    """A signal ended the run. `number` is the signal's, `resume_from` what --resume can be given, if anything."""

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
    """Within it the first of SIGNALS is noted in `asked`, for the end of the step; a later one ends the run at once.

    A launcher passes on what its processes have received already: within SAME seconds it is the same signal.
    at_once: the first one does so, too. A signal that is ignored, as under nohup, stays ignored. Outside of the main
    thread, where Python handles no signals, nothing is changed.
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
        """A one for the signal that was noted, a zero for each other one (len(SIGNALS),): to be added up."""
        import torch

        return torch.stack([torch.full((), float(self.asked == number), device=device) for number in SIGNALS])

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.at_once or (self.asked and time.monotonic() - self.since >= SAME):
            raise Interrupted(number)
        if self.asked:
            return
        self.asked, self.since = number, time.monotonic()
        name = signal.Signals(number).name
        with contextlib.suppress(OSError):  # logging is not safe within a handler, and the terminal may be gone
            os.write(2, f"\n{name}: stopping after this step, once more stops at once\n".encode())


def signalled(flags: list[float]) -> int:
    """The signal that any process has received, from the sum (or mean) of all processes' flags; 0 if there is none."""
    return next((int(number) for number, flag in zip(SIGNALS, flags, strict=True) if flag > 0), 0)


def ignore_signals(_: int = 0) -> None:
    """For loading processes, which live and end with the main one: a signal to the whole group must not end them."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
