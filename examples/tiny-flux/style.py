#!/usr/bin/env python3
"""Teach the tiny Flux a style from two dozen pictures, as a LoRA and as a DyLoRA, and see what each rank has learned.

usage: style.py [--steps N] [--out DIR] [--model DIR] [--data DIR]

Trains both in a loop of its own: the velocity between picture and noise, timesteps that are dense in the middle, the
guidance that the model is given at 1, as it is trained for FLUX.1-dev. An adapter that lies in DIR already
(lora.safetensors, dylora.safetensors; from another trainer, for instance) is drawn as it is. Draws prompts that were
not trained, the base and the ranks side by side, and prints the held-out loss and the mean colour of each. Needs no
network and no GPU.
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
from quickstart import PROMPTS, grid, mean_colour  # noqa: E402  (first: it sets how threads wait)
from tqdm import tqdm  # noqa: E402

from lora_adapters import Adapter, DyLoraConfig, LierLaConfig, add_adapter, param_groups, set_rank  # noqa: E402

RANK, RANKS, BATCH, TOKENS = 16, (1, 2, 4, 16), 16, 32
CONFIGS = {
    "lora": LierLaConfig(r=RANK, lora_alpha=RANK),
    "dylora": DyLoraConfig(r=RANK, lora_alpha=RANK, unit=1),
}


class Examples(NamedTuple):
    """A folder of captioned pictures as the transformer sees them."""

    latents: torch.Tensor  # (n, tokens, 16)
    states: torch.Tensor  # (n, text tokens, 128)
    pooled: torch.Tensor  # (n, 128)
    picture_ids: torch.Tensor
    text_ids: torch.Tensor


@torch.no_grad()
def examples(pipe: FluxPipeline, folder: Path, flip: bool = False) -> Examples:
    """The pictures of a folder with their captions; flip: each of them mirrored, too."""
    files = sorted(folder.glob("*.png"))
    captions = [file.with_suffix(".txt").read_text(encoding="utf-8").strip() for file in files]
    pixels = pipe.image_processor.preprocess([Image.open(file).convert("RGB") for file in files])
    if flip:
        pixels, captions = torch.cat([pixels, pixels.flip(-1)]), captions * 2
    latents = (pipe.vae.encode(pixels).latent_dist.mean - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    height, width = latents.shape[-2:]
    ids = pipe._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", latents.dtype)
    states, pooled, text_ids = pipe.encode_prompt(captions, None, max_sequence_length=TOKENS)
    return Examples(pipe._pack_latents(latents, *latents.shape), states, pooled, ids, text_ids)


def loss_at(pipe: FluxPipeline, shown: Examples, index: torch.Tensor, sigma: torch.Tensor, noise: torch.Tensor):
    """Mean squared error of the velocity of some of the pictures, with noise (n, tokens, 16) up to sigma (n,)."""
    clean = shown.latents[index]
    predicted = pipe.transformer(
        hidden_states=torch.lerp(clean, noise, sigma[:, None, None]),
        encoder_hidden_states=shown.states[index],
        pooled_projections=shown.pooled[index],
        timestep=sigma,
        guidance=torch.ones(len(sigma)),
        img_ids=shown.picture_ids,
        txt_ids=shown.text_ids,
    ).sample
    return (predicted - (noise - clean)).square().mean()


def train_adapter(pipe: FluxPipeline, shown: Examples, name: str, file: Path, steps: int) -> None:
    """Train one of the `CONFIGS` on the transformer, save it in kohya's format, and leave the pipeline without it."""
    torch.manual_seed(1)
    add_adapter(pipe.transformer, CONFIGS[name], adapter_name=name)
    optimizer = torch.optim.AdamW(param_groups(pipe.transformer, lr=2e-3, adapter_name=name))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    pipe.transformer.train()
    for _ in tqdm(range(steps), desc=name, mininterval=5):
        index = torch.randint(len(shown.latents), (BATCH,))
        sigma = torch.sigmoid(torch.randn(BATCH))
        loss_at(pipe, shown, index, sigma, torch.randn_like(shown.latents[index])).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    pipe.transformer.eval()
    Adapter.from_pipeline(pipe, name).save(file)
    pipe.unload_lora_weights()


