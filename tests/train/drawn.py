"""Images, folders and a tiny VAE for the tests of train/data."""

import random
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from PIL import Image

from lora_adapters.train.data.cache_files import LatentFiles
from lora_adapters.train.data.config import load_data_config
from lora_adapters.train.data.dataset import TrainingData

LATENT_FILES = LatentFiles("_sd.npz", unsized=".npz")


def drawn_image(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """An image with smooth random colours, different for each seed and without symmetries."""
    numbers = random.Random(seed)
    small = Image.new("RGB", (4, 4))
    small.putdata([tuple(numbers.randrange(256) for _ in range(3)) for _ in range(16)])
    return small.resize(size, Image.Resampling.BICUBIC)


def folder(path: Path, sizes: list[tuple[int, int]], captions: list[str] | None = None, suffix: str = ".png") -> Path:
    """Fill the folder `path` with images 0, 1, ... of `sizes`, and their captions if given."""
    path.mkdir(parents=True, exist_ok=True)
    for number, size in enumerate(sizes):
        drawn_image(size, number).save(path / f"{number}{suffix}")
        if captions is not None:
            (path / f"{number}.caption").write_text(captions[number], encoding="utf-8")
    return path


def data(images: Path, *, seed: int = 7, file: dict[str, Any] | None = None, **options: Any) -> TrainingData:
    """TrainingData of one folder, through a json dataset file next to it. `options`: for the dataset and the subset."""
    import json

    config = images.parent / f"{images.name}.json"
    config.write_text(json.dumps(file or {"general": options, "datasets": [{"subsets": [{"image_dir": str(images)}]}]}))
    return TrainingData(load_data_config({"dataset_config": str(config), "resolution": 64}), seed=seed)


def small_vae() -> AutoencoderKL:
    """A VAE with random weights and 8x8 pixels per latent."""
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
    ).eval()
