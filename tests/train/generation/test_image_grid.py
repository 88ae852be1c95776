import numpy as np
import pytest
from PIL import Image, ImageFont

from lora_adapters.train.errors import TrainingError
from lora_adapters.train.generation.image_grid import GAP, draw_sheet, wrapped

COLOURS = [["red", "lime", "blue"], ["black", "gray", "yellow"]]


def sheet(side: int, labels=("one", "two"), titles=("a", "b", "c")) -> np.ndarray:
    rows = [(label, [Image.new("RGB", (side, side), colour) for colour in row])
            for label, row in zip(labels, COLOURS, strict=True)]  # fmt: skip
    return np.asarray(draw_sheet(rows, titles))


@pytest.mark.parametrize(("side", "shown"), [(64, 128), (100, 200), (256, 256)])
def test_every_image_in_its_cell(side, shown) -> None:
    made = sheet(side)
    step = shown + GAP
    top = made.shape[0] - 2 * step
    left = made.shape[1] - 3 * step
    for y, row in enumerate(COLOURS):
        for x, colour in enumerate(row):
            cell = made[top + y * step : top + y * step + shown, left + x * step : left + x * step + shown]
            assert (cell == np.asarray(Image.new("RGB", (1, 1), colour))[0, 0]).all()
    assert (made[top + shown : top + step] == 255).all()
    assert (made[:top, left:] < 128).any()  # titles
    assert (made[top:, :left] < 128).any()  # labels


def test_long_labels_are_wrapped_and_rows_grow(monkeypatch) -> None:
    font = ImageFont.load_default(14)
    text = wrapped("a long prompt of many words\nseed 5", font, 80)
    assert text.replace("\n", " ") == "a long prompt of many words seed 5"
    assert max(font.getlength(line) for line in text.split("\n")) <= 80
    assert wrapped("word " * 60, font, 80).endswith("...")
    assert sheet(64, labels=("word " * 60, "two")).shape[0] > sheet(64).shape[0]


def test_images_of_different_sizes() -> None:
    made = draw_sheet([("x", [Image.new("RGB", (128, 128)), Image.new("RGB", (256, 192))])], ["a", "b"])
    assert made.height > 192


def test_a_font_that_is_none(tmp_path) -> None:
    (tmp_path / "a.ttf").write_bytes(b"no")
    with pytest.raises(TrainingError, match="--sheet_font"):
        draw_sheet([("x", [Image.new("RGB", (8, 8))])], ["a"], str(tmp_path / "a.ttf"))
