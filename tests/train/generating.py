"""Image generation in tests: small adapters, and the program run in this process on tiny models."""

import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lora_adapters.adapter import Adapter
from lora_adapters.convert.deltas.low_rank import LowRank
from lora_adapters.convert.families.names import ModuleName
from lora_adapters.convert.formats.metadata import DyLora
from lora_adapters.train.gen_img_diffusers import main

QUICK = ["--steps", "3", "--scale", "3", "--seed", "5"]


def adapter_for(model: Path, file: Path, seed: int = 0, rank: int = 4, dylora: DyLora | None = None) -> Path:
    """A random adapter for layers of the model's U-Net and text encoder, strong enough to change images visibly."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(model)
    draw = torch.Generator().manual_seed(seed)
    modules = {}
    for component, ending in (("unet", "attn2.to_v"), ("unet", "proj_in"), ("text_encoder", "mlp.fc1")):
        for path, layer in getattr(pipe, component).named_modules():
            if path.endswith(ending):
                out, into = layer.weight.shape[:2]
                full = path if component == "unet" or path.startswith("text_model.") else f"text_model.{path}"
                down = torch.randn(rank, into, generator=draw) / into**0.5
                modules[ModuleName(component, full)] = LowRank(down, torch.randn(out, rank, generator=draw), 2.0)
    adapter = Adapter(modules, {"ss_network_module": "networks.lora", "ss_network_args": "{}"})
    (adapter.as_dylora(dylora) if dylora else adapter).save(file)
    return file


def draw(model: Path, out: Path, *options: object) -> list[np.ndarray]:
    """The images that the program generates, sorted by name."""
    assert main(["--ckpt", str(model), "--outdir", str(out), *QUICK, *map(str, options)]) == 0
    return [pixels(file) for file in sorted(out.iterdir())]


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"), int)


def differ(a: np.ndarray, b: np.ndarray) -> int:
    """The largest difference of a channel of a pixel, from 0 to 255."""
    assert a.shape == b.shape
    return int(np.abs(a - b).max())


_PARAM = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def web_ui_reads(text: str) -> dict[str, str]:
    """Parse settings text as AUTOMATIC1111's web UI does: the last line is a list of `key: value`, quoted if needed."""
    *lines, last = text.strip().split("\n")
    prompt, _, negative = "\n".join(lines).partition("\nNegative prompt: ")
    found = {"Prompt": prompt, "Negative prompt": negative}
    return found | {key: value.strip('"') for key, value in _PARAM.findall(last)}
