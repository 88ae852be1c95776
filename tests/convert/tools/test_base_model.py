"""--base_model: what a file is for whose layers are those of several transformers, in each tool that writes one."""

import pytest
import torch
from safetensors.torch import save_file

from lora_adapters.convert import Adapter
from tests.convert.families.test_detection import attention
from tests.convert.scripts import fails, run

TOOLS = {
    "convert": ["--model", "{a}", "--format", "kohya", "--save_to", "{out}"],
    "average": ["{a}", "{b}", "--save_to", "{out}"],
    "merge": ["--models", "{a}", "{b}", "--save_to", "{out}"],
    "svd-merge": ["--models", "{a}", "{b}", "--new_rank", "1", "--save_to", "{out}"],
    "resize": ["--model", "{a}", "--new_rank", "1", "--save_to", "{out}"],
    "split": ["--model", "{a}", "--sort", "--ranks", "1", "--save_to", "{out}"],
}


@pytest.mark.parametrize("tool", TOOLS)
def test_a_file_that_does_not_say_what_it_is_for_is_written_for_the_family_that_is_given(tool, tmp_path, capsys):
    for name in "ab":
        torch.manual_seed(ord(name))
        tensors = {key: torch.randn(tensor.shape) for key, tensor in attention(16, 1).items()}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    places = {name: tmp_path / f"{name}.safetensors" for name in ("a", "b", "out")}
    words = [tool, *(word.format(**places) for word in TOOLS[tool])]
    assert "is a layer of several models" in fails(capsys, *words)
    run(capsys, *words, "--base_model", "sd3")
    (written,) = tmp_path.glob("out*.safetensors")
    assert Adapter.load(written).family.name == "sd3"
    assert "--base_model zimage" in fails(capsys, *words, "--base_model", "zimage")
