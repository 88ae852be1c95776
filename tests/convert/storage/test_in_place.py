"""Results that replace what they were made from, while it is still mapped into memory."""

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_adapters.convert import Adapter, AdapterError, LowRank, ModuleName
from lora_adapters.convert.storage import atomic
from tests.convert.checkpoints import GOLDEN, original, original_unet_name

QUERY = ModuleName("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q")
MAIN = "diffusion_pytorch_model"


def query_adapter():
    size = load_file(GOLDEN / "sd15" / "unet" / f"{MAIN}.safetensors")[f"{QUERY.path}.weight"].shape
    return Adapter({QUERY: LowRank(torch.ones(1, size[1]), torch.ones(size[0], 1), 1.0)})


def names(folder):
    """What is left when the program ends."""
    atomic._delete_leftovers()
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt", "peft"])
def test_an_adapter_replaces_the_file_it_was_loaded_from(name, tmp_path):
    path, form = tmp_path / name, "peft" if name == "peft" else "kohya"
    query_adapter().save(path, form)
    before = names(tmp_path)
    for weight in (2.0, 4.0):
        loaded = Adapter.load(path)
        loaded.scale(2.0).save(path, form)
        assert Adapter.load(path).modules[QUERY].delta().unique().tolist() == [weight]
        assert loaded.modules[QUERY].delta().unique().tolist() == [weight / 2], "what was loaded has not changed"
    del loaded
    assert names(tmp_path) == before


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt", "folder"])
def test_a_model_is_merged_in_place(name, tmp_path):
    path = tmp_path / name
    if name == "folder":
        shutil.copytree(GOLDEN / "sd15", path)
    elif name.endswith("safetensors"):
        save_file(original("sd1"), path)
    else:
        torch.save({"state_dict": original("sd1")}, path)
    key = f"model.diffusion_model.{original_unet_name(f'{QUERY.path}.weight', 'sd1')}"

    def weight():
        if name == "folder":
            return load_file(path / "unet" / f"{MAIN}.safetensors")[f"{QUERY.path}.weight"].clone()
        return (load_file(path) if name.endswith("safetensors") else torch.load(path)["state_dict"])[key].clone()

    before, files = weight(), names(tmp_path)
    for number in (1, 2):
        assert query_adapter().merge_into(path, path) == path
        torch.testing.assert_close(weight(), before + number)
    assert names(tmp_path) == files


def test_a_component_of_the_adapter_before_is_removed(tmp_path):
    text = ModuleName("text_encoder", "text_model.encoder.layers.0.self_attn.q_proj")
    both = Adapter({**query_adapter().modules, text: LowRank(torch.ones(1, 8), torch.ones(8, 1), 1.0)})
    loaded = Adapter.load(both.save(tmp_path / "peft", "peft"))
    query_adapter().save(tmp_path / "peft", "peft")
    assert Adapter.load(tmp_path / "peft").components == ("unet",)
    assert loaded.components == ("unet", "text_encoder")


@pytest.mark.skipif("not atomic.LOCKING", reason="only Windows keeps files that are open")
def test_a_file_that_is_open_elsewhere_stays_and_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_WAITS", (0.0,))
    path = query_adapter().save(tmp_path / "x.safetensors")
    before = path.read_bytes()
    with path.open("rb"), pytest.raises(AdapterError, match=r"x\.safetensors cannot be written \(") as caught:
        query_adapter().scale(2.0).save(path)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.safetensors"]
