"""Families of base models: what each layer is called and where it lies, and how a family is found."""

import pytest
import torch
from packaging.version import Version

from lora_adapters.convert import Adapter, AdapterError, LowRank, ModuleName
from lora_adapters.convert.families.detection import base_model_of
from lora_adapters.convert.families.registry import FAMILIES, by_metadata, by_modules, by_name, titles
from lora_adapters.convert.families.tensor_slice import Share, TensorSlice
from lora_adapters.convert.formats.metadata import complete


def layer(family, component, path):
    return next(one for one in by_name(family).layers(component) if one.module.path == path)


def test_a_layer_has_all_its_names():
    query = layer("sdxl", "unet", "mid_block.attentions.0.transformer_blocks.3.attn1.to_q")
    assert query.kohya == "lora_unet_middle_block_1_transformer_blocks_3_attn1_to_q"
    assert query.originals == (
        TensorSlice("model.diffusion_model.middle_block.1.transformer_blocks.3.attn1.to_q.weight"),
    )
    assert (query.block, query.kind) == (11, "linear")
    assert layer("sd", "unet", "mid_block.attentions.0.proj_in").kind == "conv1x1"
    assert layer("sdxl", "unet", "mid_block.attentions.0.proj_in").kind == "linear"
    assert layer("sd", "unet", "down_blocks.0.downsamplers.0.conv").kind == "conv3x3"


def test_open_clips_keys_are_the_second_third():
    found = layer("sd", "text_encoder", "text_model.encoder.layers.1.self_attn.k_proj").originals
    assert [one.key for one in found[:2]] == [
        "cond_stage_model.transformer.text_model.encoder.layers.1.self_attn.k_proj.weight",
        "cond_stage_model.transformer.encoder.layers.1.self_attn.k_proj.weight",
    ]
    assert found[-1].key == "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight"
    stacked = torch.arange(24.0).reshape(12, 2)
    assert torch.equal(found[-1].of(stacked), stacked[4:8])


def test_a_slice_is_a_view_of_rows_and_columns():
    tensor = torch.arange(42.0).reshape(7, 6)
    part = TensorSlice("x", rows=Share(3, 7, 7), columns=Share(1, 2, 2), transposed=True).of(tensor)
    assert torch.equal(part, tensor[3:7, 3:6].T)
    part.zero_()
    assert tensor[3:7, 3:6].eq(0).all()
    assert tensor[:3].ne(0).sum() == 17


def test_flow_matching_has_no_prediction_type_in_modelspec():
    said = {
        version.value: complete({"ss_base_model_version": version.value}, [family], 4, 1.0).get(
            "modelspec.prediction_type"
        )
        for family in FAMILIES
        for version in family.versions
    }
    unets = {"sd_v1": "epsilon", "sd_v2": "epsilon", "sd_v2_v": "v", "sdxl_base_v1-0": "epsilon"}
    assert said == {**dict.fromkeys(said), **unets}
    assert len(said) > 10


def test_blocks_have_labels():
    labels = {family.name: family.blocks.labels for family in FAMILIES}
    assert (labels["sd"][0], labels["sd"][12], labels["sd"][24]) == ("IN00", "MID", "OUT11")
    assert labels["sdxl"][:2] == (None, "IN00")
    assert labels["sdxl"][9:14] == ("IN08", "MID", "MID", "MID", "OUT00")
    assert [family.blocks.count for family in FAMILIES][:4] == [25, 23, 57, 57]


def test_a_family_is_found_by_its_metadata():
    assert by_metadata({"ss_base_model_version": "sdxl_base_v0-9"}) is by_name("sdxl")
    assert by_metadata({"ss_base_model_version": "flux1"}) is by_name("flux")
    assert by_metadata({"ss_base_model_version": "hunyuan-image-2.1"}) is by_metadata({}) is None
    with pytest.raises(AdapterError, match=r"unknown architecture 'dit': expected sd \(SD1.x, SD2.x\) and sdxl"):
        by_name("dit")
    assert titles("or").startswith("SD1.x, SD2.x, SDXL, Flux.1, ")


@pytest.mark.parametrize(("width", "title"), [(768, "SD1.x"), (1024, "SD2.x"), (32, "SD"), (2048, "SDXL")])
def test_a_version_is_found_by_its_width(width, title):
    name = ModuleName("unet", "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k")
    adapter = Adapter({name: LowRank(torch.ones(2, width), torch.ones(640, 2), alpha=1.0)})
    assert base_model_of(adapter.modules, {}).title == title
    assert adapter.family.title == ("SDXL" if title == "SDXL" else "SD")


def test_layers_of_no_family_together_are_named():
    second = ModuleName("text_encoder_2", "text_model.encoder.layers.0.mlp.fc1")
    alone = ModuleName("unet", "down_blocks.0.attentions.0.proj_in")  # SDXL has no attention there
    with pytest.raises(AdapterError, match=r"different architectures.*down_blocks.0.attentions.0.proj_in is not in"):
        by_modules([second, alone])
    with pytest.raises(AdapterError, match=r"unet\.x\.y is not a module of SD1\.x, SD2\.x, SDXL, "):
        by_modules([ModuleName("unet", "x.y")])


def test_pipelines_that_open_one_file_are_diffusers() -> None:
    import diffusers

    named = {family.name: family.single_file for family in FAMILIES}
    assert named["sd"] == "StableDiffusionPipeline"
    if Version(diffusers.__version__) < Version("0.36"):
        assert named.pop("zimage") == "ZImagePipeline"  # which diffusers has from then on
    for name, pipeline in named.items():
        assert not pipeline or hasattr(getattr(diffusers, pipeline), "from_single_file"), name
