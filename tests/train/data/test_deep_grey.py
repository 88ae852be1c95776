"""Grey images with more than 8 bits: their values become the same grey, or the reason says why not."""

import numpy as np
import pytest
from PIL import Image

from lora_adapters.train.data.deep_grey import eight_bit_grey, is_deep
from lora_adapters.train.data.image_files import FileSource, size_if_whole
from lora_adapters.train.resizing.resize import read_image

GREYS = [0, 1, 64, 128, 254, 255]


def test_only_deep_images_are_deep() -> None:
    modes = ("1", "L", "P", "RGB", "RGBA", "CMYK", "I", "I;16", "F")
    assert [mode for mode in modes if is_deep(Image.new(mode, (1, 1)))] == ["I", "I;16", "F"]


@pytest.mark.parametrize(
    "values",
    [
        np.array([GREYS], np.uint16) * 257,
        np.array([GREYS], np.int32) * 257,
        np.array([GREYS], np.float32) / 255,
    ],
)
def test_greys_of_a_file(tmp_path, values) -> None:
    file = tmp_path / "deep.tif"
    Image.fromarray(values).save(file)
    assert np.asarray(eight_bit_grey(Image.open(file))).tolist() == [GREYS]
    assert size_if_whole(FileSource(str(file))) == (6, 1)
    assert np.asarray(read_image(file))[0].tolist() == [[grey] * 3 for grey in GREYS]


def test_a_little_beyond_black_and_white_is_cut_off() -> None:
    values = np.array([[-0.1, 0.5, 1.2]], np.float32)
    assert np.asarray(eight_bit_grey(Image.fromarray(values))).tolist() == [[0, 128, 255]]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.array([[0, 255]], np.float32), "its floating-point values are 0 to 255, not 0 (black) to 1 (white)"),
        (np.array([[0, np.nan]], np.float32), "it holds NaN or infinite values"),
        (np.array([[0, 70000]], np.int32), "its values are 0 to 70000, more than 16 bits"),
        (np.array([[-1, 0]], np.int32), "its values are -1 to 0, more than 16 bits"),
    ],
)
def test_other_scales_are_named_at_the_first_look(tmp_path, values, reason) -> None:
    Image.fromarray(values).save(tmp_path / "deep.tif")
    assert str(size_if_whole(FileSource(str(tmp_path / "deep.tif")))).startswith(reason)
