"""Imports of a program without garbage collection, and the collector as it was afterwards."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from lora_adapters.convert.tools.startup import importing

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import gc, sys
from lora_adapters.convert.info import main
from lora_adapters.convert.tools import startup
before = sum(generation["collections"] for generation in gc.get_stats())
with startup.importing():
    import lora_adapters.convert.programs.info
after = sum(generation["collections"] for generation in gc.get_stats())
print("torch" in sys.modules, after - before, gc.isenabled(), gc.get_freeze_count() > 100_000)
"""


def test_nothing_is_collected_while_torch_is_imported() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "0", "True", "True"]


def test_the_collector_is_left_alone_if_torch_is_already_imported() -> None:
    assert "torch" in sys.modules
    frozen = gc.get_freeze_count()
    with importing():
        assert gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() == frozen


def test_a_collector_that_is_switched_off_stays_off(monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    gc.disable()
    try:
        with importing():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_the_collector_is_switched_on_after_an_import_that_fails(monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    frozen = gc.get_freeze_count()
    try:
        with pytest.raises(ModuleNotFoundError), importing():
            import no_such_library  # type: ignore[import-not-found]  # noqa: F401
        assert gc.isenabled()
        assert gc.get_freeze_count() > frozen
    finally:
        gc.unfreeze()
