import math

import numpy as np
import pytest
from PIL import Image, ImageCms

from lora_adapters.train.interpolation import RESIZING
from lora_adapters.train.resizing.resize import (
    UnreadableImage,
    centre_crop,
    fitted_size,
    on_white,
    read_image,
    resize,
)


@pytest.mark.parametrize(
    ("size", "resolution", "expected"),
    [
        ((800, 1200), (512, 512), (418, 627)),  # √(512² · 2/3) = 418.05, √(512² · 3/2) = 627.07
        ((1200, 800), (512, 512), (627, 418)),
        ((1024, 1024), (256, 256), (256, 256)),
        ((1024, 256), (256, 64), (256, 64)),
        ((1024, 256), (64, 256), (256, 64)),  # the resolution is an area: its shape is not the image's
        ((512, 512), (512, 512), (512, 512)),
        ((300, 400), (512, 512), (300, 400)),
        ((40000, 1), (10, 10), (2000, 1)),
    ],
)
def test_fitted_size(size, resolution, expected):
    assert fitted_size(size, resolution) == expected


def test_fitted_size_is_the_largest_with_that_area_and_shape():
    for width in range(100, 1000, 37):
        for height in range(100, 1000, 41):
            scale = math.sqrt(min(1, 128 * 128 / (width * height)))
            fitted = fitted_size((width, height), (128, 128))
            assert fitted[0] * fitted[1] <= 128 * 128 or scale == 1
            assert 0 <= width * scale - fitted[0] < 1 + 1e-9
            assert 0 <= height * scale - fitted[1] < 1 + 1e-9


def strip(values: list[int]) -> Image.Image:
    return Image.fromarray(np.array([[[v, v, v] for v in values]], np.uint8))


def test_area_counts_covered_parts_of_pixels():
    # 3 pixels to 2: (p0 + p1/2) / 1.5 and (p1/2 + p2) / 1.5
    wide = strip([0, 90, 180])
    assert np.asarray(resize(wide, (2, 1), "area"))[0, :, 0].tolist() == [30, 150]
    tall = wide.transpose(Image.Transpose.ROTATE_270)
    assert np.asarray(resize(tall, (1, 2), "area"))[:, 0, 0].tolist() == [30, 150]


def test_area_equals_the_mean_of_an_upscaled_image():
    pixels = np.random.default_rng(0).integers(0, 256, (15, 21, 3), np.uint8)
    target = (8, 6)  # width, height
    fine = pixels.repeat(6, 0).repeat(8, 1).astype(float)  # 90 × 168: blocks of 15 × 21 are the new pixels
    expected = fine.reshape(6, 15, 8, 21, 3).mean((1, 3))
    got = np.asarray(resize(Image.fromarray(pixels), target, "area"))
    assert got.shape == (6, 8, 3)
    assert np.abs(got - expected).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("name", RESIZING)
def test_every_interpolation_keeps_a_flat_colour_and_the_size(name):
    flat = Image.new("RGB", (97, 61), (200, 3, 77))
    small = resize(flat, (41, 23), name)
    assert small.size == (41, 23)
    assert small.getcolors() == [(41 * 23, (200, 3, 77))]


def test_interpolations_are_what_their_names_say():
    def shrunk(values: list[int], name: str) -> list[int]:
        return np.asarray(resize(strip(values), (4, 1), name))[0, :, 0].tolist()

    # 12 pixels to 4, of which the fourth alone is seen: the first of the three that the second new pixel covers.
    one = [0, 0, 0, 240, 0, 0, 0, 0, 0, 0, 0, 0]
    assert shrunk(one, "area") == shrunk(one, "box") == [0, 80, 0, 0]
    assert shrunk(one, "nearest") == [0, 0, 0, 0]
    # A triangle of half-width 3: weights 1/3 of 8/3 (cut at the border), and 2/3 of 3.
    assert shrunk(one, "linear") == [30, 53, 0, 0]
    # Cubic and Lanczos overshoot beside a step, each in its own way.
    step = [50, 50, 50, 50, 200, 200, 200, 200, 200, 200, 200, 200]
    assert max(shrunk(step, "area") + shrunk(step, "linear")) == 200
    assert shrunk(step, "cubic")[2] > 200
    assert shrunk(step, "lanczos4")[2] > 200
    assert shrunk(step, "cubic") != shrunk(step, "lanczos4")


