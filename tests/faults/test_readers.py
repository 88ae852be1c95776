"""Damaged files of every kind, thousands of them: each is read, or refused in one line, in little time and memory."""

import contextlib
import os
import pickle
import signal
import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from .mutations import mutated
from .readers import ERRORS, Reader, every

if sys.platform != "linux":
    pytest.skip("memory is limited as Linux does it", allow_module_level=True)
resource = pytest.importorskip("resource")
SECONDS, MEMORY = 5, 768 << 20  # an input may take this long, and this much beyond what the process has
CI, SLOW = 2_000, 100_000


@contextlib.contextmanager
def bounds():
    """An exception where the block takes too long or too much address space."""

    def late(number, frame):
        raise TimeoutError(f"it takes more than {SECONDS} s")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def check(reader: Reader, content: bytes) -> None:
    """Read the content; only this project's own errors may come out, in one line that names the cause."""
    reader.file.write_bytes(content)
    try:
        with bounds(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader.read()
        return
    except ERRORS as error:
        said = str(error)
    assert said.strip()
    assert "\n" not in said, said
    assert "allocate" not in said, said  # the size that a file declares was believed


class Bomb:
    """What a pickle of it does when it is loaded by somebody who trusts it."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    """Every reader, with the bytes of its good file."""
    made = every(tmp_path_factory.mktemp("readers"))
    return [(reader, reader.file.read_bytes()) for reader in made]


def feed(reader: Reader, good: bytes, share: int, derandomize: bool) -> None:
    """`share` damaged inputs to a reader."""
    check(reader, good)  # undamaged it is read, or else nothing that follows means anything

    @settings(
        max_examples=share,
        deadline=None,
        database=None,
        derandomize=derandomize,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(seed=st.integers(0, 2**48))
    def fed(seed):
        try:
            check(reader, mutated(good, seed))
        except BaseException as error:
            raise AssertionError(f"{reader.name}, seed {seed}: {type(error).__name__}: {error}") from error

    try:
        fed()
    finally:
        reader.file.write_bytes(good)


def test_good_files_are_read(readers):
    for reader, _ in readers:
        reader.read()


def test_damaged_files(readers):
    for reader, good in readers:
        feed(reader, good, CI // len(readers), derandomize=True)


@pytest.mark.slow
def test_many_damaged_files(readers):
    for reader, good in readers:
        feed(reader, good, SLOW // len(readers), derandomize=False)


def test_pickles_run_nothing(readers, tmp_path):
    ran = tmp_path / "ran"
    assert pickle.loads(pickle.dumps(Bomb(ran))) is None
    ran.rmdir()  # so it would have been seen
    for reader, good in readers:
        if reader.file.suffix in (".pt", ".ckpt", ".npz"):
            for protocol in (0, 2, 4):
                reader.file.write_bytes(pickle.dumps({"a": Bomb(ran)}, protocol))
                with pytest.raises(ERRORS):
                    reader.read()
            reader.file.write_bytes(good)
    assert not ran.exists()
