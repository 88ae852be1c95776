#!/usr/bin/env python3
"""Teach a small Stable Diffusion a style from two dozen images, and see what each rank of the adapter has learned.

usage: quickstart.py [--steps N] [--out DIR] [--data DIR]

Trains one DyLoRA on DIR/train, loads the file that it saved with `pipe.load_lora_weights`, and draws prompts that were
not trained at several ranks, beside images that were. Prints the held-out loss of each rank, and the mean colour
of what was drawn. Needs no network and no GPU; takes two to six minutes on two cores.
"""

import argparse
import os
from pathlib import Path

# Threads that wait for each other sleep: where other programs need the cores, too, spinning takes many times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from lora_adapters import Adapter, set_rank
from lora_adapters.train.options.arguments import settings
from lora_adapters.train.training.loop import train

HERE = Path(__file__).parent
RANK, RANKS = 16, (1, 2, 4, 16)
PROMPTS = (
    "a red apple", "a closed umbrella", "a cat face", "a penguin", "an octopus", "a sailboat", "a guitar", "a mushroom",
)  # fmt: skip
PAPER = 200  # a pixel whose darkest channel is above this belongs to the background
DATASET = """
[general]
resolution = 64
caption_extension = ".txt"

[[datasets]]
batch_size = 8

  [[datasets.subsets]]
  image_dir = "{folder}"
  caption_dropout_rate = 0.2
  flip_aug = true
"""


def train_adapter(base: Path, data: Path, out: Path, steps: int) -> Path:
    """Train a DyLoRA with C3Lier coverage; the path of its file, in kohya's format."""
    dataset = out / "dataset.toml"
    dataset.write_text(DATASET.format(folder=(data / "train").as_posix()), encoding="utf-8")
    train(
        settings(
            pretrained_model_name_or_path=str(base),
            dataset_config=str(dataset),
            output_dir=str(out),
            output_name="delft",
            network_module="networks.dylora",
            network_dim=RANK,
            network_alpha=RANK,
            network_args={"conv_dim": RANK, "conv_alpha": RANK, "unit": 1},
            learning_rate=2.5e-3,
            min_snr_gamma=5,
            lr_scheduler="cosine",
            lr_warmup_steps=20,
            max_train_steps=steps,
            network_train_unet_only=True,
            cache_latents=True,
            max_data_loader_n_workers=0,
            seed=1,
        )
    )
    return out / "delft.safetensors"


@torch.no_grad()
def held_out_loss(pipe: StableDiffusionPipeline, folder: Path, repeats: int = 4) -> float:
    """Mean squared error of the predicted noise over a folder of captioned images, noise and timesteps fixed."""
    generator = torch.Generator().manual_seed(0)
    losses = []
    for file in sorted(folder.glob("*.png")):
        image = pipe.image_processor.preprocess(Image.open(file).convert("RGB"))
        latents = pipe.vae.encode(image).latent_dist.mean * pipe.vae.config.scaling_factor
        text, _ = pipe.encode_prompt(file.with_suffix(".txt").read_text(encoding="utf-8").strip(), "cpu", 1, False)
        noise = torch.randn(repeats, *latents.shape[1:], generator=generator)
        timesteps = torch.linspace(100, 900, repeats).long()
        noisy = pipe.scheduler.add_noise(latents.expand_as(noise), noise, timesteps)
        predicted = pipe.unet(noisy, timesteps, text.expand(repeats, -1, -1)).sample
        losses.append((predicted - noise).square().mean().item())
    return sum(losses) / len(losses)


def draw(pipe: StableDiffusionPipeline) -> list[Image.Image]:
    """One image for each prompt, from the same noise whatever the adapter."""
    generators = [torch.Generator().manual_seed(1) for _ in PROMPTS]
    return pipe(list(PROMPTS), num_inference_steps=20, guidance_scale=1.4, generator=generators).images


def mean_colour(images: list[Image.Image]) -> np.ndarray:
    """Red, green and blue (0 to 255) of all that is not white paper, over all images."""
    pixels = np.concatenate([np.asarray(image.convert("RGB")).reshape(-1, 3) for image in images]).astype(float)
    return pixels[pixels.min(axis=1) < PAPER].mean(axis=0)


def grid(columns: dict[str, list[Image.Image]], side: int = 128, margin: int = 150) -> Image.Image:
    """A sheet with a row for each prompt and a titled column for each setting."""
    font = ImageFont.load_default(15)
    sheet = Image.new("RGB", (margin + len(columns) * (side + 4), 26 + len(PROMPTS) * (side + 4)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, prompt in enumerate(PROMPTS):
        pen.text((8, 26 + row * (side + 4) + side // 2), prompt, "black", font, anchor="lm")
    for column, (title, images) in enumerate(columns.items()):
        left = margin + column * (side + 4)
        pen.text((left + side // 2, 13), title, "black", font, anchor="mm")
        for row, image in enumerate(images):
            sheet.paste(image.resize((side, side), Image.Resampling.BICUBIC), (left, 26 + row * (side + 4)))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=250, help="training steps")
    parser.add_argument("--out", type=Path, default=Path("quickstart"), help="folder for everything that is made")
    parser.add_argument("--data", type=Path, default=HERE / "images" / "delft", help="folder with train and held_out")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)  # products of tiny gradients slow a CPU down several times over
    diffusers_logging.set_verbosity_error()

    tiles = [Image.open(file).convert("RGB") for file in sorted((args.data / "train").glob("*.png"))]
    file = train_adapter(HERE / "tiny-sd", args.data, args.out, args.steps)

    pipe = StableDiffusionPipeline.from_pretrained(HERE / "tiny-sd", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    columns = {"trained on": tiles[: len(PROMPTS)], "base": draw(pipe)}
    losses = {"base": held_out_loss(pipe, args.data / "held_out")}
    pipe.load_lora_weights(file, adapter_name="delft")
    for rank in tqdm(RANKS, desc="images and held-out loss"):
        set_rank(pipe, rank)
        columns[f"rank {rank}"] = draw(pipe)
        losses[f"rank {rank}"] = held_out_loss(pipe, args.data / "held_out")

    grid(columns).save(args.out / "grid.png")
    colours = {name: mean_colour(tiles if name == "trained on" else drawn) for name, drawn in columns.items()}
    table = ["| | held-out loss | mean colour | distance from the training images' |", "|---|---|---|---|"]
    for name, colour in colours.items():
        loss = f"{losses[name]:.4f}" if name in losses else ""
        away = np.linalg.norm(colour - colours["trained on"])
        table.append(f"| {name} | {loss} | {' '.join(f'{part:.0f}' for part in colour)} | {away:.0f} |")
    (args.out / "table.md").write_text("\n".join(table) + "\n", encoding="utf-8")
    best = min(RANKS, key=lambda rank: losses[f"rank {rank}"])
    cut = Adapter.load(file).truncate(best).save(args.out / f"delft-rank{best}.safetensors")

    print("\n".join(table))
    print(f"\nimages:    {args.out / 'grid.png'}\nadapter:   {file}\ncut to its best rank:  {cut}")


if __name__ == "__main__":
    main()
