"""`save_lora_weights` keeps alphas, ranks and the type of this package's adapters, whatever it is handed."""

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file

from lora_adapters import Adapter, C3LierConfig, DyLoraConfig, LierLaConfig, add_adapter
from lora_adapters.convert.formats.metadata import DyLora

ALPHAS = C3LierConfig(r=4, lora_alpha=3, conv_dim=2, conv_alpha=5)
DYLORA = DyLoraConfig(r=4, lora_alpha=2, unit=2, rank_scaling="sqrt", freeze_lower=True)


def save(pipe, folder, **options):
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
    text = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.text_encoder))
    StableDiffusionPipeline.save_lora_weights(folder, layers, text, **options)
    return folder / "pytorch_lora_weights.safetensors"


def with_adapter(pipe, config):
    pipe.unet.add_adapter(config)
    add_adapter(pipe.text_encoder, config)
    return pipe


@pytest.mark.parametrize("config", [ALPHAS, DYLORA], ids=["c3lier", "dylora"])
def test_what_is_saved_without_metadata_comes_back(config, pipeline, tmp_path) -> None:
    pipe = with_adapter(pipeline(), config)
    back, live = Adapter.load(save(pipe, tmp_path)), Adapter.from_pipeline(pipe)
    assert back.modules.keys() == live.modules.keys()
    for module, one in live.modules.items():
        assert (one.rank, one.alpha) == (back.modules[module].rank, back.modules[module].alpha)
    assert back.dylora == (DyLora(2, "sqrt", True) if config is DYLORA else None)


def test_names_are_peft_s_throughout(pipeline, tmp_path) -> None:
    tensors = load_file(save(with_adapter(pipeline(), ALPHAS), tmp_path))
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in tensors)


def test_metadata_that_is_handed_in_is_kept(pipeline, tmp_path) -> None:
    pipe = with_adapter(pipeline(), ALPHAS)
    with safe_open(save(pipe, tmp_path, unet_lora_adapter_metadata={"r": 9}), "pt") as opened:
        table = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert table["unet.r"] == 9
    assert table["text_encoder.lora_alpha"] == 3


def test_of_two_of_one_form_it_is_the_one_whose_weights_they_are(pipeline, tmp_path, caplog) -> None:
    first, second = with_adapter(pipeline(), ALPHAS), with_adapter(pipeline(), C3LierConfig(r=4, conv_dim=2))
    for pipe, alpha in ((first, 3), (second, 1)):
        adapter = Adapter.load(save(pipe, tmp_path))
        assert {one.alpha for one in adapter.modules.values() if one.kernel == (1, 1)} == {alpha}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_copy_is_known_by_its_values(dtype, pipeline, tmp_path) -> None:
    first, _ = with_adapter(pipeline(), ALPHAS), with_adapter(pipeline(), C3LierConfig(r=4, conv_dim=2))
    copies = {key: value.clone().to(dtype) for key, value in get_peft_model_state_dict(first.unet).items()}
    StableDiffusionPipeline.save_lora_weights(tmp_path, copies)
    live = Adapter.from_models({"unet": first.unet}).modules
    back = Adapter.load(tmp_path / "pytorch_lora_weights.safetensors").modules
    assert {module: one.alpha for module, one in back.items()} == {module: one.alpha for module, one in live.items()}


def test_a_copy_of_equal_adapters_is_saved_without_alphas(pipeline, tmp_path, caplog) -> None:
    first, second = with_adapter(pipeline(), ALPHAS), with_adapter(pipeline(), C3LierConfig(r=4, conv_dim=2))
    state = first.unet.state_dict()
    second.unet.load_state_dict(state)
    copies = {key: value.clone() for key, value in get_peft_model_state_dict(first.unet).items()}
    StableDiffusionPipeline.save_lora_weights(tmp_path, copies)
    assert "several adapters in memory match it" in caplog.text


def test_a_foreign_lora_of_the_same_form_gets_no_alpha_of_ours(pipeline, tmp_path) -> None:
    ours = with_adapter(pipeline(), LierLaConfig(r=4, lora_alpha=1)).unet
    foreign = pipeline().unet
    foreign.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=ours.peft_config["default"].target_modules))
    StableDiffusionPipeline.save_lora_weights(tmp_path, get_peft_model_state_dict(foreign))
    back = Adapter.load(tmp_path / "pytorch_lora_weights.safetensors").modules
    live = Adapter.from_models({"unet": foreign}).modules
    assert back.keys() == live.keys()
    assert {one.alpha / one.rank for one in back.values()} == {1}


def test_plain_lora_is_saved_as_ever(pipeline, tmp_path) -> None:
    pipe = with_adapter(pipeline(), LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "q_proj"]))
    file = save(pipe, tmp_path)
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert any(".lora.down." in key for key in load_file(file))


def test_a_pickle_is_a_pickle(pipeline, tmp_path) -> None:
    save(with_adapter(pipeline(), ALPHAS), tmp_path, safe_serialization=False)
    assert torch.load(tmp_path / "pytorch_lora_weights.bin", weights_only=True)


def test_a_kohya_file_made_of_it_is_kohya_s_alone(pipeline, tmp_path) -> None:
    adapter = Adapter.load(save(with_adapter(pipeline(), DYLORA), tmp_path))
    with safe_open(adapter.save(tmp_path / "kohya.safetensors"), "pt") as opened:
        metadata = opened.metadata()
    assert "lora_adapter_metadata" not in metadata
    assert metadata["ss_network_module"] == "networks.dylora"
    assert Adapter.load(tmp_path / "kohya.safetensors").dylora == DyLora(2, "sqrt", True)


def test_peft_s_own_folder_of_a_dylora(pipeline, tmp_path) -> None:
    from peft import get_peft_model

    get_peft_model(pipeline().unet, DYLORA).save_pretrained(tmp_path)
    assert Adapter.load(tmp_path).dylora == DyLora(2, "sqrt", True)


def test_a_dora_is_saved_by_its_metadata(pipeline, tmp_path) -> None:
    unet = pipeline().unet
    unet.add_adapter(LierLaConfig(r=2, lora_alpha=3, use_dora=True))
    tensors = get_peft_model_state_dict(unet)
    table = unet.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(tmp_path, tensors, unet_lora_adapter_metadata=table)
    saved = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert {key.removeprefix("unet."): value.shape for key, value in saved.items()} == {
        key: value.shape for key, value in tensors.items()
    }
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as opened:
        table = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert (table["unet.use_dora"], table["unet.lora_alpha"]) == (True, 3)
    plain = pipeline().unet  # of the same widths, which the DoRA must not stand in the way of
    plain.add_adapter(LierLaConfig(r=2, lora_alpha=5))
    StableDiffusionPipeline.save_lora_weights(tmp_path, get_peft_model_state_dict(plain))
    assert {one.alpha for one in Adapter.load(tmp_path).modules.values()} == {5}
    copies = {key: value.clone() for key, value in get_peft_model_state_dict(plain).items()}
    StableDiffusionPipeline.save_lora_weights(tmp_path, copies)  # found among all in memory, by their values
    assert {one.alpha for one in Adapter.load(tmp_path).modules.values()} == {5}
