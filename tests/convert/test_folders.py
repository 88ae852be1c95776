"""Diffusers folders as people have them: links, variants, and files that are no part of the model."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_adapters.convert import Adapter, AdapterError, LowRank, ModuleName

from .checkpoints import GOLDEN

QUERY = ModuleName("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q")
MAIN = "diffusion_pytorch_model"


@pytest.fixture
def model(tmp_path):
    return Path(shutil.copytree(GOLDEN / "sd15", tmp_path / "model"))


@pytest.fixture
def adapter():
    size = load_file(GOLDEN / "sd15" / "unet" / f"{MAIN}.safetensors")[f"{QUERY.path}.weight"].shape
    return Adapter({QUERY: LowRank(torch.ones(1, size[1]), torch.ones(size[0], 1), 1.0)})


def query(file):
    tensors = load_file(file) if file.suffix == ".safetensors" else torch.load(file)
    return tensors[f"{QUERY.path}.weight"].float()


@pytest.mark.parametrize("in_place", [False, True])
def test_components_that_are_links_are_merged_too(model, adapter, in_place, tmp_path):
    (model / "unet").rename(tmp_path / "elsewhere")
    (model / "unet").symlink_to(tmp_path / "elsewhere")
    (model / "unet" / "loop").symlink_to(model)
    before = query(tmp_path / "elsewhere" / f"{MAIN}.safetensors")
    out = adapter.merge_into(model, model if in_place else tmp_path / "out")
    torch.testing.assert_close(query(out / "unet" / f"{MAIN}.safetensors"), before + 1)
    torch.testing.assert_close(query(tmp_path / "elsewhere" / f"{MAIN}.safetensors"), before)
    assert not (out / "unet" / "loop").exists()


@pytest.mark.parametrize("in_place", [False, True])
def test_what_is_no_part_of_the_model_stays(model, adapter, in_place, tmp_path):
    for name in ("my_pictures/a.png", ".git/HEAD", "v1-5-pruned.safetensors"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(name)
    source = model if in_place else GOLDEN / "sd15"
    (model / "unet" / "stale.fp16.bin").write_text("of the old U-Net")
    assert adapter.merge_into(source, model) == model
    for name in ("my_pictures/a.png", ".git/HEAD", "v1-5-pruned.safetensors"):
        assert (model / name).read_text() == name
    assert in_place or not (model / "unet" / "stale.fp16.bin").exists()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_a_folder_that_only_has_a_subfolder_unet_is_none_of_a_model(adapter, tmp_path):
    (tmp_path / "mine" / "unet").mkdir(parents=True)
    (tmp_path / "mine" / "unet" / "mine.txt").write_text("x")
    with pytest.raises(AdapterError, match="a folder of something else"):
        adapter.merge_into(GOLDEN / "sd15", tmp_path / "mine")
    assert (tmp_path / "mine" / "unet" / "mine.txt").exists()


def test_a_target_that_is_a_link_stays_one(model, adapter, tmp_path):
    before = query(model / "unet" / f"{MAIN}.safetensors")
    link = tmp_path / "link"
    link.symlink_to(model)
    adapter.merge_into(GOLDEN / "sd15", link)
    assert link.is_symlink()
    torch.testing.assert_close(query(model / "unet" / f"{MAIN}.safetensors"), before + 1)
    assert sorted(os.listdir(tmp_path)) == ["link", "model"]


def test_main_weights_in_a_pickle_beside_a_variant_in_safetensors(model, adapter, tmp_path):
    unet = model / "unet"
    tensors = {key: one.clone() for key, one in load_file(unet / f"{MAIN}.safetensors").items()}
    (unet / f"{MAIN}.safetensors").unlink()
    torch.save(tensors, unet / f"{MAIN}.bin")
    save_file({key: one.half() for key, one in tensors.items()}, unet / f"{MAIN}.fp16.safetensors")
    out = adapter.merge_into(model, tmp_path / "out")
    for name in (f"{MAIN}.bin", f"{MAIN}.fp16.safetensors"):
        torch.testing.assert_close(query(out / "unet" / name), query(unet / name) + 1, rtol=0, atol=2e-3)
