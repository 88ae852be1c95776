"""Diffusers folders as people have them: links, variants, and files that are no part of the model."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from lora_adapters.convert import Adapter, AdapterError, LowRank, ModuleName
from tests.convert.checkpoints import GOLDEN

QUERY = ModuleName("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q")
MAIN = "diffusion_pytorch_model"
TINY = Path(__file__).parents[3] / "examples" / "tiny-sd"


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
    for name in ("my_images/a.png", ".git/HEAD", "v1-5-pruned.safetensors"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(name)
    source = model if in_place else GOLDEN / "sd15"
    (model / "unet" / "stale.fp16.bin").write_text("of the old U-Net")
    assert adapter.merge_into(source, model) == model
    for name in ("my_images/a.png", ".git/HEAD", "v1-5-pruned.safetensors"):
        assert (model / name).read_text() == name
    assert in_place or not (model / "unet" / "stale.fp16.bin").exists()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_a_folder_that_only_has_a_subfolder_unet_is_none_of_a_model(adapter, tmp_path):
    (tmp_path / "mine" / "unet").mkdir(parents=True)
    (tmp_path / "mine" / "unet" / "mine.txt").write_text("x")
    with pytest.raises(AdapterError, match="is not a Diffusers folder: give a new folder"):
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


def files_in(folder):
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if not file.is_dir()}


@pytest.fixture
def crowded(tmp_path):
    """tiny-sd as people's folders are: runs, private files and earlier results beside the model."""
    made = Path(shutil.copytree(TINY, tmp_path / "crowded"))
    (made / "LICENSE.md").write_text("a copy has to carry it")
    wanted = {name for name in files_in(made) if "/" in name or name in ("model_index.json", "LICENSE.md")}
    private = tmp_path / "private"
    private.mkdir()
    (private / "key.json").write_text("secret")
    (made / "unet" / "key.json").symlink_to(private / "key.json")
    (made / "documents").symlink_to(private)
    (made / "vae" / "documents").symlink_to(private)
    for name in ("checkpoint-500/optimizer.bin", "unet/checkpoint-500/config.json", "logs/events", "unet/notes.txt",
                 "unet/diffusion_pytorch_model.msgpack", "text_encoder/tf_model.h5", "merged/model_index.json",
                 "merged/unet/diffusion_pytorch_model.safetensors", "unet_ema/config.json", "README.md"):  # fmt: skip
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text(name)
    return made, wanted


@pytest.fixture
def tiny_adapter():
    size = load_file(TINY / "unet" / f"{MAIN}.safetensors")[f"{QUERY.path}.weight"].shape
    return Adapter({QUERY: LowRank(torch.ones(1, size[1]), torch.ones(size[0], 1), 1.0)})


def test_what_the_pipeline_needs_is_copied_and_nothing_else(crowded, tiny_adapter, tmp_path):
    model, wanted = crowded
    out = tiny_adapter.merge_into(model, tmp_path / "out")
    assert files_in(out) == wanted
    StableDiffusionPipeline.from_pretrained(out, safety_checker=None)


def test_an_earlier_result_in_the_model_is_replaced_not_copied(crowded, tiny_adapter):
    model, wanted = crowded
    assert files_in(tiny_adapter.merge_into(model, model / "merged")) == wanted
    assert (model / "checkpoint-500" / "optimizer.bin").exists()


def test_a_merge_in_place_takes_nothing_away(crowded, tiny_adapter, tmp_path):
    model, _ = crowded
    before = files_in(model) - {f"unet/{MAIN}.msgpack", "text_encoder/tf_model.h5"}  # of the model before the merge
    tiny_adapter.merge_into(model, model)
    assert files_in(model) == before
    assert (model / "unet" / "key.json").is_symlink()
    assert (model / "vae" / "documents").is_symlink()
    assert (tmp_path / "private" / "key.json").read_text() == "secret"


def test_components_that_the_index_names_are_copied_with_their_own_code(tiny_adapter, tmp_path):
    """As pipelines from the Hub have them: code beside the index and in a component's folder."""
    model = Path(shutil.copytree(TINY, tmp_path / "model"))
    index = json.loads((model / "model_index.json").read_text())
    index |= {"_class_name": ["my_pipeline", "MyPipeline"], "scorer": ["my_scorer", "Scorer"], "nothing": [None, None]}
    (model / "model_index.json").write_text(json.dumps(index))
    code = ("my_pipeline.py", "scorer/my_scorer.py", "scorer/config.json")
    for name in (*code, "scorer/other.py", "nothing/config.json"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(name)
    found = files_in(tiny_adapter.merge_into(model, tmp_path / "out"))
    assert set(code) <= found
    assert not {"scorer/other.py", "nothing/config.json"} & found


def test_a_name_in_the_index_leads_nowhere_else(tiny_adapter, tmp_path):
    model = Path(shutil.copytree(TINY, tmp_path / "model"))
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "config.json").write_text("private")
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, "../outside": ["diffusers", "X"], "": ["x", "y"]}))
    out = tiny_adapter.merge_into(model, tmp_path / "below" / "out")
    assert not (tmp_path / "below" / "outside").exists()
    assert "model_index.json" in files_in(out)
