"""Files and folders that are whole or not there."""

import os

import pytest

from lora_adapters.convert.storage import atomic


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_file_is_replaced_when_the_block_ends_well_and_keeps_its_permissions(tmp_path):
    target = tmp_path / "made" / "x.txt"
    with atomic.replacing(target) as partial:
        partial.write_text("1")
        assert not target.exists()
    target.chmod(0o600)
    with atomic.replacing(target, durable=True) as partial:
        partial.write_text("2")
        assert target.read_text() == "1"
    assert content(tmp_path) == {"made/x.txt": "2"}
    assert os.name == "nt" or target.stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_a_new_file_has_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic.replacing(tmp_path / "x") as partial:
            partial.unlink()
            os.close(os.open(partial, os.O_CREAT | os.O_WRONLY, 0o600))  # as safetensors creates files
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


def test_a_read_only_file_is_replaced_and_stays_read_only(tmp_path):
    (tmp_path / "x").write_text("old")
    (tmp_path / "x").chmod(0o444)
    with atomic.replacing(tmp_path / "x", durable=True) as partial:
        partial.write_text("new")
    assert content(tmp_path) == {"x": "new"}
    assert not (tmp_path / "x").stat().st_mode & 0o222


def test_what_goes_wrong_leaves_the_old_file_alone(tmp_path):
    (tmp_path / "x").write_text("old")
    with pytest.raises(FileNotFoundError), atomic.replacing(tmp_path / "x") as partial:
        partial.with_name("missing").rename(partial)
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match="give a file in it"), atomic.replacing(tmp_path / "folder"):
        raise AssertionError("the block must not run")
    assert content(tmp_path) == {"x": "old"}


@pytest.mark.parametrize("letter", ["a", "ä", "画"])
def test_names_may_be_as_long_as_the_system_allows(letter, tmp_path):
    most = 259 - len(str(tmp_path / "_")) + 1 if atomic.LOCKING else 255
    target = tmp_path / (letter * min(most, 255 // len(letter.encode())))
    with atomic.replacing(target) as partial:
        partial.write_text("1")
    assert content(tmp_path) == {target.name: "1"}


def test_a_folder_is_replaced_whole_and_keeps_what_it_is_asked_to(tmp_path):
    target = tmp_path / "x"
    (target / "notes").mkdir(parents=True)
    (target / "notes" / "1").write_text("mine")
    (target / "weights").write_text("old")
    with pytest.raises(FileNotFoundError), atomic.replacing_folder(target) as partial:
        (target / "missing").rename(partial / "weights")
    assert content(tmp_path) == {"x/notes/1": "mine", "x/weights": "old"}
    with atomic.replacing_folder(target, lambda made: ["notes"]) as partial:
        (partial / "weights").write_text("new")
    assert content(tmp_path) == {"x/notes/1": "mine", "x/weights": "new"}


def test_a_folder_that_cannot_take_its_place_brings_the_old_one_back(tmp_path, monkeypatch):
    target = tmp_path / "x"
    target.mkdir()
    (target / "weights").write_text("old")
    real = type(target).rename

    def rename(self, to):
        if self.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return real(self, to)

    monkeypatch.setattr(type(target), "rename", rename)
    with pytest.raises(OSError, match="Input/output"), atomic.replacing_folder(target) as partial:
        (partial / "weights").write_text("new")
    assert content(tmp_path) == {"x/weights": "old"}


def test_a_second_name_is_a_link_where_links_lock_nothing(tmp_path, monkeypatch):
    (tmp_path / "x").write_text("1")
    monkeypatch.setattr(atomic, "LOCKING", False)
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(95, "Operation not supported")))
    atomic.link_or_copy(tmp_path / "x", tmp_path / "copy")
    assert not (tmp_path / "copy").samefile(tmp_path / "x")
    monkeypatch.undo()
    if not atomic.LOCKING:
        atomic.link_or_copy(tmp_path / "x", tmp_path / "y")
        assert (tmp_path / "y").samefile(tmp_path / "x")
    monkeypatch.setattr(atomic, "LOCKING", True)
    atomic.link_or_copy(tmp_path / "x", tmp_path / "z")
    assert not (tmp_path / "z").samefile(tmp_path / "x")
    assert {*content(tmp_path).values()} == {"1"}
