"""Programs on consoles that lack most of Unicode's letters, as Windows's do when their output goes to a file."""

import logging
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

from lora_adapters.convert import Adapter, LowRank, ModuleName
from lora_adapters.train.options.arguments import settings
from lora_adapters.train.training.trackers import console

QUERY = ModuleName("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q")
CP1252 = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}


def program(*words):
    command = [sys.executable, "-m", "lora_adapters.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, env=CP1252, check=False)


def test_metadata_in_any_script_is_shown(tmp_path):
    facts = {"ss_output_name": "猫 → é"}
    Adapter({QUERY: LowRank(torch.ones(1, 2), torch.ones(2, 1), 1.0)}, facts).save(tmp_path / "猫.safetensors")
    shown = program("info", tmp_path / "猫.safetensors")
    assert shown.returncode == 0, shown.stderr
    assert rb"\u732b \u2192 " + "é".encode("cp1252") in shown.stdout
    assert rb"\u732b.safetensors" in shown.stdout


def test_images_in_a_folder_of_any_name_are_resized(tmp_path):
    (tmp_path / "猫").mkdir()
    Image.new("RGB", (90, 90)).save(tmp_path / "猫" / "→.png")
    (tmp_path / "猫" / "broken.png").write_bytes(b"no image")
    done = program("resize-images", tmp_path / "猫", tmp_path / "out", "--max_resolution", "64x64", "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert rb"\u732b" in done.stderr, "the warning of the broken one"
    assert (tmp_path / "out" / "→+64x64.jpg").exists()


@pytest.mark.parametrize("name", ["generate", "train"])
def test_errors_name_files_in_any_script(name, tmp_path):
    option = {"generate": ("--ckpt", "--prompt", "猫"), "train": ("--pretrained_model_name_or_path",)}[name]
    failed = program(name, option[0], tmp_path / "猫.safetensors", *option[1:])
    assert failed.returncode == 1
    assert failed.stderr.count(b"\n") == 1
    assert rb"\u732b.safetensors" in failed.stderr


def test_the_log_file_takes_any_text(tmp_path):
    with console(settings(console_log_file=str(tmp_path / "log"))):
        logging.getLogger("lora_adapters").info("猫 →")
    assert "猫 →" in (tmp_path / "log").read_bytes().decode("utf-8")
