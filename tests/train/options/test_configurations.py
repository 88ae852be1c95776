"""Configurations that people have, with their options and values: each is read, and trains."""

import json
from pathlib import Path

import pytest
import torch

from lora_adapters.convert import Adapter
from lora_adapters.train.data.config import load_data_config
from lora_adapters.train.options.arguments import parse
from lora_adapters.train.train_network import main
from lora_adapters.train.training.setup import check
from tests.train.training.test_resume import command_line

FOLDER = Path(__file__).with_name("configurations")
# What needs a CUDA device or more time than a test has, in the words of the files.
SMALLER = {
    "xformers = true": "xformers = false",
    'mixed_precision = "fp16"': 'mixed_precision = "no"',
    "full_fp16 = true": "full_fp16 = false",
    "AdamW8bit": "AdamW",
    "max_train_epochs = 10": "max_train_epochs = 1",
    "network_dim = 32": "network_dim = 4",
    '"512,512"': '"64,64"',
    "resolution = 512": "resolution = 64",
    "bucket_reso_steps = 64": "bucket_reso_steps = 8",
    "min_bucket_reso = 256": "min_bucket_reso = 64",
    "max_data_loader_n_workers = 8": "max_data_loader_n_workers = 0",
    "persistent_data_loader_workers = true": "persistent_data_loader_workers = false",
}
IGNORED = {
    "lora_scripts": ["lr_restart_cycles (did you mean lr_scheduler_num_cycles?)"],
    "lora_scripts_older": [
        "lr_restart_cycles (did you mean lr_scheduler_num_cycles?)",
        "batch_size (did you mean train_batch_size?)",
        "enable_contrastive",
        "negative_sampling_method",
        "noise_strength",
        "contrastive_weight",
        "contrastive_warmup_steps",
    ],
}


def smaller(name: str, folder: Path) -> Path:
    text = (FOLDER / name).read_text(encoding="utf-8")
    for before, after in SMALLER.items():
        text = text.replace(before, after)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


@pytest.mark.parametrize("name", IGNORED)
def test_lora_scripts(sd1, images, tmp_path, caplog, capsys, name) -> None:
    file = smaller(f"{name}.toml", tmp_path)
    places = {
        "pretrained_model_name_or_path": sd1,
        "train_data_dir": images,
        "output_dir": tmp_path / "out",
        "logging_dir": tmp_path / "logs",
    }
    assert main(command_line({"config_file": file, **places})) == 0
    saved = Adapter.load(tmp_path / "out" / "output_name.safetensors")
    facts = {name: saved.metadata[f"ss_{name}"] for name in ("network_dim", "steps", "seed", "clip_skip", "unet_lr")}
    assert facts == {"network_dim": "4", "steps": "8", "seed": "1337", "clip_skip": "2", "unet_lr": "0.0001"}
    (unknown,) = [said for said in caplog.messages if "not options of this trainer" in said]
    assert set(unknown.partition("ignored: ")[2].split(", ")) == set(IGNORED[name])
    assert "no sample images are drawn without --sample_prompts" in capsys.readouterr().err


@pytest.mark.parametrize("name", [*IGNORED, "notebook"])
def test_the_files_as_they_are_ask_for_nothing_that_is_refused(basics, monkeypatch, name) -> None:
    """On a machine with a CUDA device and the packages that they name."""
    for module in ("xformers", "bitsandbytes"):
        monkeypatch.setitem(__import__("sys").modules, module, torch)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("lora_adapters.train.training.setup.optimizer_class", lambda name: (torch.optim.AdamW, {}))
    model = f"--pretrained_model_name_or_path={basics['pretrained_model_name_or_path']}"
    check(parse([f"--config_file={FOLDER / name}", model]))


def test_a_notebooks_two_files(sd1, images, tmp_path, capsys) -> None:
    file, data = smaller("notebook.toml", tmp_path), smaller("notebook_data.toml", tmp_path)
    data.write_text(data.read_text().replace("/content/images", (images / "1_shape").as_posix()))
    places = {"pretrained_model_name_or_path": sd1, "output_dir": tmp_path / "out", "logging_dir": tmp_path / "logs"}
    line = {"config_file": file, "dataset_config": data, "train_data_dir": "ignored", "max_train_steps": 2, **places}
    text = file.read_text().replace("max_train_epochs = 1\n", "").replace("cache_latents_to_disk = true", "")
    file.write_text(text)
    assert main(command_line(line)) == 0
    saved = Adapter.load(tmp_path / "out" / "project.safetensors")
    facts = {name: saved.metadata[f"ss_{name}"] for name in ("noise_offset", "multires_noise_iterations", "steps")}
    assert facts == {"noise_offset": "0.0357", "multires_noise_iterations": "6", "steps": "2"}
    assert json.loads(saved.metadata["ss_network_args"])["conv_dim"] == "8"
    shown = capsys.readouterr().err
    for said in (
        "--network_args algo is ignored: it is for LyCORIS: give network_module lycoris.kohya",
        "--network_args disable_conv_cp is ignored",
        "not options of a dataset, and ignored: general.max_token_length",
        "--train_data_dir: not used, since --dataset_config",
        "--sample_every_n_steps is left out: 0 draws no sample images",
    ):
        assert shown.count(said) == 1, said


def test_the_notebooks_data_as_they_are(caplog) -> None:
    (dataset,) = load_data_config({"dataset_config": str(FOLDER / "notebook_data.toml")}).datasets
    assert (dataset.resolution, dataset.subsets[0].num_repeats, dataset.subsets[0].keep_tokens) == ((512, 512), 2, 1)
    assert "general.max_token_length" in caplog.text
