"""Images, folders and a tiny VAE for the tests of the data side."""

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
    """Smooth random colours, different for each seed and nowhere symmetrical."""
    numbers = random.Random(seed)
    small = Image.new("RGB", (4, 4))
    small.putdata([tuple(numbers.randrange(256) for _ in range(3)) for _ in range(16)])
    return small.resize(size, Image.Resampling.BICUBIC)


def folder(path: Path, sizes: list[tuple[int, int]], captions: list[str] | None = None, suffix: str = ".png") -> Path:
    """`path` with images 0, 1, ... of `sizes`, each with its caption where there are captions."""
    path.mkdir(parents=True, exist_ok=True)
    for number, size in enumerate(sizes):
        drawn_image(size, number).save(path / f"{number}{suffix}")
        if captions is not None:
            (path / f"{number}.caption").write_text(captions[number], encoding="utf-8")
    return path


def data(images: Path, *, seed: int = 7, file: dict[str, Any] | None = None, **options: Any) -> TrainingData:
    """TrainingData of one folder as a json dataset file beside it; `options` are the dataset's and the subset's."""
    import json

    config = images.parent / f"{images.name}.json"
    config.write_text(json.dumps(file or {"general": options, "datasets": [{"subsets": [{"image_dir": str(images)}]}]}))
    return TrainingData(load_data_config({"dataset_config": str(config), "resolution": 64}), seed=seed)


def small_vae() -> AutoencoderKL:
    """Random weights, 8x8 pixels a latent."""
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
    ).eval()
