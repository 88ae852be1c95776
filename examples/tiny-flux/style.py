#!/usr/bin/env python3
"""Teach the tiny Flux a style from two dozen images, as a LoRA and as a DyLoRA, and see what each rank has learned.

usage: style.py [--steps N] [--out DIR] [--model DIR] [--data DIR]

Trains both on DIR/train; one that lies in --out already (lora.safetensors, dylora.safetensors) is taken as it is. Draws
prompts that were not trained, the base and the ranks side by side, and prints the held-out loss and the mean colour of
each. Needs no network and no GPU; takes three to ten minutes on two cores.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from diffusers import FluxPipeline  # noqa: E402
from diffusers.utils import logging as diffusers_logging  # noqa: E402
from PIL import Image  # noqa: E402
from quickstart import DATASET, PROMPTS, grid, mean_colour  # noqa: E402  (first: it sets how threads wait)

from lora_adapters import set_rank  # noqa: E402
from lora_adapters.train.options.arguments import settings  # noqa: E402
from lora_adapters.train.training.loop import train  # noqa: E402

RANK, RANKS, TOKENS = 16, (1, 2, 4, 16), 32
MODULES = {"lora": "networks.lora_flux", "dylora": "networks.dylora"}


class Examples(NamedTuple):
    """A folder of captioned images as the transformer sees them."""

    latents: torch.Tensor  # (n, tokens, 16)
    states: torch.Tensor  # (n, text tokens, 128)
    pooled: torch.Tensor  # (n, 128)
    image_ids: torch.Tensor
    text_ids: torch.Tensor


@torch.no_grad()
def examples(pipe: FluxPipeline, folder: Path) -> Examples:
    """The images of a folder with their captions."""
    files = sorted(folder.glob("*.png"))
    captions = [file.with_suffix(".txt").read_text(encoding="utf-8").strip() for file in files]
    pixels = pipe.image_processor.preprocess([Image.open(file).convert("RGB") for file in files])
    latents = (pipe.vae.encode(pixels).latent_dist.mean - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    height, width = latents.shape[-2:]
    ids = pipe._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", latents.dtype)
    states, pooled, text_ids = pipe.encode_prompt(captions, None, max_sequence_length=TOKENS)
    return Examples(pipe._pack_latents(latents, *latents.shape), states, pooled, ids, text_ids)


def train_adapter(base: Path, data: Path, file: Path, steps: int, module: str) -> None:
    """Train an adapter of the transformer for a file, in kohya's format."""
    dataset = file.with_suffix(".toml")
    dataset.write_text(DATASET.format(folder=(data / "train").as_posix()), encoding="utf-8")
    train(
        settings(
            pretrained_model_name_or_path=str(base),
            dataset_config=str(dataset),
            output_dir=str(file.parent),
            output_name=file.stem,
            network_module=module,
            network_dim=RANK,
            network_alpha=RANK,
            network_args={"unit": 1} if module == "networks.dylora" else {},
            network_train_unet_only=True,
            learning_rate=2e-3,
            lr_scheduler="cosine",
            lr_warmup_steps=20,
            max_train_steps=steps,
            timestep_sampling="sigmoid",
            guidance_scale=1.0,
            t5xxl_max_token_length=TOKENS,
            cache_latents=True,
            max_data_loader_n_workers=0,
            seed=1,
        )
    )


@torch.no_grad()
def held_out_loss(pipe: FluxPipeline, shown: Examples, repeats: int = 4) -> float:
    """Mean squared error of the velocity on images that were not trained, noise and timesteps fixed."""
    generator = torch.Generator().manual_seed(0)
    index = torch.arange(len(shown.latents)).repeat(repeats)
    sigma = torch.linspace(0.1, 0.9, repeats).repeat_interleave(len(shown.latents))
    clean = shown.latents[index]
    noise = torch.randn(clean.shape, generator=generator)
    predicted = pipe.transformer(
        hidden_states=torch.lerp(clean, noise, sigma[:, None, None]),
        encoder_hidden_states=shown.states[index],
        pooled_projections=shown.pooled[index],
        timestep=sigma,
        guidance=torch.ones(len(sigma)),
        img_ids=shown.image_ids,
        txt_ids=shown.text_ids,
    ).sample
    return (predicted - (noise - clean)).square().mean().item()


def draw(pipe: FluxPipeline) -> list[Image.Image]:
    """One image for each prompt, from the same noise whatever the adapter."""
    generators = [torch.Generator().manual_seed(1) for _ in PROMPTS]
    size = {"height": 64, "width": 64, "max_sequence_length": TOKENS}
    return pipe(list(PROMPTS), num_inference_steps=20, guidance_scale=1.4, generator=generators, **size).images


def measure(
    pipe: FluxPipeline, held_out: Examples, files: dict[str, Path]
) -> tuple[dict[str, list[Image.Image]], dict[str, float]]:
    """Images and held-out loss of the base, of the LoRA, and of the DyLoRA at each of `RANKS`."""
    images, losses = {"base": draw(pipe)}, {"base": held_out_loss(pipe, held_out)}

    def look(title: str, prepare: Callable[[], None] = lambda: None) -> None:
        prepare()
        images[title], losses[title] = draw(pipe), held_out_loss(pipe, held_out)

    pipe.load_lora_weights(files["lora"], adapter_name="lora")
    look("LoRA")
    pipe.unload_lora_weights()
    pipe.load_lora_weights(files["dylora"], adapter_name="dylora")
    for rank in RANKS:
        look(f"DyLoRA {rank}", lambda rank=rank: set_rank(pipe, rank))
    return images, losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="training steps of each adapter")
    parser.add_argument("--out", type=Path, default=Path("tiny-flux-style"), help="folder for everything that is made")
    parser.add_argument("--model", type=Path, default=HERE, help="the pipeline")
    parser.add_argument(
        "--data", type=Path, default=HERE.parent / "images" / "delft", help="folder with train and held_out"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)  # products of tiny gradients slow a CPU down several times over
    diffusers_logging.set_verbosity_error()

    files = {name: args.out / f"{name}.safetensors" for name in MODULES}
    for name, file in files.items():
        if not file.exists():
            train_adapter(args.model, args.data, file, args.steps, MODULES[name])
    pipe = FluxPipeline.from_pretrained(args.model, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    drawn, losses = measure(pipe, examples(pipe, args.data / "held_out"), files)

    tiles = [Image.open(file).convert("RGB") for file in sorted((args.data / "train").glob("*.png"))]
    grid({"trained on": tiles[: len(PROMPTS)], **drawn}).save(args.out / "grid.png")
    goal = mean_colour(tiles)
    table = ["| | held-out loss | mean colour | distance from the training images' |", "|---|---|---|---|"]
    for name, images in drawn.items():
        colour = mean_colour(images)
        numbers = " ".join(f"{part:.0f}" for part in colour)
        table.append(f"| {name} | {losses[name]:.3f} | {numbers} | {np.linalg.norm(colour - goal):.0f} |")
    (args.out / "table.md").write_text("\n".join(table) + "\n", encoding="utf-8")
    print("\n".join(table))
    print(f"\nimages:    {args.out / 'grid.png'}\nadapters:  {', '.join(map(str, files.values()))}")


if __name__ == "__main__":
    main()
