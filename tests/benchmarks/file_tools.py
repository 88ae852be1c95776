#!/usr/bin/env python3
"""Time and memory of the file tools at full size, as whole processes, with kohya's scripts beside them if given.

usage: file_tools.py [--folder DIR] [--sizes sd15 sdxl] [--only NAME ...] [--kohya CHECKOUT] [--kohya_python PYTHON]

Makes checkpoints and adapters of SD1.5's and SDXL's shapes with random weights (from tests/golden/modules) in the
folder, runs each tool on them, and prints wall time, peak resident memory, and the peak of anonymous memory (what is
not a mapped file), sampled every 20 ms from /proc (Linux only).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from lora_adapters.convert import Adapter, LowRank, ModuleName  # noqa: E402
from lora_adapters.convert.checkpoint_names import _candidates  # noqa: E402
from lora_adapters.convert.weights_writing import Planned, stream  # noqa: E402

PARTS = {"sd15": 1.07e9, "sdxl": 3.47e9}  # parameters of the whole checkpoint: U-Net, text encoders, VAE


def modules(size: str) -> Iterator[tuple[ModuleName, tuple[int, ...], bool]]:
    """Every adapted module with the shape of its weight, and whether LierLa has it."""
    table = json.loads((ROOT / "tests" / "golden" / "modules" / f"kohya_modules_{size}.json").read_text())
    for row in table["rows"]:
        entry = dict(zip(table["columns"], row, strict=True))
        kernel = {"linear": (), "conv1x1": (1, 1), "conv3x3": (3, 3)}[entry["kind"]]
        yield (
            ModuleName(entry["component"], entry["diffusers_module"]),
            (entry["out"], entry["in"], *kernel),
            entry["lierla"],
        )


def make_adapter(path: Path, size: str, rank: int, conv_rank: int | None, seed: int) -> Path:
    """A random adapter of full size."""
    if not path.exists():
        torch.manual_seed(seed)
        made = {}
        for module, shape, lierla in modules(size):
            if not lierla and conv_rank is None:
                continue
            count = conv_rank if len(shape) == 4 and shape[2:] != (1, 1) and conv_rank else rank
            up = torch.randn(shape[0], count, *(1 for _ in shape[2:])) * 0.01
            made[module] = LowRank(torch.randn(count, *shape[1:]) * 0.02, up, float(count))
        Adapter(made).save(path)
    return path


def make_checkpoint(path: Path, size: str, seed: int, base: Path | None = None) -> Path:
    """A random fp16 checkpoint of full size; with a base, one with another random difference from it."""
    if path.exists():
        return path
    architecture = "sdxl" if size == "sdxl" else "sd"
    planned, count = {}, 0
    for number, (module, shape, _) in enumerate(modules(size)):
        prefixes = ("conditioner." if architecture == "sdxl" else "cond_stage_model.transformer.text_model.", "model.")
        place = next(p for p in _candidates(module, architecture) if p.key.startswith(prefixes))
        if place.third is not None:
            shape = (3 * shape[0], *shape[1:])
        if place.key in planned:
            continue
        count += torch.Size(shape).numel()
        planned[place.key] = Planned(
            torch.float16, shape, lambda n=number, s=shape: _weight(n, s, seed, base is not None)
        )
    filler = int(PARTS[size]) - count  # norms, embeddings, input and output layers, the VAE
    piece = 1 << 24
    for number in range(max(filler // piece, 1)):
        planned[f"first_stage_model.filler.{number}.weight"] = Planned(
            torch.float16, (piece,), lambda: torch.ones(piece, dtype=torch.float16)
        )
    if size == "sdxl":
        planned["model.diffusion_model.label_emb.0.0.weight"] = Planned(
            torch.float16, (4,), lambda: torch.ones(4, dtype=torch.float16)
        )
    stream(path, planned, {})
    return path


def _weight(number: int, shape: tuple[int, ...], seed: int, tuned: bool) -> torch.Tensor:
    """Random numbers; tuned ones differ by a matrix with a decaying spectrum and noise, as fine-tuning's do."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(number)) * 0.02
    if tuned:
        generator = torch.Generator().manual_seed(seed * 10000 + number)
        flat = weight.view(shape[0], -1)
        rank = min(128, *flat.shape)
        left = torch.randn(flat.shape[0], rank, generator=generator) * torch.arange(1, rank + 1) ** -0.7
        flat.addmm_(left, torch.randn(rank, flat.shape[1], generator=generator), alpha=1e-3)
        flat.add_(torch.randn(flat.shape, generator=generator), alpha=5e-4)
    return weight.half()


