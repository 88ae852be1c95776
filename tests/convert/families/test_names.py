"""Names and blocks against the full lists of modules that kohya's trainer adapts."""

import json
from pathlib import Path

import pytest
import torch

from lora_adapters.convert import Adapter, AdapterError, ModuleName
from lora_adapters.convert.errors import UnknownModuleError
from lora_adapters.convert.families.kohya_names import check_known, from_kohya
from lora_adapters.convert.families.registry import by_modules, by_name
from lora_adapters.convert.formats.lycoris import resolve

MODULES = Path(__file__).parents[2] / "golden" / "modules"


def rows(name):
    table = json.loads((MODULES / f"kohya_modules_{name}.json").read_text())
    return [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]


@pytest.mark.parametrize(
    ("name", "architecture", "count"), [("sd15", "sd", 350), ("sd21", "sd", 416), ("sdxl", "sdxl", 1052)]
)
def test_every_module_both_ways(name, architecture, count):
    listed = rows(name)
    assert len(listed) == count
    family = by_name(architecture)
    for row in listed:
        module = ModuleName(row["component"], row["diffusers_module"])
        assert from_kohya(row["kohya_name"]) == module
        assert family.kohya_name(module) == row["kohya_name"]
        if module.component == "unet":
            assert family.blocks.index(module.path) == row["block_index"]
            assert from_kohya(f"lora_unet_{module.path.replace('.', '_')}") == module  # SDXL in diffusers' naming
    assert by_modules(ModuleName(row["component"], row["diffusers_module"]) for row in listed) is family


def test_unknown_name_shows_the_nearest():
    with pytest.raises(AdapterError, match=r"lora_unet_down_blocks_0_attentions_0_proj_im.*nearest.*proj_in"):
        from_kohya("lora_unet_down_blocks_0_attentions_0_proj_im")
    with pytest.raises(AdapterError, match="lora_te3_x"):
        from_kohya("lora_te3_x")


def test_modules_of_two_architectures_do_not_mix():
    sd = ModuleName("unet", "down_blocks.0.attentions.0.proj_in")
    sdxl = ModuleName("unet", "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q")
    with pytest.raises(AdapterError, match="different architectures"):
        by_modules([sd, sdxl])


OUTSIDE = {
    "lora_unet_label_emb_0_0": ("unet", "add_embedding.linear_1"),
    "lora_unet_label_emb_0_2": ("unet", "add_embedding.linear_2"),
    "lora_unet_add_embedding_linear_1": ("unet", "add_embedding.linear_1"),
    "lora_unet_time_embed_2": ("unet", "time_embedding.linear_2"),
    "lora_te2_text_projection": ("text_encoder_2", "text_projection"),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_modules_outside_of_the_blocks_of_sdxl(name):
    module = ModuleName(*OUTSIDE[name])
    assert from_kohya(name) == check_known(module) == module
    assert from_kohya(by_name("sdxl").kohya_name(module)) == module
    assert by_modules([module, ModuleName("text_encoder_2", "text_model.encoder.layers.0.mlp.fc1")]).name == "sdxl"
    assert by_name("sdxl").blocks.index(module.path) is None


def test_the_size_conditioning_is_sdxls_alone():
    assert by_modules([ModuleName("unet", "add_embedding.linear_1")]).name == "sdxl"
    for name in ("lora_te_text_projection", "lora_te1_text_projection"):
        with pytest.raises(AdapterError, match="text_projection"):
            from_kohya(name)


def test_sd1_in_the_names_of_the_original_code():
    for name, path in by_name("sd").spellings("unet"):
        assert from_kohya(f"lora_unet_{name.replace('.', '_')}") == ModuleName("unet", path)


@pytest.mark.parametrize("half", ["lora_unet_control_in.lora_{}.weight", "unet.control_in.lora_{}.weight"])
def test_a_name_that_no_model_has_is_an_error_of_its_own(half):
    names = ("down", "up") if half.startswith("lora_") else ("A", "B")
    tensors = {half.format(names[0]): torch.zeros(2, 8), half.format(names[1]): torch.zeros(8, 2)}
    with pytest.raises(UnknownModuleError, match="unknown module"):
        Adapter.from_tensors(tensors, {})


def test_other_faults_of_a_known_module_are_no_unknown_module():
    name = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {f"{name}.lora_down.weight": torch.zeros(2, 8), f"{name}.lora_up.weight": torch.zeros(8, 3)}
    with pytest.raises(AdapterError) as caught:
        Adapter.from_tensors(tensors, {})
    assert not isinstance(caught.value, UnknownModuleError)


@pytest.mark.parametrize("read", [from_kohya, resolve])
@pytest.mark.parametrize("name", ["lora_unet_control_in", "lora_other_control_in"])
def test_every_lookup_raises_it(read, name):
    with pytest.raises(UnknownModuleError):
        read(name)
