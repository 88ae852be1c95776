"""Forms as words of the file tools, which are run."""

import pytest
import torch
from safetensors.torch import load_file

from lora_adapters import Adapter
from lora_adapters.cli import main
from lora_adapters.train.studio import file_tools as tools
from lora_adapters.train.studio.paths import Folders, StudioError
from tests.train.generating import adapter_for


@pytest.fixture
def folders(sd1, tmp_path):
    (tmp_path / "adapters").mkdir()
    for number, name in enumerate(("a", "b")):
        adapter_for(sd1, tmp_path / "adapters" / f"{name}.safetensors", seed=number)
    return Folders(str(sd1), tmp_path / "output", (tmp_path / "adapters",))


@pytest.fixture
def ab(folders):
    return [str(folders.adapters[0] / f"{name}.safetensors") for name in "ab"]


def made(words, folders, name):
    assert main(words) == 0
    return Adapter.load(folders.output / name)


def test_merge_and_svd_merge(folders, ab):
    a, b = map(Adapter.load, ab)
    wanted = a.scale(0.5) + b.scale(-1.0)
    both = made(tools.merge(folders, ab, "0.5, -1", False, "both", tools.OWN), folders, "both.safetensors")
    small = made(tools.svd_merge(folders, ab, "0.5,-1", 8, None, "small", "fp16"), folders, "small.safetensors")
    for module, change in wanted.modules.items():
        torch.testing.assert_close(both.modules[module].delta(), change.delta())
        torch.testing.assert_close(small.modules[module].delta().float(), change.delta(), rtol=0.02, atol=0.02)
    assert {part.dtype for one in small.modules.values() for part in one.tensors().values()} == {torch.float16}
    assert main(tools.merge(folders, ab[:1], "", True, "model", tools.OWN)) == 0
    assert (folders.output / "model" / "model_index.json").is_file()


def test_extract_resize_and_convert(folders, ab):
    assert main(tools.merge(folders, ab[:1], "1", True, "tuned", tools.OWN)) == 0
    words = tools.extract(folders, str(folders.output / "tuned"), 4, None, None, "extracted", tools.OWN)
    extracted = made(words, folders, "extracted.safetensors")
    a = Adapter.load(ab[0])
    module = next(iter(a.modules))
    torch.testing.assert_close(extracted.modules[module].delta(), a.modules[module].delta(), rtol=1e-3, atol=1e-3)
    resized = made(tools.resize(folders, ab[0], 2, 1, None, "resized", "bf16"), folders, "resized.safetensors")
    assert resized.rank == 2
    made(tools.convert(folders, ab[0], "peft", None, "folder", tools.OWN), folders, "folder")
    assert (folders.output / "folder" / "unet" / "adapter_config.json").is_file()
    words = tools.convert(folders, ab[0], "diffusers", None, "d", tools.OWN)
    made(words, folders, "d.safetensors")
    assert next(iter(load_file(folders.output / "d.safetensors"))).startswith(("unet.", "text_encoder."))
    words = tools.convert(folders, ab[0], "kohya", 4, "pairs", tools.OWN)
    assert {"--to=lora", "--rank=4", f"--sd_model={folders.model}"} <= set(words)
    assert made(words, folders, "pairs.safetensors").rank == 4


def test_what_a_form_cannot_have(folders, ab):
    with pytest.raises(StudioError, match="outside of the folders"):
        tools.merge(folders, [*ab, "/etc/passwd"], "", False, "x", tools.OWN)
    with pytest.raises(StudioError, match="outside of the folders"):
        tools.extract(folders, "/etc", 4, None, None, "x", tools.OWN)
    with pytest.raises(StudioError, match="2 adapters and 1 weights"):
        tools.merge(folders, ab, "1", False, "x", tools.OWN)
    with pytest.raises(StudioError, match="weights must be comma-separated numbers"):
        tools.merge(folders, ab, "1, b", False, "x", tools.OWN)
    with pytest.raises(StudioError, match="choose the adapters"):
        tools.svd_merge(folders, [], "", 4, None, "x", tools.OWN)
    with pytest.raises(StudioError, match="a rank is a whole number"):
        tools.resize(folders, ab[0], 1.5, None, None, "x", tools.OWN)
    with pytest.raises(StudioError, match="is not a format"):
        tools.convert(folders, ab[0], "onnx", None, "x", tools.OWN)
    with pytest.raises(StudioError, match="is not a precision"):
        tools.convert(folders, ab[0], "kohya", None, "x", "int8")
