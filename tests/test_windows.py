"""The tests of files, processes and text once more, under the rules of Windows (`tests/windows_rules.py`)."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the rules are imitated on Linux")

# What reads or writes files, starts processes, or prints: a selection for every day, and all of it.
SOME = [
    "tests/convert/storage/test_atomic.py",
    "tests/convert/storage/test_in_place.py",
    "tests/convert/test_portable.py",
    "tests/convert/test_adapter.py",
    "tests/faults/test_kills.py::test_a_full_disk_leaves_the_old",
    "tests/train/training/test_checkpoints.py",
    "tests/lora_adapters/hub/test_background.py",
]
ALL = [
    "tests/convert/storage/test_checkpoint.py",
    "tests/convert/storage/test_folders.py",
    "tests/convert/tools/test_merge.py",
    "tests/convert/test_scripts.py",
    "tests/convert/test_scripts_errors.py",
    "tests/faults/test_kills.py",
    "tests/train/options/test_arguments.py",
    "tests/train/data/test_cache_files.py",
    "tests/train/test_consoles.py",
    "tests/train/test_resize_images_to_resolution.py",
    "tests/train/training/test_resume.py",
    "tests/train/data/test_sources.py",
    "tests/train/data/test_dataset.py",
    "tests/train/training/test_uploads.py",
]


def under_the_rules(*words):
    command = [sys.executable, "-m", "pytest", "-p", "tests.windows_rules", "-p", "no:cacheprovider", "-q", *words]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=False)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


def test_files_under_the_rules():
    under_the_rules(*SOME)


@pytest.mark.slow
@pytest.mark.parametrize("file", ALL)
def test_all_files_under_the_rules(file):
    under_the_rules(file)


def test_workers_are_started_anew_under_the_rules():
    """The data's workers get all they need by pickling, as where processes cannot be forked."""
    under_the_rules("tests/train/data/test_dataset.py", "-k", "an_image_that_breaks and 1")


@pytest.fixture
def rules(monkeypatch):
    from tests import windows_rules

    method = multiprocessing.get_start_method(allow_none=True)
    windows_rules.apply(monkeypatch)
    yield windows_rules
    multiprocessing.set_start_method(method, force=True)


def test_the_rules_bite(rules, tmp_path):
    import torch

    file, other = tmp_path / "x", tmp_path / "y"
    file.write_bytes(bytes(16))
    other.write_bytes(bytes(16))
    with file.open("rb") as opened:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fsync(opened.fileno())
        for refused in (file.unlink, lambda: file.rename(tmp_path / "z"), lambda: other.replace(file)):
            with pytest.raises(PermissionError):
                refused()
    mapped = torch.from_file(str(file), size=4)
    for refused in (file.unlink, lambda: other.replace(file), lambda: tmp_path.rename(f"{tmp_path}-2")):
        with pytest.raises(PermissionError):
            refused()
    with pytest.raises(OSError, match="mapped section"):
        file.write_text("")
    file.rename(tmp_path / "z")
    del mapped
    (tmp_path / "z").unlink()
    (tmp_path / "z").touch()
    with pytest.raises(FileExistsError):
        other.rename(tmp_path / "z")
    for name in ("a:b", "con.txt", "end.", "x" * 250):
        with pytest.raises(OSError, match=r"syntax is incorrect|cannot find the path"):
            (tmp_path / name).write_text("")
    with pytest.raises(UnicodeEncodeError):
        other.write_text("猫")
    assert multiprocessing.get_start_method() == "spawn"
