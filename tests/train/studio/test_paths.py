"""The studio reads and writes below its folders only."""

import os

import pytest

from lora_adapters.train.studio.paths import Folders, StudioError


@pytest.fixture
def folders(tmp_path):
    for name in ("adapters/deep", "images/cats", "output/.studio", "outside"):
        (tmp_path / name).mkdir(parents=True)
    files = ("adapters/a.safetensors", "adapters/deep/b.pt", "adapters/notes.txt", "outside/c.safetensors")
    for name in (*files, "output/d.safetensors", "output/.studio/e.safetensors", "images/cats/1.png"):
        (tmp_path / name).write_bytes(b"")
    return Folders("model", tmp_path / "output", (tmp_path / "adapters",), (tmp_path / "images",))


def test_adapters_of_the_folders_are_listed(folders, tmp_path):
    (tmp_path / "adapters" / "peft").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "adapters" / "peft" / name).write_text("{}")
    model = tmp_path / "adapters" / "tuned"
    (model / "unet").mkdir(parents=True)
    (model / "model_index.json").write_text("{}")
    (model / "unet" / "weights.safetensors").write_bytes(b"")
    os.symlink(tmp_path / "outside", tmp_path / "adapters" / "way-out")
    listed = [folders.shown(path) for path in folders.adapter_files()]
    assert listed == ["a.safetensors", "deep/b.pt", "peft", "d.safetensors"]
    assert "tuned" in [folders.shown(path) for path in folders.model_files()]
    assert [folders.shown(path) for path in folders.image_folders()] == ["cats"]


def test_what_is_inside_is_taken(folders, tmp_path):
    inside = tmp_path / "adapters" / "a.safetensors"
    assert folders.adapter(str(inside)) == str(inside.resolve())
    assert folders.adapter("owner/name") == "owner/name"
    assert folders.new("mine.v2", ".safetensors").name == "mine.v2.safetensors"
    assert folders.new("mine.safetensors", ".safetensors").name == "mine.safetensors"
    assert folders.image_folder(tmp_path / "images" / "cats").name == "cats"


@pytest.mark.parametrize("name", ["../outside/c.safetensors", "/etc/passwd", "link.safetensors", "nul\0", ""])
def test_what_is_outside_is_refused(folders, tmp_path, name):
    os.symlink(tmp_path / "outside" / "c.safetensors", tmp_path / "adapters" / "link.safetensors")
    path = str(tmp_path / "adapters" / name) if name else ""
    for taken in (folders.adapter, folders.base_model, folders.image_folder):
        with pytest.raises(StudioError, match=r"outside of the folders|is not a path"):
            taken(path)


def test_a_local_folder_is_no_repository(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "outside")
    (tmp_path / "outside" / "owner" / "name").mkdir(parents=True)
    with pytest.raises(StudioError, match="outside of the folders"):
        folders.adapter("owner/name")


@pytest.mark.parametrize("name", ["", " ", "a/b", "..", "../x", ".hidden", "--output_config", "a:b", "con", "x\ny"])
def test_names_that_are_none_are_refused(folders, name):
    with pytest.raises(StudioError, match="is not a file name"):
        folders.new(name)


def test_nothing_is_overwritten(folders):
    with pytest.raises(StudioError, match=r"d\.safetensors exists already"):
        folders.new("d", ".safetensors")
