import random

import numpy as np
import pytest
import torch
from PIL import Image

from lora_adapters.train.data.buckets import Placement
from lora_adapters.train.data.config import SubsetConfig
from lora_adapters.train.data.image_files import FileSource, find_images, open_image, size_if_whole
from lora_adapters.train.data.transforms import (
    Variation,
    centred,
    crop_as_seen,
    image_tensor,
    latent_mask,
    mask_tensor,
    to_rgb,
    vary,
)
from lora_adapters.train.data_error import DataError
from tests.train.drawn import drawn_image

WIDE = Placement((32, 32), (64, 32))
ROTATED = Image.Exif()
ROTATED[0x0112] = 6  # turn by 90 degrees to the right


def test_transparency_is_laid_onto_white_or_kept_as_a_mask():
    shown = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    shown.putpixel((0, 0), (10, 20, 30, 0))
    blended, alpha = to_rgb(shown, "x")
    assert [blended.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (200, 0, 0)]
    kept, alpha = to_rgb(shown, "x", blend=False)
    assert kept.getpixel((0, 0)) == (10, 20, 30)
    assert [alpha.getpixel((x, 0)) for x in (0, 1)] == [0, 255]


def test_other_modes_become_the_same_colour(tmp_path):
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    assert to_rgb(red.convert("P", palette=Image.Palette.ADAPTIVE), "x")[0].getpixel((1, 1)) == (255, 0, 0)
    assert to_rgb(red.convert("CMYK"), "x")[0].getpixel((1, 1)) == (255, 0, 0)
    assert to_rgb(Image.new("LA", (1, 1), (90, 255)), "x")[0].getpixel((0, 0)) == (90, 90, 90)
    Image.fromarray(np.full((4, 4), 128 * 257, np.uint16)).save(tmp_path / "deep.png")
    deep = open_image(FileSource(str(tmp_path / "deep.png")))
    assert to_rgb(deep, "x")[0].getpixel((0, 0)) == (128, 128, 128)
    palette = Image.new("P", (1, 1))
    palette.putpalette([0, 0, 0])
    palette.info["transparency"] = 0
    assert to_rgb(palette, "x")[0].getpixel((0, 0)) == (255, 255, 255)
    bright = Image.new("F", (1, 1), 1e4)
    with pytest.raises(
        DataError, match=r"deep.tif: its floating-point values are 10000 to 10000, not 0 \(black\) to 1"
    ):
        to_rgb(bright, "deep.tif")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_exif_rotation_counts_for_size_and_pixels(tmp_path, suffix):
    file = tmp_path / f"turned{suffix}"
    flat = Image.new("RGB", (48, 16), "blue")
    flat.paste("red", (0, 0, 24, 16))
    flat.save(file, exif=ROTATED, quality=95)
    source = FileSource(str(file))
    assert size_if_whole(source) == (16, 48)
    upright = open_image(source)
    assert upright.size == (16, 48)
    assert upright.getpixel((8, 4))[0] > 200  # the left half is now on top
    assert upright.getpixel((8, 44))[2] > 200


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp"])
def test_damaged_files_are_told_from_whole_ones(tmp_path, suffix):
    file = tmp_path / f"p{suffix}"
    drawn_image((96, 64)).save(file)
    source = FileSource(str(file))
    assert size_if_whole(source) == (96, 64)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) * 2 // 3])
    assert isinstance(size_if_whole(source), str)
    with pytest.raises(DataError, match=f"p{suffix}: cannot be read as an image"):
        open_image(source)
    file.write_bytes(b"")
    assert size_if_whole(source) == "empty file"
    file.write_bytes(b"hello, world")
    assert size_if_whole(source) == "not an image"


def test_a_jpeg_with_a_trailer_is_whole(tmp_path):
    file = tmp_path / "phone.jpg"
    drawn_image((16, 16)).save(file)
    file.write_bytes(file.read_bytes() + b"trailer of a telephone" * 20)
    assert size_if_whole(FileSource(str(file))) == (16, 16)


