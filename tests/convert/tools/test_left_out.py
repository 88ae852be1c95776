"""What a merge leaves out when it is asked to: modules that a model does not have, and averaged weights."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_adapters.convert import Adapter, AdapterError
from lora_adapters.convert.storage.checkpoint import Checkpoint
from lora_adapters.convert.tools.merge import merge_into_model
from tests.convert.checkpoints import original
from tests.convert.scripts import SD15, delta_distance, fails, misused, run

LIERLA = SD15 / "lierla.safetensors"


@pytest.fixture
def unet_only(tmp_path):
    tensors = {key: tensor for key, tensor in original("sd1").items() if key.startswith("model.diffusion_model.")}
    save_file(tensors, tmp_path / "unet.safetensors")
    return tmp_path / "unet.safetensors"


def test_a_text_encoders_part_on_a_checkpoint_of_a_unet_alone(unet_only, tmp_path, capsys):
    out, whole = tmp_path / "out.safetensors", Adapter.load(LIERLA)
    words = ("merge", "--sd_model", unet_only, "--save_to", out, "--models", LIERLA)
    assert "--skip_unknown" in fails(capsys, *words)
    assert not out.exists()
    said = run(capsys, *words, "--skip_unknown")
    missing = [str(module) for module in whole.modules if module.component == "text_encoder"]
    assert f"{len(missing)} modules left out" in said
    assert all(name in said for name in missing)
    part = whole.with_modules({module: one for module, one in whole.modules.items() if module.component == "unet"})
    wanted = load_file(part.merge_into(unet_only, tmp_path / "wanted.safetensors"))
    found = load_file(out)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)


def test_an_adapter_of_which_nothing_is_left(unet_only, tmp_path, capsys):
    text = SD15 / "text_encoder_only.safetensors"
    words = ("merge", "--sd_model", unet_only, "--save_to", tmp_path / "out.safetensors", "--models", text)
    said = fails(capsys, *words, "--skip_unknown")
    assert "none of the modules" in said
    assert "text_encoder_only" in said


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_every_tool_leaves_out_a_module_that_no_model_has(format, tmp_path, capsys):
    whole = Adapter.load(LIERLA)
    file, out = whole.save(tmp_path / "odd.safetensors", format), tmp_path / "out.safetensors"
    down, up = torch.zeros(2, 8), torch.zeros(8, 2)
    strange = {
        "kohya": {"lora_unet_control_in.lora_down.weight": down, "lora_unet_control_in.lora_up.weight": up,
                  "lora_unet_control_in.alpha": torch.tensor(1.0)},
        "diffusers": {"unet.control_in.lora_A.weight": down, "unet.control_in.lora_B.weight": up},
    }[format]  # fmt: skip
    save_file({**load_file(file), **strange}, file)
    for words in (
        ("merge", "--models", file),
        ("svd-merge", "--models", file, "--new_rank", "64"),
        ("resize", "--model", file, "--new_rank", "64"),
        ("convert", "--model", file, "--format", "kohya"),
    ):
        assert "control_in" in fails(capsys, *words, "--save_to", out)
        assert "control_in" in run(capsys, *words, "--save_to", out, "--skip_unknown")
        assert delta_distance(Adapter.load(out), whole) < 1e-5
    assert "control_in" in run(capsys, "info", file)
    (about,) = json.loads(run(capsys, "info", "--json", file))
    assert len(about["unknown_modules"]) == 1
    assert sum(about["modules"].values()) == len(whole.modules)
    split = ("split", "--model", file, "--unit", "4", "--ranks", "4", "--save_to", out)
    assert "control_in" in fails(capsys, *split)
    assert "control_in" in run(capsys, *split, "--skip_unknown")


def test_an_adapter_of_another_kind_of_model_is_not_listed_module_by_module(tmp_path, capsys):
    pair = {"lora_down.weight": torch.zeros(2, 8), "lora_up.weight": torch.zeros(8, 2)}
    names = [f"lora_unet_blocks_{number}_cross_attn_q" for number in range(40)]
    save_file({f"{name}.{end}": one.clone() for name in names for end, one in pair.items()}, tmp_path / "a.safetensors")
    out = tmp_path / "out.safetensors"
    said = fails(capsys, "merge", "--models", tmp_path / "a.safetensors", "--save_to", out, "--skip_unknown")
    assert "unknown module lora_unet_blocks_" in said


def with_twins(tensors):
    """A checkpoint with averaged weights, as the original trainer saves them."""
    twins = {
        "model_ema." + key.removeprefix("model.").replace(".", ""): tensor * 0.5
        for key, tensor in tensors.items()
        if key.startswith("model.diffusion_model.")
    }
    return {**tensors, **twins, "model_ema.num_updates": torch.tensor(7)}


@pytest.fixture
def averaged(tmp_path):
    save_file(with_twins(original("sd1")), tmp_path / "ema.safetensors")
    return tmp_path / "ema.safetensors"


@pytest.mark.parametrize("chosen", ["keep", "drop", "merge"])
def test_averaged_weights_are_kept_dropped_or_merged(averaged, chosen, tmp_path, capsys):
    before, adapter, out = load_file(averaged), Adapter.load(LIERLA), tmp_path / "out.safetensors"
    twins = {key for key in before if key.startswith("model_ema.")}
    options = () if chosen == "keep" else ("--ema", chosen)
    said = run(capsys, "merge", "--sd_model", averaged, "--save_to", out, "--models", LIERLA, *options)
    assert f"{len(twins)} EMA tensors" in said
    found, places = load_file(out), Checkpoint.open(averaged).files[0].places
    assert found.keys() == (before.keys() - twins if chosen == "drop" else before.keys())
    changed = set()
    for module, one in adapter.modules.items():
        key = places[module].key
        delta = one.delta().reshape(before[key].shape)
        torch.testing.assert_close(found[key], before[key] + delta, rtol=1e-5, atol=1e-6)
        changed.add(key)
        if chosen == "merge" and module.component == "unet":
            key = "model_ema." + key.removeprefix("model.").replace(".", "")
            torch.testing.assert_close(found[key], before[key] + delta, rtol=1e-5, atol=1e-6)
            changed.add(key)
    assert changed & twins or chosen != "merge"
    assert all(torch.equal(found[key], before[key]) for key in found.keys() - changed)


def test_a_model_without_averaged_weights(unet_only, tmp_path, capsys):
    unet, out = SD15 / "unet_only.safetensors", tmp_path / "out.safetensors"
    for chosen, said in (("drop", "has no EMA weights"), ("x", "keep, drop, merge")):
        with pytest.raises(AdapterError, match=said):
            merge_into_model(unet_only, out, [Adapter.load(unet)], [1.0], ema=chosen)
    assert "--sd_model" in misused(capsys, "merge", "--save_to", out, "--models", LIERLA, "--ema", "drop")
    assert "EMA" not in run(capsys, "merge", "--sd_model", unet_only, "--save_to", out, "--models", unet)


def test_a_table_with_something_else_in_it_is_told_by_its_key(tmp_path, capsys):
    torch.save({**load_file(LIERLA), "training_settings": {"lr": 1}}, tmp_path / "a.pt")
    said = fails(capsys, "info", tmp_path / "a.pt")
    assert "training_settings" in said
    assert "dict" in said
    torch.save([1, 2], tmp_path / "b.pt")
    assert "list" in fails(capsys, "info", tmp_path / "b.pt")