def measure(command: list[str]) -> dict[str, float | int | str]:
    """Wall time (s), peak resident and anonymous memory (MB), and the exit status of a process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    anonymous = peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            sizes = {
                line.split(":")[0]: int(line.split()[1])
                for line in status.splitlines()
                if line.startswith(("Rss", "VmHWM"))
            }
            anonymous, peak = max(anonymous, sizes.get("RssAnon", 0)), max(peak, sizes.get("VmHWM", 0))
        except (OSError, IndexError, ValueError):
            pass
        time.sleep(0.02)
    seconds = time.perf_counter() - start
    said = process.stdout.read().strip().splitlines() if process.stdout else []
    return {
        "seconds": round(seconds, 2),
        "anonymous MB": anonymous // 1024,
        "peak MB": peak // 1024,
        "status": process.returncode,
        "said": next((line for line in said if line.startswith("relative error")), said[-1] if said else ""),
    }


def cases(folder: Path, size: str) -> Iterator[tuple[str, str, list[str]]]:
    """Name, script and options of every measurement; what it reads is made when its turn comes."""
    out = str(folder / "out.safetensors")
    a = make_adapter(folder / f"{size}-a.safetensors", size, 32, None, 1)
    b = make_adapter(folder / f"{size}-b.safetensors", size, 16, None, 2)
    pair = ["--models", str(a), str(b), "--ratios", "0.6", "0.4"]
    yield f"{size} svd-merge 32+16 to 32", "svd_merge_lora", ["--save_to", out, "--new_rank", "32", *pair]
    base = make_checkpoint(folder / f"{size}.safetensors", size, 0)
    into = ["--sd_model", str(base), "--save_to", out, "--save_precision", "fp16"]
    yield f"{size} merge 2 into checkpoint", "merge_lora", [*into, *pair]
    for count in (1, 4, 8):
        many = [*into, "--models", *[str(a)] * count, "--ratios", *["0.1"] * count]
        yield f"{size} merge {count} into checkpoint", "merge_lora", many
    tuned = make_checkpoint(folder / f"{size}-tuned.safetensors", size, 3, base)
    models = ["--model_org", str(base), "--model_tuned", str(tuned), "--save_to", out]
    yield f"{size} extract dim 32", "extract_lora_from_models", [*models, "--dim", "32"]
    wide = ["--dim", "128", "--conv_dim", "64"]
    yield f"{size} extract dim 128 conv_dim 64", "extract_lora_from_models", [*models, *wide]


def main() -> None:
    """Run the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to make the files, and keep them (default: a temporary one)")
    parser.add_argument("--sizes", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--only", nargs="+", help="only measurements with one of these words in their name")
    parser.add_argument("--kohya", type=Path, help="a checkout of sd-scripts to measure in the same run")
    parser.add_argument("--kohya_python", default=sys.executable)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for size in args.sizes:
            for name, script, options in cases(folder, size):
                if args.only and not any(word in name for word in args.only):
                    continue
                print(name, measure([sys.executable, str(ROOT / "convert" / f"{script}.py"), *options]), flush=True)
                if args.kohya:
                    xl = "sdxl_merge_lora" if size == "sdxl" and script == "merge_lora" else script
                    extra = ["--sdxl"] if size == "sdxl" and script == "extract_lora_from_models" else []
                    command = [args.kohya_python, str(args.kohya / "networks" / f"{xl}.py"), *options, *extra]
                    print(f"  kohya: {measure(command)}", flush=True)


if __name__ == "__main__":
    main()