@torch.no_grad()
def held_out_loss(pipe: FluxPipeline, shown: Examples, repeats: int = 4) -> float:
    """The loss on pictures that were not trained, noise and timesteps fixed."""
    generator = torch.Generator().manual_seed(0)
    index = torch.arange(len(shown.latents)).repeat(repeats)
    sigma = torch.linspace(0.1, 0.9, repeats).repeat_interleave(len(shown.latents))
    noise = torch.randn(shown.latents[index].shape, generator=generator)
    return loss_at(pipe, shown, index, sigma, noise).item()


def draw(pipe: FluxPipeline) -> list[Image.Image]:
    """One picture for each prompt, from the same noise whatever the adapter."""
    generators = [torch.Generator().manual_seed(1) for _ in PROMPTS]
    size = {"height": 64, "width": 64, "max_sequence_length": TOKENS}
    return pipe(list(PROMPTS), num_inference_steps=20, guidance_scale=2.0, generator=generators, **size).images


def measure(
    pipe: FluxPipeline, held_out: Examples, files: dict[str, Path]
) -> tuple[dict[str, list[Image.Image]], dict[str, float]]:
    """Pictures and held-out loss of the base, of the LoRA, and of the DyLoRA at each of `RANKS`."""
    pictures, losses = {"base": draw(pipe)}, {"base": held_out_loss(pipe, held_out)}

    def look(title: str, prepare: Callable[[], None] = lambda: None) -> None:
        prepare()
        pictures[title], losses[title] = draw(pipe), held_out_loss(pipe, held_out)

    pipe.load_lora_weights(files["lora"], adapter_name="lora")
    look("LoRA")
    pipe.unload_lora_weights()
    pipe.load_lora_weights(files["dylora"], adapter_name="dylora")
    for rank in RANKS:
        look(f"DyLoRA {rank}", lambda rank=rank: set_rank(pipe, rank))
    return pictures, losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="training steps of each adapter")
    parser.add_argument("--out", type=Path, default=Path("tiny-flux-style"), help="folder for everything that is made")
    parser.add_argument("--model", type=Path, default=HERE, help="the pipeline")
    parser.add_argument(
        "--data", type=Path, default=HERE.parent / "pictures" / "delft", help="folder with train and held_out"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)  # products of tiny gradients slow a CPU down several times over
    diffusers_logging.set_verbosity_error()

    pipe = FluxPipeline.from_pretrained(args.model, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for model in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        model.requires_grad_(False)
    shown = examples(pipe, args.data / "train", flip=True)
    files = {name: args.out / f"{name}.safetensors" for name in CONFIGS}
    for name, file in files.items():
        if not file.exists():
            train_adapter(pipe, shown, name, file, args.steps)
    drawn, losses = measure(pipe, examples(pipe, args.data / "held_out"), files)

    tiles = [Image.open(file).convert("RGB") for file in sorted((args.data / "train").glob("*.png"))]
    grid({"trained on": tiles[: len(PROMPTS)], **drawn}).save(args.out / "grid.png")
    goal = mean_colour(tiles)
    table = ["| | held-out loss | mean colour | distance from the training pictures' |", "|---|---|---|---|"]
    for name, pictures in drawn.items():
        colour = mean_colour(pictures)
        shown_colour = " ".join(f"{part:.0f}" for part in colour)
        table.append(f"| {name} | {losses[name]:.3f} | {shown_colour} | {np.linalg.norm(colour - goal):.0f} |")
    (args.out / "table.md").write_text("\n".join(table) + "\n", encoding="utf-8")
    print("\n".join(table))
    print(f"\npictures:  {args.out / 'grid.png'}\nadapters:  {', '.join(map(str, files.values()))}")


if __name__ == "__main__":
    main()
