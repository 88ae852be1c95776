"""Real training on examples/tiny-sd, a small Stable Diffusion that was trained: the loss on held-out images falls."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from lora_adapters.train.options.arguments import settings
from lora_adapters.train.training.loop import train

EXAMPLES = Path(__file__).parents[3] / "examples"
TINY = EXAMPLES / "tiny-sd"
CONV = {"conv_dim": 8, "conv_alpha": 4}


def options(tmp_path: Path, **changes) -> dict:
    """A style on two dozen images, a quarter of them held out."""
    dataset = {
        "general": {"resolution": 64, "caption_extension": ".txt"},
        "datasets": [{"batch_size": 8, "subsets": [{"image_dir": str(EXAMPLES / "images" / "delft" / "train")}]}],
    }
    (tmp_path / "data.json").write_text(json.dumps(dataset))
    return {
        "pretrained_model_name_or_path": str(TINY),
        "dataset_config": str(tmp_path / "data.json"),
        "output_dir": str(tmp_path / "out"),
        "output_name": "x",
        "network_module": "networks.lora",
        "network_dim": 8,
        "network_alpha": 8,
        "learning_rate": 1e-3,
        "max_train_steps": 30,
        "validation_split": 0.25,
        "max_data_loader_n_workers": 0,
        "cache_latents": True,
        "seed": 1,
        **changes,
    }


def held_out(result, step: int) -> list[float]:
    return [one.loss for one in result.held_out if one.step == step]


PATHS = {
    "LierLa": {},
    "C3Lier": {"network_args": CONV},
    "DyLoRA": {"network_module": "networks.dylora", "network_args": {"unit": 4, "conv_dim": 8, "conv_alpha": 8}},
    "U-Net alone, cached text": {"network_train_unet_only": True, "cache_text_encoder_outputs": True},
    "text encoder alone": {"network_train_text_encoder_only": True},
    "bf16": {"mixed_precision": "bf16"},
    "uncached": {"cache_latents": False, "flip_aug": True},
    "checkpointing": {"gradient_checkpointing": True, "network_args": CONV},
    "block rates and LoRA+": {"network_args": {"down_lr_weight": "linear+0.2", "loraplus_lr_ratio": 4}},
    "AdamW8bit": {"optimizer_type": "AdamW8bit"},
    "Prodigy": {"optimizer_type": "Prodigy", "learning_rate": 1.0},
    "AdaFactor": {
        "optimizer_type": "AdaFactor",
        "optimizer_args": ["relative_step=False", "scale_parameter=False", "warmup_init=False"],
    },
    # its own rates are 1e-5 while weights are zero
    "AdaFactor, its own rates": {"optimizer_type": "AdaFactor", "max_train_steps": 60},
    "schedule-free": {"optimizer_type": "AdamWScheduleFree"},
    "min-SNR, offset noise, Huber": {"min_snr_gamma": 5.0, "noise_offset": 0.03, "loss_type": "huber"},
}
PACKAGES = {"AdamW8bit": "bitsandbytes", "Prodigy": "prodigyopt", "schedule-free": "schedulefree"}


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_the_held_out_loss_falls_on_every_path(tmp_path, path) -> None:
    if path in PACKAGES:
        pytest.importorskip(PACKAGES[path])
    result = train(settings(**options(tmp_path, **PATHS[path])))
    first, last = held_out(result, 0), held_out(result, result.steps)
    assert len(first) == (2 if path == "DyLoRA" else 1)  # DyLoRA: at each of its ranks
    for before, after in zip(first, last, strict=True):
        assert after < 0.97 * before, f"{before:.4f} to {after:.4f}"


STOCK = """
import json, sys, numpy, torch
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.float32)
assert "lora_adapters" not in sys.modules
pipe.load_lora_weights(sys.argv[2], weight_name="x.safetensors")
pipe.set_progress_bar_config(disable=True)
image = pipe("a red apple", num_inference_steps=4, generator=torch.manual_seed(0), output_type="np").images[0]
numpy.save(sys.argv[3], image)
"""


def test_a_c3lier_opens_in_stock_diffusers_and_draws_the_same(tmp_path, capsys) -> None:
    """In a process that never imports this package. The linear layers' scale is 1, the convolutions' 1/2."""
    result = train(settings(**options(tmp_path, max_train_steps=4, learning_rate=5e-3, network_args=CONV)))
    file = tmp_path / "out" / "x.safetensors"
    command = [sys.executable, "-c", STOCK, str(TINY), str(file.parent), str(tmp_path / "image.npy")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    opened = np.load(tmp_path / "image.npy")
    base = StableDiffusionPipeline.from_pretrained(TINY, torch_dtype=torch.float32)
    trained = result.models.pipeline(base.scheduler)
    images = []
    for pipe in (trained, base):
        pipe.set_progress_bar_config(disable=True)
        images.append(
            pipe("a red apple", num_inference_steps=4, generator=torch.manual_seed(0), output_type="np").images[0]
        )
    assert np.abs(opened - images[0]).max() < 1e-3
    assert np.abs(opened - images[1]).max() > 0.05  # the adapter does change the image
    said = info(file, capsys)
    for fact in ("LoRA-C3Lier for", "sd_v1", "279 in unet", "18 in text_encoder"):
        assert fact in said, fact
    mixed = r"  8 / 4 \(\d+\), 8 \(\d+\)\n"  # rank 8 throughout; convolutions at conv_alpha, the rest at network_alpha
    assert re.search(mixed, said), said


def info(file: Path, capsys) -> str:
    """What `lora-adapters info` prints."""
    from lora_adapters.cli import main

    assert not main(["info", str(file)])
    return capsys.readouterr().out
