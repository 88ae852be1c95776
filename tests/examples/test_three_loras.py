import importlib.util
from pathlib import Path

import pytest
import torch
from PIL import Image

FILE = Path(__file__).parents[2] / "examples" / "three_loras.py"
WHOLE = ("all, folded", "one file", "in the model")


@pytest.fixture(scope="module")
def three_loras():
    spec = importlib.util.spec_from_file_location("three_loras", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_four_ways_give_one_image(three_loras, tmp_path, monkeypatch):
    def quick(pipe, prompt):
        generator = torch.Generator().manual_seed(1)
        return pipe(prompt, num_inference_steps=3, guidance_scale=4.0, generator=generator).images[0]

    monkeypatch.setattr(three_loras, "draw", quick)
    images = three_loras.main(["--out", str(tmp_path)])
    live = images["all, live"]
    # the model's own weights are fp16 on disk, and so is the merged model
    assert [three_loras.difference(images[name], live) <= 3 for name in WHOLE] == [True] * 3
    for name in ("model alone", "first", "second", "third"):
        assert three_loras.difference(images[name], live) > 10, name
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height < sheet.width
    assert {file.name for file in tmp_path.iterdir()} == {
        "first.safetensors", "second.safetensors", "third.safetensors", "sum.safetensors", "merged", "sheet.png",
    }  # fmt: skip


def test_a_weight_for_each_file(three_loras, tmp_path, capsys):
    with pytest.raises(SystemExit):
        three_loras.main(["--out", str(tmp_path), "--weights", "0.5"])
    assert "3 files, but 1 weights" in capsys.readouterr().err