@pytest.mark.parametrize("name", ["area", "cubic", "lanczos4", "linear", "box"])
def test_hidden_colours_do_not_bleed(name):
    # Transparent green beside opaque red: the edge is red, half seen.
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, :3] = (0, 255, 0, 0)
    pixels[:, 3:] = (255, 0, 0, 255)
    small = np.asarray(resize(Image.fromarray(pixels), (4, 4), name))
    assert small[:, :, 1].max() == 0
    edge = small[1, 1]
    assert edge[0] == 255
    assert 0 < edge[3] < 255


def test_on_white():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 51))  # a fifth
    flat = on_white(image)
    assert flat.mode == "RGB"
    assert flat.getpixel((0, 0)) == (255, 255, 255)
    assert flat.getpixel((1, 0)) == (255, 204, 204)


def test_centre_crop():
    pixels = np.arange(7 * 5, dtype=np.uint8).reshape(5, 7)
    cropped = centre_crop(Image.fromarray(pixels), (4, 4))
    assert np.array_equal(np.asarray(cropped), pixels[0:4, 1:5])


def test_every_exif_orientation_comes_out_upright(tmp_path):
    upright = np.zeros((2, 3, 3), np.uint8)
    upright[0] = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    # How a camera that is held so stores the image (EXIF 2.32, tag 0x0112).
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: np.rot90(upright.swapaxes(0, 1), 2),
        8: np.rot90(upright, -1),
    }
    for orientation, pixels in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        file = tmp_path / f"{orientation}.png"
        Image.fromarray(np.ascontiguousarray(pixels)).save(file, exif=exif)
        assert np.array_equal(np.asarray(read_image(file)), upright), orientation


def test_modes_become_rgb_or_rgba(tmp_path):
    def read(image: Image.Image, name: str = "image.png", **options) -> Image.Image:
        image.save(tmp_path / name, **options)
        return read_image(tmp_path / name)

    sixteen = read(Image.fromarray(np.full((1, 1), 0x80FF, np.uint16)))
    assert (sixteen.mode, sixteen.getpixel((0, 0))) == ("RGB", (128, 128, 128))
    assert read(Image.new("L", (1, 1), 7)).getpixel((0, 0)) == (7, 7, 7)
    assert read(Image.new("LA", (1, 1), (7, 9))).getpixel((0, 0)) == (7, 7, 7, 9)
    assert read(Image.new("1", (1, 1), 1)).getpixel((0, 0)) == (255, 255, 255)
    keyed = read(Image.new("RGB", (1, 1), (1, 2, 3)), transparency=(1, 2, 3))
    assert keyed.getpixel((0, 0)) == (1, 2, 3, 0)
    palette = Image.new("P", (1, 1))
    palette.putpalette([9, 8, 7])
    assert read(palette, "image.gif").getpixel((0, 0)) == (9, 8, 7)
    assert read(palette, "image.png", transparency=0).getpixel((0, 0)) == (9, 8, 7, 0)
    assert read(Image.new("CMYK", (8, 8)), "image.jpg").getpixel((0, 0)) == (255, 255, 255)


def test_only_an_rgb_profile_is_kept(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.new("RGB", (4, 4)).save(tmp_path / "rgb.png", icc_profile=srgb)
    assert read_image(tmp_path / "rgb.png").info == {"icc_profile": srgb}
    assert resize(read_image(tmp_path / "rgb.png"), (2, 2), "area").info == {"icc_profile": srgb}
    grey = srgb[:16] + b"GRAY" + srgb[20:]
    Image.new("L", (4, 4)).save(tmp_path / "grey.png", icc_profile=grey)
    assert read_image(tmp_path / "grey.png").info == {}


def test_unreadable_images_say_why(tmp_path):
    whole = tmp_path / "whole.jpg"
    Image.effect_noise((64, 64), 50).save(whole)
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:-500])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").touch()
    Image.new("F", (2, 2), 255.0).save(tmp_path / "float.tif")
    for name, reason in {
        "cut.jpg": "truncated",
        "text.png": "not in an image format",
        "empty.png": "not in an image format",
        "float.tif": "values are 255 to 255, not 0",
        "absent.png": "No such file",
    }.items():
        with pytest.raises(UnreadableImage, match=reason):
            read_image(tmp_path / name)
