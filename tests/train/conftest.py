"""Tiny models with the layout of the real ones, random weights, and images to train on."""

import json
import random
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image, ImageDraw
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
WORDS = ["a", "red", "green", "blue", "square", "disc", "on", "white"]


def tiny_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer for letters and a few words, with windows of 77 tokens."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges, pieces = [], letters + [f"{letter}</w>" for letter in letters]
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            pair = (parts[0], parts[1])
            if pair not in merges:
                merges.append(pair)
                pieces.append("".join(pair))
            parts = ["".join(pair), *parts[2:]]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:  # files that transformers 4 and 5 can both load
        vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
        Path(folder, "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        Path(folder, "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def text_config(tokenizer: CLIPTokenizer, layers: int = 2, **options) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )


def tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.18215,
        layers_per_block=1,
    )


def build_sd1(folder: Path) -> Path:
    """SD1's block layout: four levels, attention in the first three."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8, 16, 16),
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    pipe = StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(text_config(tokenizer)),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return folder


def build_sdxl(folder: Path, second_width: int = 32) -> Path:
    """SDXL's layout: three levels, attention in the last two, two text encoders, added conditioning."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    second = text_config(tokenizer, projection_dim=32)
    second.hidden_size = second_width
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(2, 2, 2),
        cross_attention_dim=32 + second_width,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
        norm_num_groups=4,
    )
    pipe = StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(text_config(tokenizer)),
        text_encoder_2=CLIPTextModelWithProjection(second),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**SCHEDULE, clip_sample=False),
        add_watermarker=False,
    )
    pipe.save_pretrained(folder)
    return folder


def draw_images(folder: Path, count: int = 8, size: int = 64) -> Path:
    """Squares and discs in three colours, with captions."""
    folder.mkdir(parents=True)
    rng = random.Random(0)
    for number in range(count):
        colour, shape = rng.choice(["red", "green", "blue"]), rng.choice(["square", "disc"])
        image = Image.new("RGB", (size, size), "white")
        place = [rng.randrange(4, 20), rng.randrange(4, 20), rng.randrange(40, 60), rng.randrange(40, 60)]
        pen = ImageDraw.Draw(image)
        (pen.rectangle if shape == "square" else pen.ellipse)(place, fill=colour)
        image.save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"a {colour} {shape} on white")
    return folder


@pytest.fixture(scope="session")
def sd1(tmp_path_factory) -> Path:
    return build_sd1(tmp_path_factory.mktemp("models") / "sd1")


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory) -> Path:
    return build_sdxl(tmp_path_factory.mktemp("models") / "sdxl")


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """A folder for --train_data_dir: it contains `1_shape` with 8 images."""
    folder = tmp_path_factory.mktemp("images")
    draw_images(folder / "1_shape")
    return folder


@pytest.fixture
def basics(sd1, images, tmp_path) -> dict:
    """Options of a small run."""
    return {
        "pretrained_model_name_or_path": str(sd1),
        "train_data_dir": str(images),
        "caption_extension": ".txt",
        "resolution": "64",
        "output_dir": str(tmp_path / "out"),
        "network_module": "networks.lora",
        "network_dim": 2,
        "train_batch_size": 2,
        "max_train_steps": 3,
        "learning_rate": 1e-2,
        "max_data_loader_n_workers": 0,
        "seed": 7,
    }


@pytest.fixture
def fake_batch():
    """A function that creates a batch with cached latents, like TrainingData's."""

    def make(n: int = 2, **changes) -> SimpleNamespace:
        g = torch.Generator().manual_seed(n)
        values = {
            "images": None,
            "latents": torch.randn(n, 4, 8, 8, generator=g),
            "captions": ["a red disc"] * n,
            "text": None,
            "loss_weights": torch.ones(n),
            "masks": None,
            "original_sizes": torch.full((n, 2), 64),
            "crop_top_lefts": torch.zeros(n, 2, dtype=torch.int64),
            "target_sizes": torch.full((n, 2), 64),
            "sample_seeds": torch.arange(n),
        }
        return SimpleNamespace(**{**values, **changes})

    return make
