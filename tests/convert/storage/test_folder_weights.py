"""Which files of a component are its weights: shards, variants, and what lies beside them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_adapters.convert import Adapter, AdapterError, LowRank, ModuleName
from lora_adapters.convert.storage.checkpoint import Checkpoint
from lora_adapters.convert.storage.folder_weights import weights_of
from tests.convert.checkpoints import GOLDEN, weights

MAIN = "diffusion_pytorch_model"
SHARDS = [f"{MAIN}-0000{n}-of-00002.safetensors" for n in (1, 2)]
KEY = "mid_block.attentions.0.proj_in"


def touch(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()


def index(folder, names, name=f"{MAIN}.safetensors.index.json"):
    (folder / name).write_text(json.dumps({"weight_map": {f"k{at}": one for at, one in enumerate(names)}}))


def found(folder):
    return [file.name for file in weights_of(folder)]


def test_orphan_shards_do_not_count_beside_the_main_file(tmp_path):
    touch(tmp_path, f"{MAIN}.safetensors", SHARDS[0], "a_model_backup.safetensors")
    assert found(tmp_path) == [f"{MAIN}.safetensors"]
    touch(tmp_path, SHARDS[1])  # complete, and still named by no index
    assert found(tmp_path) == [f"{MAIN}.safetensors"]


def test_an_index_names_the_shards(tmp_path):
    touch(tmp_path, *SHARDS, f"{MAIN}-00001-of-00003.safetensors")
    index(tmp_path, SHARDS)
    assert found(tmp_path) == SHARDS
    touch(tmp_path, f"{MAIN}.safetensors")
    assert found(tmp_path) == SHARDS  # diffusers takes the index first
    text = tmp_path / "text"
    names = [name.replace(MAIN, "model") for name in SHARDS]
    touch(text, *names, "model.safetensors")
    index(text, names, "model.safetensors.index.json")
    assert found(text) == ["model.safetensors"]  # transformers the file


@pytest.mark.parametrize("name", [f"{MAIN}.safetensors.index.fp16.json", f"{MAIN}.fp16.safetensors.index.json"])
@pytest.mark.parametrize(
    "pattern", [f"{MAIN}.fp16-0000%d-of-00002.safetensors", f"{MAIN}-0000%d-of-00002.fp16.safetensors"]
)
def test_shards_of_a_variant_come_after_the_main_file(name, pattern, tmp_path):
    shards = [pattern % number for number in (1, 2)]
    touch(tmp_path, f"{MAIN}.bin", *shards)
    index(tmp_path, shards, name)
    assert found(tmp_path) == [f"{MAIN}.bin", *shards]


@pytest.mark.parametrize(
    ("names", "said"),
    [([*SHARDS, "gone.safetensors"], "lists gone.safetensors"), (["../x.safetensors"], "lists ../x"), ([], "no files")],
)
def test_an_index_that_cannot_be_followed(names, said, tmp_path):
    touch(tmp_path, *SHARDS)
    index(tmp_path, names)
    with pytest.raises(AdapterError, match=said):
        weights_of(tmp_path)
    (tmp_path / f"{MAIN}.safetensors.index.json").write_text("[1]")
    with pytest.raises(AdapterError, match="not an index of shards"):
        weights_of(tmp_path)


def test_incomplete_shards_alone_are_no_weights(tmp_path):
    touch(tmp_path, SHARDS[0])
    with pytest.raises(AdapterError, match="only some shards"):
        weights_of(tmp_path)
    touch(tmp_path, SHARDS[1])
    assert found(tmp_path) == SHARDS


@pytest.mark.parametrize("sharded", [False, True])
def test_merging_changes_what_is_loaded_and_leaves_the_rest_out(sharded, tmp_path):
    """Stale files with other numbers lie beside the weights that the libraries load."""
    folder = tmp_path / "in" / "unet"
    folder.mkdir(parents=True)
    tensors = weights(GOLDEN / "sd15", "unet")
    stale = {key: torch.zeros_like(one) for key, one in tensors.items()}
    half = sorted(tensors)[: len(tensors) // 2]
    parts = [{key: one for key, one in tensors.items() if (key in half) == first} for first in (True, False)]
    if sharded:
        for name, part in zip(SHARDS, parts, strict=True):
            save_file(part, folder / name)
        index(folder, SHARDS)
        save_file(stale, folder / f"{MAIN}.safetensors")
    else:
        save_file(tensors, folder / f"{MAIN}.safetensors")
        save_file(stale, folder / SHARDS[0])
        index(folder, SHARDS, "model.safetensors.index.json")  # of another program
    (folder / "my_model_backup.safetensors").write_bytes(b"mine")  # no pipeline reads it
    module = ModuleName("unet", KEY)
    shape = tensors[f"{KEY}.weight"].shape
    one = LowRank(torch.ones(1, *shape[1:]), torch.ones(shape[0], 1, *(1 for _ in shape[2:])), 1.0)
    assert torch.equal(Checkpoint.open(tmp_path / "in").weight(module), tensors[f"{KEY}.weight"])
    out = Adapter({module: one}).merge_into(tmp_path / "in", tmp_path / "out") / "unet"
    wanted = {*SHARDS, f"{MAIN}.safetensors.index.json"} if sharded else {f"{MAIN}.safetensors"}
    assert {file.name for file in out.iterdir()} == wanted
    merged = {key: one for file in out.glob("*.safetensors") for key, one in load_file(file).items()}
    assert merged.keys() == tensors.keys()
    torch.testing.assert_close(merged[f"{KEY}.weight"], tensors[f"{KEY}.weight"] + 1)
