import hashlib
import json
import shutil

import pytest

from lora_adapters.convert import Adapter
from lora_adapters.train.models.base import load_base_models
from lora_adapters.train.options.arguments import settings
from lora_adapters.train.options.option import options_of
from lora_adapters.train.options.settings import Settings
from lora_adapters.train.training.loop import train
from lora_adapters.train.training.metadata import base_version, described_optimizer, file_hashes, modelspec

METADATA = [name.removeprefix("metadata_") for name in options_of(Settings) if name.startswith("metadata_")]


@pytest.fixture
def models(sd1):
    return load_base_models(settings(pretrained_model_name_or_path=sd1))


def test_names_of_base_models(models) -> None:
    found = []
    for kind, prediction in (("sd1", "epsilon"), ("sd2", "epsilon"), ("sd2", "v_prediction"), ("sdxl", "epsilon")):
        models.kind, models.prediction_type = kind, prediction
        found.append(base_version(models))
    assert found == ["sd_v1", "sd_v2", "sd_v2_v", "sdxl_base_v1-0"]


def test_hashes_of_a_file(tmp_path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "m").write_bytes(content)
    short = hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
    assert file_hashes(tmp_path / "m") == (short, hashlib.sha256(content).hexdigest())


def test_optimizer_and_modelspec(models) -> None:
    options = settings(optimizer_args=["weight_decay=0.1"], metadata_author="me", min_timestep=100, clip_skip=2)
    assert described_optimizer(options) == "torch.optim.adamw.AdamW(weight_decay=0.1)"
    facts = modelspec(options, models)
    assert facts["modelspec.author"] == "me"
    assert facts["modelspec.timestep_range"] == "100,1000"
    assert facts["modelspec.encoder_layer"] == "2"
    assert facts["modelspec.prediction_type"] == "epsilon"


def test_every_metadata_option_is_an_entry(models) -> None:
    facts = modelspec(settings(**{f"metadata_{name}": f"its {name}" for name in METADATA}), models)
    assert {name: facts[f"modelspec.{name}"] for name in METADATA} == {name: f"its {name}" for name in METADATA}


def test_what_a_file_says_about_its_training(basics, tmp_path) -> None:
    options = {**basics, "max_train_steps": 1, "network_dropout": 0.1, "network_args": ["conv_dim=2"]}
    train(settings(**options, output_name="x", training_comment="hello", metadata_title="A title"))
    facts = Adapter.load(tmp_path / "out" / "x.safetensors").metadata
    expected = {
        "ss_network_module": "networks.lora", "ss_network_dim": "2", "ss_network_alpha": "1", "ss_v2": "False",
        "ss_base_model_version": "sd_v1", "ss_steps": "1", "ss_epoch": "1", "ss_seed": "7", "ss_learning_rate": "0.01",
        "ss_training_comment": "hello", "ss_output_name": "x", "ss_num_train_images": "8", "ss_unet_lr": "None",
        "modelspec.title": "A title", "modelspec.architecture": "stable-diffusion-v1/lora",
    }  # fmt: skip
    assert {key: facts[key] for key in expected} == expected
    assert json.loads(facts["ss_network_args"]) == {"conv_dim": "2", "dropout": "0.1"}
    assert len(facts["sshs_model_hash"]) == 64
    assert "ss_tag_frequency" in facts


def test_what_a_file_says_is_what_was_trained(basics, tmp_path) -> None:
    options = {**basics, "max_train_epochs": 1, "cache_latents_to_disk": True, "resolution": "64,32"}
    options["train_data_dir"] = str(shutil.copytree(basics["train_data_dir"], tmp_path / "images"))
    train(settings(**{**options, "network_alpha": 0}, output_name="x"))
    facts = Adapter.load(tmp_path / "out" / "x.safetensors").metadata
    expected = {
        "ss_network_alpha": "2", "ss_max_train_steps": "4", "ss_steps": "4", "ss_cache_latents": "True",
        "modelspec.resolution": "64x32",
    }  # fmt: skip
    assert {key: facts[key] for key in expected} == expected
    start = {"network_weights": str(tmp_path / "out" / "x.safetensors"), "dim_from_weights": True, "network_dim": None}
    train(settings(**{**options, **start}, output_name="y"))
    facts = Adapter.load(tmp_path / "out" / "y.safetensors").metadata
    assert (facts["ss_network_dim"], float(facts["ss_network_alpha"])) == ("2", 2)


def test_no_metadata_keeps_what_readers_need(basics, tmp_path) -> None:
    train(settings(**{**basics, "max_train_steps": 1}, no_metadata=True, training_comment="secret"))
    facts = Adapter.load(tmp_path / "out" / "last.safetensors").metadata
    assert {"ss_network_module", "ss_network_dim", "ss_v2", "sshs_model_hash"} <= facts.keys()
    assert not {"ss_training_comment", "ss_learning_rate", "ss_dataset_dirs", "ss_sd_model_name"} & facts.keys()
