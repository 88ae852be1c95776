"""Memory of mapped files that is given back."""

import sys
from pathlib import Path

import pytest
import torch

from lora_adapters.convert import Adapter, LowRank, ModuleName
from lora_adapters.convert.storage import mapped_pages
from lora_adapters.convert.storage.mapped_pages import MappedPages

NAME = ModuleName("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
LITTLE = 512  # KiB that other mappings of the file have: of its header, and what Linux reads along

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux alone says what is mapped where")


def resident(path: Path) -> int:
    """KiB of a mapped file that are in this process's memory."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    found = 0
    for line in lines:
        if line.endswith(str(path)):
            found += next(int(one.split()[1]) for one in lines if one.startswith("Rss:"))
    return found


@pytest.fixture
def adapter(tmp_path):
    """One of 4 MB, read from a file: as that of a user, and the same from the second mapping of the same file."""
    pair = LowRank(torch.randn(256, 2000), torch.randn(2000, 256), 1.0)
    path = Adapter({NAME: pair}).save(tmp_path / "a.safetensors")
    return pair, path, Adapter.load(path), Adapter.load(path)


def test_pages_are_given_back_after_so_many_bytes(adapter) -> None:
    pair, path, loaded, _ = adapter
    change = loaded.modules[NAME]
    pages = MappedPages.of(path, [change])
    assert torch.equal(change.down, pair.down)
    assert torch.equal(change.up, pair.up)
    assert resident(path) > 3900
    pages.use((4 << 20) - 1)
    assert resident(path) > 3900
    pages.use(1)
    assert resident(path) < LITTLE
    assert torch.equal(change.down, pair.down)


def test_another_mapping_of_the_same_file_is_left_alone(adapter) -> None:
    _, path, loaded, other = adapter
    other.modules[NAME].down.fill_(2)
    loaded.modules[NAME].down.sum()
    MappedPages.of(path, loaded.modules.values()).give_back()
    assert other.modules[NAME].down.eq(2).all()
    assert resident(path) > 1900


def test_what_is_not_mapped_has_no_pages(adapter, tmp_path) -> None:
    pair, path, loaded, _ = adapter
    pages = MappedPages.of(path, [pair])
    pages.give_back()
    assert pages._spans == []
    assert MappedPages.of(tmp_path / "missing.safetensors", loaded.modules.values())._spans == []
    assert torch.equal(loaded.modules[NAME].down, pair.down)


def test_the_files_of_a_folder(adapter, tmp_path) -> None:
    _, path, *_ = adapter
    link = tmp_path / "folder" / "unet" / "weights.safetensors"
    link.parent.mkdir(parents=True)
    link.symlink_to(path)
    change = Adapter.load(link).modules[NAME]
    change.down.sum()
    MappedPages.of(tmp_path / "folder", [change]).give_back()
    assert resident(path) < LITTLE


def test_a_system_that_does_not_say_what_is_mapped(adapter, monkeypatch, tmp_path) -> None:
    _, path, loaded, _ = adapter
    monkeypatch.setattr(mapped_pages, "_MAPS", tmp_path / "maps")
    MappedPages.of(path, loaded.modules.values()).give_back()
