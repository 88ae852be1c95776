"""One table of ways to resize: the command line takes what dataset files take."""

import pytest
from PIL import Image

from lora_adapters.train.data.config import load_data_config
from lora_adapters.train.interpolation import FILTERS, RESIZING, TRAINING, resampling
from lora_adapters.train.options.arguments import parse


@pytest.mark.parametrize("name", TRAINING)
def test_command_line_and_dataset_file_take_the_same_names(tmp_path, name) -> None:
    file = tmp_path / "data.toml"
    file.write_text(
        f'[general]\nresize_interpolation = "{name}"\n[[datasets]]\nresolution = 64\n[[datasets.subsets]]\n'
        f"image_dir = '{tmp_path}'\n"
    )
    from_file = load_data_config({"dataset_config": str(file)}).datasets[0].subsets[0].resize_interpolation
    assert parse([f"--resize_interpolation={name}"]).resize_interpolation == from_file == name


def test_names_are_pillows_filters() -> None:
    assert {*TRAINING, *RESIZING} == set(FILTERS)
    assert resampling("linear") == resampling("bilinear") == Image.Resampling.BILINEAR
    assert resampling("area") == resampling("box") == Image.Resampling.BOX
    assert resampling("lanczos4") == resampling("lanczos") == Image.Resampling.LANCZOS
