"""One job at a time: a program of this package as a process of its own, which outlives the page and the studio."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from lora_adapters.convert.progress import SHOW
from lora_adapters.convert.storage.atomic import replacing
from lora_adapters.train.studio.paths import StudioError

_TAIL = 65536  # bytes of a log that are read for the page
_BAR = re.compile(r"(\d{1,3})%\|")
_BAR_TEXT = re.compile(r"^\s*([^|\r\n]*?):?\s*\d{1,3}%\|[^|]*\|\s*(.*)$")


@dataclass(frozen=True)
class Job:
    """A process that was started. started: seconds since 1970. created: the system's time of its process."""

    title: str
    words: tuple[str, ...]
    log: str
    pid: int
    created: float
    started: float
    begins: int = 0  # the length of the log before

    @property
    def command(self) -> str:
        """What a terminal would be given."""
        return command_line(self.words)


@dataclass(frozen=True)
class Status:
    """What the last job does. running: now. code: its exit status; None while it runs, or where nobody saw it end."""

    job: Job | None = None
    running: bool = False
    code: int | None = None

    @property
    def text(self) -> str:
        """In a few words."""
        if self.job is None:
            return "Nothing is running."
        if self.running:
            return f"Running: {self.job.title}"
        if self.code == 0:
            return f"Done: {self.job.title}"
        if self.code is None:
            return f"Ended: {self.job.title}"
        stopped = self.code < 0 or self.code > 128
        return f"{'Stopped' if stopped else 'Failed'}: {self.job.title}"


class Jobs:
    """Starts programs, one after the other. `folder` keeps which one runs, so that a new studio finds it again.

    before: called before a process is started, so that the studio gives back the device's memory.
    """

    def __init__(self, folder: Path, before: Callable[[], None] = lambda: None):
        self._record, self._before = folder / "job.json", before
        self._lock, self._held = threading.Lock(), ""
        self._process: subprocess.Popen[bytes] | None = None
        self._job = self._read()

    def start(self, title: str, words: Sequence[str], log: Path) -> Job:
        """Start `lora-adapters` with arguments in a process.

        Args:
            title: The name of the job on the page.
            words: The arguments.
            log: The file that the output is appended to.

        Returns:
            The job, which is also written to the record.

        Raises:
            StudioError: Another job is running.
        """
        with self.reserved(title):
            self._before()
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as opened:
                begins = opened.tell()
                opened.write(f"$ {command_line(words)}\n".encode())
                opened.flush()
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "lora_adapters", *words],
                    stdin=subprocess.DEVNULL,
                    stdout=opened,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, SHOW: "1", "PYTHONUNBUFFERED": "1"},
                    start_new_session=True,  # Ctrl-C in the studio's terminal does not reach it
                )
            pid = self._process.pid
            self._job = Job(title, tuple(words), str(log), pid, _created(pid) or 0.0, time.time(), begins)
            with replacing(self._record) as partial:
                partial.write_text(json.dumps(asdict(self._job)), encoding="utf-8")
            return self._job

    @contextmanager
    def reserved(self, title: str) -> Iterator[None]:
        """Within it nothing else starts. StudioError where something is running already."""
        with self._lock:
            status = self.status()
            running = self._held or (status.job.title if status.running and status.job else "")
            if running:
                raise StudioError(f"{running} is running: wait for its end, or stop it")
            self._held = title
        try:
            yield
        finally:
            self._held = ""

    def status(self) -> Status:
        """What the last job does."""
        if self._job is None:
            return Status()
        if self._process is not None:
            code = self._process.poll()
            return Status(self._job, code is None, code)
        created = _created(self._job.pid)  # of a studio before this one
        return Status(self._job, created is not None and created == self._job.created)

    def stop(self) -> str:
        """Ask the job to end: a training saves its state first. What was done, for the page."""
        status = self.status()
        if status.job is None or not status.running:
            return "Nothing is running."
        psutil.Process(status.job.pid).terminate()
        return f"Stopping: {status.job.title}"

    def wait(self, seconds: float) -> Status:
        """The status at the job's end, or after so many seconds."""
        end = time.monotonic() + seconds
        while (status := self.status()).running and time.monotonic() < end:
            time.sleep(0.1)
        return status

    def _read(self) -> Job | None:
        try:
            entries = json.loads(self._record.read_text(encoding="utf-8"))
            return Job(**{**entries, "words": tuple(entries["words"])})
        except (OSError, ValueError, TypeError, KeyError):  # there was none yet
            return None


def claim(file: Path) -> None:
    """Say in the file that this process is the studio of its folder. StudioError if another one is, and runs."""
    try:
        pid, created = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):  # there was none yet
        pid, created = 0, None
    if pid != os.getpid() and created is not None and _created(pid) == created:
        raise StudioError(f"another studio (process {pid}) works in {file.parent.parent}: give another --output")
    with replacing(file) as partial:
        partial.write_text(json.dumps([os.getpid(), _created(os.getpid())]), encoding="utf-8")


def _created(pid: int) -> float | None:
    """When the process of that number began; None if there is none, or it has ended."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


def command_line(words: Sequence[str]) -> str:
    """`lora-adapters` with its words as a shell takes them."""
    import shlex

    return shlex.join(["lora-adapters", *words])


def log_text(job: Job, whole: bool = False) -> str:
    """The job's part of its log (the end of it, unless `whole`), as a terminal would show it."""
    try:
        with Path(job.log).open("rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            opened.seek(job.begins if whole else max(job.begins, size - _TAIL))
            return opened.read().decode("utf-8", errors="replace")
    except OSError:
        return ""


def as_lines(text: str) -> list[str]:
    """The lines of a terminal's output, each as the last carriage return in it left it."""
    return [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n")]


def progress_of(text: str) -> tuple[float, str]:
    """The share that the last progress bar in a log shows, 0 to 1, and what stands around it; (0, "") without one."""
    for line in reversed(re.split(r"[\r\n]", text)):
        bar = _BAR.search(line)
        if bar:
            around = _BAR_TEXT.match(line)
            said = " · ".join(part for part in around.groups() if part) if around else ""
            return min(int(bar[1]), 100) / 100, said
    return 0.0, ""
