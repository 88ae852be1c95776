#!/usr/bin/env python3
"""Three LoRAs on one pipeline at once, with weights 0.5, 0.7 and 0.5: live, folded, as one file, and in the model.

usage: three_loras.py [FILE FILE FILE] [--model MODEL] [--weights 0.5 0.7 0.5] [--prompt PROMPT] [--out DIR]

Trains nothing, needs no network and no GPU. Without files it makes three: random changes of what the prompt does, so
that each leaves its mark on the image. All four ways give the same image; the differences are printed.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from lora_adapters import Adapter, LowRank, ModuleName
from lora_adapters.train.generation.image_grid import draw_sheet

HERE = Path(__file__).parent
RANKS = {"first": 4, "second": 8, "third": 2}


def make_files(pipe: StableDiffusionPipeline, folder: Path) -> list[Path]:
    """Three LoRA files of different ranks, in kohya's format, for the U-Net's cross attention."""
    files = []
    for seed, (name, rank) in enumerate(RANKS.items()):
        draw = torch.Generator().manual_seed(seed)
        modules = {}
        for path, layer in pipe.unet.named_modules():
            if path.endswith("attn2.to_v"):
                down = torch.randn(rank, layer.in_features, generator=draw) / layer.in_features**0.5
                up = torch.randn(layer.out_features, rank, generator=draw) * layer.weight.std().item() * 4
                modules[ModuleName("unet", path)] = LowRank(down, up, alpha=rank)
        files.append(Adapter(modules).save(folder / f"{name}.safetensors"))
    return files


def draw(pipe: StableDiffusionPipeline, prompt: str) -> Image.Image:
    """The prompt's image, from the same noise each time."""
    generator = torch.Generator().manual_seed(1)
    return pipe(prompt, num_inference_steps=20, guidance_scale=4.0, generator=generator).images[0]


def difference(one: Image.Image, other: Image.Image) -> int:
    """The largest difference of a pixel's channel, of 255."""
    return int(np.abs(np.asarray(one, int) - np.asarray(other, int)).max())


def main(argv: list[str] | None = None) -> dict[str, Image.Image]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="LoRA files (default: three are made)")
    parser.add_argument("--model", default=str(HERE / "tiny-sd"), help="Diffusers folder of the model")
    parser.add_argument("--weights", nargs="+", type=float, default=[0.5, 0.7, 0.5], help="a weight for each file")
    parser.add_argument("--prompt", default="a red apple")
    parser.add_argument("--out", type=Path, default=Path("three_loras"), help="folder for everything that is made")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)

    pipe = StableDiffusionPipeline.from_pretrained(args.model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    files = [Path(file) for file in args.files] or make_files(pipe, args.out)
    if len(files) != len(args.weights):
        parser.error(f"{len(files)} files, but {len(args.weights)} weights")
    names = [file.stem for file in files]
    images = {"model alone": draw(pipe, args.prompt)}

    # Live: three adapters in the pipeline. Weights can be changed at any time, and each can be switched off.
    for name, file in zip(names, files, strict=True):
        pipe.load_lora_weights(file, adapter_name=name)
    for name in names:
        pipe.set_adapters([name], [1.0])
        images[name] = draw(pipe, args.prompt)
    pipe.set_adapters(names, args.weights)
    images["all, live"] = draw(pipe, args.prompt)

    # Folded into the weights of the pipeline, which is as fast as no adapter, and taken out again.
    pipe.fuse_lora()
    images["all, folded"] = draw(pipe, args.prompt)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()

    # One file that is exactly their weighted sum: its rank is the sum of the ranks.
    scaled = [Adapter.load(file).scale(weight) for file, weight in zip(files, args.weights, strict=True)]
    total = scaled[0]
    for one in scaled[1:]:
        total = total + one
    pipe.load_lora_weights(total.save(args.out / "sum.safetensors"))
    images["one file"] = draw(pipe, args.prompt)

    # A model with the three in it, for programs that know no LoRA.
    merged = total.merge_into(args.model, args.out / "merged")
    pipe = StableDiffusionPipeline.from_pretrained(merged, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    images["in the model"] = draw(pipe, args.prompt)

    for name in ("all, folded", "one file", "in the model"):
        print(f"{name:<14}differs from live by at most {difference(images[name], images['all, live'])} of 255")
    sheet = args.out / "sheet.png"
    draw_sheet([(args.prompt, list(images.values()))], list(images)).save(sheet)
    print(f"images:       {sheet}")
    return images


if __name__ == "__main__":
    main()
