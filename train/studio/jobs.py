"""Runs one program of this package at a time as a separate process, which survives if the page or studio closes."""

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
    """A started process. started: seconds since 1970. created: the process's creation time according to the system."""

    title: str
    words: tuple[str, ...]
    log: str
    pid: int
    created: float
    started: float
    begins: int = 0  # length of the log file before the job

    @property
    def command(self) -> str:
        """The command line of the job."""
        return command_line(self.words)


@dataclass(frozen=True)
class Status:
    """The status of the last job. code: its exit status; None while it runs, or if its end was not observed."""

    job: Job | None = None
    running: bool = False
    code: int | None = None

    @property
    def text(self) -> str:
        """The status as a short text."""
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
    """Starts programs, one at a time. The running job is recorded in `folder`, so that a restarted studio finds it.

    before: called before a process is started, to free the studio's device memory.
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
        """A context in which no other job can start. StudioError if a job is already running."""
        with self._lock:
            status = self.status()
            running = self._held or (status.job.title if status.running and status.job else "")
            if running:
                raise StudioError(f"{running} is still running: wait for its end, or stop it")
            self._held = title
        try:
            yield
        finally:
            self._held = ""

    def status(self) -> Status:
        """The status of the last job."""
        if self._job is None:
            return Status()
        if self._process is not None:
            code = self._process.poll()
            return Status(self._job, code is None, code)
        created = _created(self._job.pid)  # started by an earlier studio
        return Status(self._job, created is not None and created == self._job.created)

    def stop(self) -> str:
        """Terminate the job; training saves its state first. Returns a message for the page."""
        status = self.status()
        if status.job is None or not status.running:
            return "Nothing is running."
        psutil.Process(status.job.pid).terminate()
        return f"Stopping: {status.job.title}"

    def wait(self, seconds: float) -> Status:
        """Wait until the job ends, at most `seconds`, and return its status."""
        end = time.monotonic() + seconds
        while (status := self.status()).running and time.monotonic() < end:
            time.sleep(0.1)
        return status

    def _read(self) -> Job | None:
        try:
            entries = json.loads(self._record.read_text(encoding="utf-8"))
            return Job(**{**entries, "words": tuple(entries["words"])})
        except (OSError, ValueError, TypeError, KeyError):  # no record yet
            return None


def claim(file: Path) -> None:
    """Record this process in the file as the folder's studio. StudioError if another studio is running there."""
    try:
        pid, created = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):  # no record yet
        pid, created = 0, None
    if pid != os.getpid() and created is not None and _created(pid) == created:
        raise StudioError(f"another studio (process {pid}) uses {file.parent.parent}: give another --output")
    with replacing(file) as partial:
        partial.write_text(json.dumps([os.getpid(), _created(os.getpid())]), encoding="utf-8")


def _created(pid: int) -> float | None:
    """The creation time of a process; None if it does not exist or has ended."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


def command_line(words: Sequence[str]) -> str:
    """`lora-adapters` and its arguments, quoted for a shell."""
    import shlex

    return shlex.join(["lora-adapters", *words])


def log_text(job: Job, whole: bool = False) -> str:
    """The job's output in its log file: all of it if `whole`, else only the end."""
    try:
        with Path(job.log).open("rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            opened.seek(job.begins if whole else max(job.begins, size - _TAIL))
            return opened.read().decode("utf-8", errors="replace")
    except OSError:
        return ""


def as_lines(text: str) -> list[str]:
    """Split terminal output into lines, keeping only the text after a line's last carriage return."""
    return [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n")]


def progress_of(text: str) -> tuple[float, str]:
    """(progress of the last progress bar in a log, 0 to 1; the text around the bar); (0, "") without a bar."""
    for line in reversed(re.split(r"[\r\n]", text)):
        bar = _BAR.search(line)
        if bar:
            around = _BAR_TEXT.match(line)
            said = " · ".join(part for part in around.groups() if part) if around else ""
            return min(int(bar[1]), 100) / 100, said
    return 0.0, ""
