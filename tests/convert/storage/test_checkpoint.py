"""Models as files: where weights are, and what is written."""

import json
import sys
import types

import numpy
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_adapters.convert import Adapter, AdapterError, LowRank, ModuleName
from lora_adapters.convert.storage.checkpoint import Checkpoint
from tests.convert.checkpoints import GOLDEN, original, weights


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_every_module_is_found(kind, ending, tmp_path):
    file = tmp_path / f"model.{ending}"
    if ending == "ckpt":
        torch.save({"state_dict": original(kind), "global_step": 7}, file)
    else:
        save_file(original(kind), file)
    opened = Checkpoint.open(file)
    assert opened.architecture == ("sdxl" if kind == "sdxl" else "sd")
    folder = Checkpoint.open(GOLDEN / ("sdxl" if kind == "sdxl" else "sd15"))
    assert set(opened.modules) == set(folder.modules)
    for component in {module.component for module in opened.modules}:
        own = weights(folder.path, component)
        mine = [module for module in opened.modules if module.component == component]
        assert len(mine) > 10
        for module in mine:
            assert torch.equal(opened.weight(module), own[f"{module.path}.weight"]), module


def test_text_encoder_without_its_first_level(tmp_path):
    tensors = {key.replace("transformer.text_model.", "transformer."): one for key, one in original("sd1").items()}
    save_file(tensors, tmp_path / "a.safetensors")
    assert "text_encoder" in {module.component for module in Checkpoint.open(tmp_path / "a.safetensors").modules}


@pytest.mark.parametrize("source", ["safetensors", "ckpt"])
@pytest.mark.parametrize("target", ["safetensors", "ckpt"])
def test_untouched_tensors_are_copied_bit_for_bit(source, target, tmp_path):
    tensors = original("sd1", torch.float16)
    tensors["model_ema.some.bf16"] = torch.randn(3, 5).bfloat16()
    tensors["model_ema.empty"] = torch.zeros(0, 4)
    if source == "ckpt":
        torch.save({"state_dict": tensors}, tmp_path / "in.ckpt")
    else:
        save_file(tensors, tmp_path / "in.safetensors", {"some": "thing", "modelspec.hash_sha256": "0x1"})
    module = ModuleName("unet", "mid_block.attentions.0.proj_in")
    key = "model.diffusion_model.middle_block.1.proj_in.weight"
    out = tmp_path / f"out.{target}"
    Checkpoint.open(tmp_path / f"in.{source}").write(out, {module: lambda weight: weight + 1}, None, {"more": "facts"})
    if target == "ckpt":
        written = torch.load(out, weights_only=True)["state_dict"]
    else:
        written = load_file(out)
        with safe_open(out, "pt") as opened:
            found = opened.metadata()
        assert found == ({"some": "thing", "more": "facts"} if source == "safetensors" else {"more": "facts"})
        header = json.loads(out.read_bytes()[8:][: int.from_bytes(out.read_bytes()[:8], "little")])
        assert all(entry["data_offsets"][0] % 2 == 0 for name, entry in header.items() if name != "__metadata__")
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert written[name].dtype == tensor.dtype
        wanted = (tensor.float() + 1).half() if name == key else tensor
        assert torch.equal(written[name].reshape(-1).view(torch.uint8), wanted.reshape(-1).view(torch.uint8)), name


def test_precision_of_all(tmp_path):
    save_file(original("sd1"), tmp_path / "in.safetensors")
    out = Checkpoint.open(tmp_path / "in.safetensors").write(tmp_path / "out.safetensors", {}, torch.bfloat16)
    written = load_file(out)
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16, torch.int64}
    assert torch.equal(written["model_ema.decay"], torch.tensor(0.9999).bfloat16())