def test_images_are_found_in_either_case_and_in_order(tmp_path):
    for name in ("b.PNG", "a.jpeg", "a.txt", "c.webp", "a.npz"):
        (tmp_path / name).touch()
    (tmp_path / "d.png").mkdir()
    assert [path.name for path in find_images(tmp_path)] == ["a.jpeg", "b.PNG", "c.webp"]


def test_values_run_from_minus_one_to_one_and_the_middle_is_cut_out():
    stripes = Image.new("RGB", (64, 32), "black")
    stripes.paste("white", (16, 0, 32, 32))
    pixels = image_tensor(stripes, WIDE, centred(WIDE))
    assert pixels.shape == (3, 32, 32)
    assert pixels[:, :, :16].eq(1).all()
    assert pixels[:, :, 16:].eq(-1).all()
    mirrored = image_tensor(stripes, WIDE, centred(WIDE, flip=True))
    assert torch.equal(mirrored, pixels.flip(-1))


def test_scaling_keeps_the_mean_colour():
    big, placement = drawn_image((200, 100), 3), Placement((32, 16), (32, 16))
    for method in (None, "area", "bilinear", "lanczos"):
        small = image_tensor(big, placement, centred(placement), method)
        assert small.shape == (3, 16, 32)
        assert small.mean().item() == pytest.approx(np.asarray(big).mean() / 127.5 - 1, abs=0.02)


def test_random_crop_stays_inside_and_is_reported_as_seen():
    corners = [vary(WIDE, SubsetConfig(random_crop=True), random.Random(seed)).corner for seed in range(200)]
    assert {top for _, top in corners} == {0}
    assert {left for left, _ in corners} >= {0, 32}
    assert crop_as_seen(WIDE, Variation((5, 0))) == (0, 5)
    assert crop_as_seen(WIDE, Variation((5, 0), flip=True)) == (0, 27)
    big = drawn_image((64, 32))
    seen = image_tensor(big.transpose(Image.Transpose.FLIP_LEFT_RIGHT), WIDE, Variation((27, 0)))
    assert torch.equal(image_tensor(big, WIDE, Variation((5, 0), flip=True)), seen)


def test_flips_are_half_of_all_and_need_the_option():
    flips = [vary(WIDE, SubsetConfig(flip_aug=True), random.Random(seed)).flip for seed in range(1000)]
    assert sum(flips) == pytest.approx(500, abs=60)
    assert not any(vary(WIDE, SubsetConfig(), random.Random(seed)).flip for seed in range(50))


def test_colours_move_a_little_a_third_of_the_time():
    drawn = [vary(WIDE, SubsetConfig(color_aug=True), random.Random(seed)).colour for seed in range(1000)]
    assert sum(colour is not None for colour in drawn) == pytest.approx(333, abs=60)
    plain = image_tensor(drawn_image((64, 32)), WIDE, centred(WIDE))
    moved = image_tensor(drawn_image((64, 32)), WIDE, Variation((16, 0), colour=(16.0, 0.05)))
    assert 0.005 < (moved - plain).abs().mean() < 0.3
    grey = Image.new("RGB", (64, 32), (128, 128, 128))
    gamma = image_tensor(grey, WIDE, Variation((16, 0), colour=(0.0, 0.05)))
    assert gamma[0, 0, 0].item() == pytest.approx(2 * (128 / 255) ** 1.05 - 1, abs=0.005)


def test_masks_follow_their_image_and_are_averaged_over_latents():
    mask = Image.new("L", (128, 64), 0)
    mask.paste(255, (0, 0, 56, 64))  # of another size than its image
    seen = mask_tensor(mask, WIDE, centred(WIDE))
    assert seen.shape == (32, 32)
    assert seen[:, :12].eq(1).all()
    assert seen[:, 12:].eq(0).all()
    assert latent_mask(seen).tolist() == [[[1.0, 0.5, 0.0, 0.0]] * 4]
    assert torch.equal(mask_tensor(mask, WIDE, centred(WIDE, flip=True)), seen.flip(-1))
