"""Images and captions of a folder."""

import os

import pytest
from PIL import Image

from lora_adapters.train.studio.images import THUMBNAIL, caption_ending, captioned_images, save_caption, thumbnail
from lora_adapters.train.studio.paths import StudioError


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.jpg", "c.webp"):
        Image.new("RGB", (800, 400), "red").save(tmp_path / name)
    (tmp_path / "a.txt").write_text("a red wall\nin the sun\n")
    (tmp_path / "b.txt").write_bytes("\ufeffmur rouge, été".encode())
    (tmp_path / "notes.txt").write_text("no caption")
    return tmp_path


def test_captions_are_read_and_written(folder):
    assert [(one.path.name, one.caption) for one in captioned_images(folder)] == [
        ("a.png", "a red wall\nin the sun"),
        ("b.jpg", "mur rouge, été"),
        ("c.webp", None),
    ]
    assert save_caption(folder, "c.webp", "一面红墙\n") == folder / "c.txt"
    assert (folder / "c.txt").read_text(encoding="utf-8") == "一面红墙\n"
    assert captioned_images(folder)[2].caption == "一面红墙"


def test_the_ending_is_that_of_most_captions(folder, tmp_path):
    assert caption_ending(folder) == ".txt"
    for name in ("a", "b", "c"):
        (folder / f"{name}.caption").write_text("x")
    assert caption_ending(folder) == ".caption"
    (tmp_path / "empty").mkdir()
    assert caption_ending(tmp_path / "empty") == ".txt"


@pytest.mark.parametrize("name", ["d.png", "../a.png", "notes.txt", "a.txt", "/etc/passwd"])
def test_captions_are_written_for_the_folders_images_only(folder, name):
    with pytest.raises(StudioError, match="has no image"):
        save_caption(folder, name, "x")


def test_a_link_is_not_written_through(folder, tmp_path):
    os.symlink(tmp_path / "elsewhere.txt", folder / "c.txt")
    with pytest.raises(StudioError, match="is a symbolic link"):
        save_caption(folder, "c.webp", "x")


def test_a_caption_that_is_no_text_is_named(folder):
    (folder / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(StudioError, match=r"a\.txt cannot be read"):
        captioned_images(folder)


def test_small_copies(folder, tmp_path):
    cache = tmp_path / "cache"
    small = thumbnail(folder / "a.png", cache)
    with Image.open(small) as image:
        assert image.size == (THUMBNAIL, THUMBNAIL // 2)
    assert thumbnail(folder / "a.png", cache) == small
    Image.new("RGBA", (10, 10), (0, 0, 0, 0)).save(folder / "a.png")
    clear = thumbnail(folder / "a.png", cache)
    assert clear != small
    with Image.open(clear) as image:
        assert image.getpixel((5, 5)) == (255, 255, 255)
    (folder / "a.png").write_bytes(b"no image")
    assert thumbnail(folder / "a.png", cache) is None