def test_folder_keeps_its_other_files_and_leaves_unmerged_weights_out(tmp_path):
    source = tmp_path / "in"
    for component in ("unet", "text_encoder"):
        (source / component).mkdir(parents=True)
        (source / component / "config.json").write_text("{}")
    save_file(weights(GOLDEN / "sd15", "unet"), source / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    torch.save(weights(GOLDEN / "sd15", "text_encoder"), source / "text_encoder" / "pytorch_model.bin")
    (source / "model_index.json").write_text("{}")
    (source / "unet" / "flax_model.msgpack").write_bytes(b"old")
    (source / "v1-5-pruned.ckpt").write_bytes(b"old")
    text = ModuleName("text_encoder", "text_model.encoder.layers.0.mlp.fc1")
    out = Checkpoint.open(source).write(tmp_path / "out", {text: lambda weight: weight * 2})
    names = sorted(str(file.relative_to(out)) for file in out.rglob("*") if file.is_file())
    assert names == [
        "model_index.json",
        "text_encoder/config.json",
        "text_encoder/pytorch_model.bin",
        "unet/config.json",
        "unet/diffusion_pytorch_model.fp16.safetensors",
    ]
    key = f"{text.path}.weight"
    written = torch.load(out / "text_encoder" / "pytorch_model.bin", weights_only=True)
    assert torch.equal(written[key], 2 * weights(GOLDEN / "sd15", "text_encoder")[key])
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []
    again = Checkpoint.open(out).write(out, {text: lambda weight: weight / 2})  # in place
    assert torch.equal(
        torch.load(again / "text_encoder" / "pytorch_model.bin", weights_only=True)[key], written[key] / 2
    )


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(AdapterError, match="is not a Diffusers folder"):
        Checkpoint.open(GOLDEN / "sd15").write(tmp_path / "photos", {})
    assert (tmp_path / "photos" / "cat.jpg").read_bytes() == b"cat"


@pytest.mark.parametrize("broken", ["nothing", "adapter", "empty folder", "no weights"])
def test_what_is_no_model(broken, tmp_path):
    path = tmp_path / "model"
    if broken == "adapter":
        path = GOLDEN / "sd15" / "lierla.safetensors"
    elif broken != "nothing":
        path.mkdir()
    if broken == "no weights":
        (path / "unet").mkdir()
    with pytest.raises(AdapterError, match=str(path)):
        Checkpoint.open(path)


def test_numbers_too_large_for_the_dtype_are_refused(tmp_path):
    save_file(original("sd1", torch.float16), tmp_path / "in.safetensors")
    module = ModuleName("unet", "mid_block.attentions.0.proj_in")
    opened = Checkpoint.open(tmp_path / "in.safetensors")
    with pytest.raises(AdapterError, match="too large for"):
        opened.write(tmp_path / "out.safetensors", {module: lambda weight: weight + 1e5})
    with pytest.raises(AdapterError, match="NaN"):
        opened.write(tmp_path / "out.safetensors", {module: lambda weight: weight * float("nan")})
    assert [file.name for file in tmp_path.iterdir()] == ["in.safetensors"]


def test_the_outermost_layers_have_their_places(tmp_path):
    """A LoCon of conv_in, conv_out and the time embedding goes into a file and a folder alike."""
    modules = {}
    opened = Checkpoint.open(GOLDEN / "sd15")
    for path in ("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"):
        module = ModuleName("unet", path)
        shape = opened.weight(module).shape
        modules[module] = LowRank(torch.randn(2, *shape[1:]), torch.randn(shape[0], 2, *(1 for _ in shape[2:])), 1.0)
    save_file(original("sd1"), tmp_path / "in.safetensors")
    adapter = Adapter(modules)
    for source, out in ((tmp_path / "in.safetensors", "out.safetensors"), (GOLDEN / "sd15", "out")):
        merged = Checkpoint.open(adapter.merge_into(source, tmp_path / out))
        for module, one in modules.items():
            torch.testing.assert_close(merged.weight(module), opened.weight(module) + one.delta())
    with pytest.raises(AdapterError, match="nothing to extract"):  # no type of kohya's covers them
        Adapter.from_difference(GOLDEN / "sd15", tmp_path / "out", 2, 2)


def lightning_checkpoint(path):
    """A checkpoint as the first Stable Diffusion ones are: with the state of callbacks beside the weights."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
    with pytest.MonkeyPatch.context() as patch:
        for part in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
            patch.setitem(sys.modules, part, module)
        state = {module.ModelCheckpoint: {"best": numpy.float64(0.5), "score": torch.tensor(1.0)}}
        torch.save({"state_dict": original("sd1"), "callbacks": state, "lr": numpy.float32(1)}, path)


def test_checkpoints_of_lightning_open_without_it(tmp_path):
    lightning_checkpoint(tmp_path / "a.ckpt")
    assert "pytorch_lightning" not in sys.modules
    assert len(Checkpoint.open(tmp_path / "a.ckpt").modules) > 280


def test_quantised_weights_are_refused(tmp_path):
    tensors = original("sd1")
    key = "model.diffusion_model.middle_block.1.proj_in.weight"
    tensors[key] = tensors[key].to(torch.int8)
    save_file(tensors, tmp_path / "in.safetensors")
    with pytest.raises(AdapterError, match=r"middle_block.1.proj_in.weight is torch.int8: quantised"):
        Checkpoint.open(tmp_path / "in.safetensors").write(
            tmp_path / "out.safetensors", {ModuleName("unet", "mid_block.attentions.0.proj_in"): lambda weight: weight}
        )
