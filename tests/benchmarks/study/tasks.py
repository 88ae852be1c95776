"""The tasks: images and captions as latents and text-encoder states, computed once."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

ROOT = Path(__file__).resolve().parent.parent.parent.parent
BASE = ROOT / "examples" / "tiny-sd"
PROMPTS = {
    "style": ("a red apple", "a cat face", "a penguin", "a sailboat", "a guitar", "a mushroom"),
    "subject": ("a zwib on yellow", "a zwib on blue", "a zwib on white", "a zwib on red", "a zwib", "a zwib on green"),
}
TASKS = tuple(PROMPTS)


@dataclass(frozen=True)
class Examples:
    """latents (n, 4, 8, 8), scaled for the U-Net, and text-encoder states (n, 77, width)."""

    latents: torch.Tensor
    text: torch.Tensor


@dataclass(frozen=True)
class Task:
    """Training images and held-out images."""

    name: str
    train: Examples
    held_out: Examples


def folder_of(name: str, out: Path) -> Path:
    """The folder with train/ and held_out/; the subject's images are generated in the results folder."""
    if name == "style":
        return ROOT / "examples" / "images" / "delft"
    folder = out / "subject"
    if not (folder / "held_out").exists():
        script = BASE / "subject_images.py"
        subprocess.run([sys.executable, str(script), "--out", str(folder)], check=True)
    return folder


@torch.no_grad()
def encoded(pipe: Any, folder: Path, mirrored: bool) -> Examples:
    """Encode all captioned images of a folder (and their mirror images); latents are posterior means."""
    latents, texts = [], []
    for file in sorted(folder.glob("*.png")):
        image = Image.open(file).convert("RGB")
        text, _ = pipe.encode_prompt(file.with_suffix(".txt").read_text(encoding="utf-8").strip(), "cpu", 1, False)
        for one in (image, ImageOps.mirror(image)) if mirrored else (image,):
            pixels = pipe.image_processor.preprocess(one)
            latents.append(pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor)
            texts.append(text)
    return Examples(torch.cat(latents), torch.cat(texts))


def prepared(name: str, out: Path, pipe: Any) -> Task:
    """Load a task from its cache, or encode and cache it."""
    cache = out / f"{name}.pt"
    if not cache.exists():
        folder = folder_of(name, out)
        parts = {part: encoded(pipe, folder / part, part == "train") for part in ("train", "held_out")}
        torch.save({part: (one.latents, one.text) for part, one in parts.items()}, cache)
    stored = torch.load(cache, weights_only=True)
    return Task(name, Examples(*stored["train"]), Examples(*stored["held_out"]))
