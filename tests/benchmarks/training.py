#!/usr/bin/env python3
"""Measures time and memory of training steps: base model alone, PEFT's LoRA, this package's types, kohya's modules.

usage: training.py [--models tiny-sd sd15] [--latent 32] [--rank 16] [--repeat 7] [--only layers loop]
                   [--cover lierla c3lier lycoris] [--kohya DIR]

layers: one forward and backward pass of the U-Net. All variants share the base weights (sd15: random, with SD1.5's
shapes) and take turns in one process; the floor is the base model alone, with the gradient of its input. Printed are
the median time, the median of each round's ratio to plain PEFT LoRA of the same rank, and the peak of resident memory
above the weights (on Linux). --cover lycoris measures LoHa and LoKr on LierLa's modules, next to LyCORIS' own layers.
loop: whole training steps of `lora_adapters.train` with cached latents, compared with the same step written by hand on
the same models. Both take turns, so that they run under the same conditions.
"""

import argparse
import copy
import importlib.util
import json
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from peak_memory import peak_above_rest
from peers import lycoris_network
from peft import LoraConfig

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from lora_adapters import C3LierConfig, DyLoraConfig, LierLaConfig, LycorisConfig, add_adapter  # noqa: E402
from lora_adapters.target_modules import covered  # noqa: E402

Step = Callable[[], None]
KINDS: dict[str, dict[str, Any]] = {
    "LoHa": {"algo": "loha"},
    "LoKr": {"algo": "lokr"},
    "LoKr, factor 8": {"algo": "lokr", "factor": 8},
}


class Result(NamedTuple):
    """A measurement: milliseconds, ratio to plain PEFT LoRA (loop: to the bare step), MiB above the weights."""

    name: str
    ms: float
    ratio: float
    MiB: float | None = None


def base_unet(model: str) -> UNet2DConditionModel:
    """The U-Net, frozen, in training mode."""
    if model == "tiny-sd":
        unet = UNet2DConditionModel.from_pretrained(ROOT / "examples" / "tiny-sd", subfolder="unet").float()
    else:
        torch.manual_seed(0)
        with torch.device("meta"):
            unet = UNet2DConditionModel(cross_attention_dim=768)  # the other defaults of diffusers are SD1.5's shapes
        unet.to_empty(device="cpu")
        for parameter in unet.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    return unet.requires_grad_(False).train()


def twin(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A copy of the model that shares its weights, for another adapter."""
    return copy.deepcopy(unet, {id(parameter): parameter for parameter in unet.parameters()})


def variants(unet: UNet2DConditionModel, rank: int, kohya: Path | None) -> dict[str, torch.nn.Module]:
    """Name -> U-Net of each variant, in the order in which they take turns."""
    unit = max(1, rank // 4)
    configs = {
        "plain PEFT LoRA": LoraConfig(r=rank, lora_alpha=rank, target_modules=covered(unet, False)),
        "LierLa": LierLaConfig(r=rank, lora_alpha=rank),
        "DyLoRA": DyLoraConfig(r=rank, lora_alpha=rank, unit=unit),
        "plain PEFT LoRA, C3Lier's modules": LoraConfig(r=rank, lora_alpha=rank, target_modules=covered(unet, True)),
        "C3Lier": C3LierConfig(r=rank, lora_alpha=rank, conv_dim=rank, conv_alpha=rank),
        "DyLoRA, C3Lier's modules": DyLoraConfig(r=rank, lora_alpha=rank, conv_dim=rank, conv_alpha=rank, unit=unit),
        **{name: LycorisConfig(r=rank, lora_alpha=rank, **options) for name, options in KINDS.items()},
    }
    made: dict[str, torch.nn.Module] = {"base alone (floor)": twin(unet)}
    for name, config in configs.items():
        made[name] = twin(unet)
        add_adapter(made[name], config)
    if kohya:
        made |= kohya_variants(unet, rank, unit, kohya)
    if importlib.util.find_spec("lycoris"):
        made |= lycoris_variants(unet, rank, unit)
    return made


def kohya_variants(unet: UNet2DConditionModel, rank: int, unit: int, checkout: Path) -> dict[str, torch.nn.Module]:
    """kohya's LoRA and DyLoRA modules on the same U-Net. Packages that they import but do not use here are stubs."""
    sys.path.insert(0, str(checkout))
    for name in ("cv2", "torchvision", "einops"):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules["torchvision"].transforms = None  # type: ignore[attr-defined]
    sys.modules["einops"].rearrange = None  # type: ignore[attr-defined]
    from networks import dylora, lora

    made = {}
    for name, module, options in (
        ("kohya's LoRA", lora, {}),
        ("kohya's LoRA, C3Lier's modules", lora, {"conv_dim": str(rank), "conv_alpha": str(rank)}),
        ("kohya's DyLoRA", dylora, {"unit": str(unit)}),
    ):
        made[name] = twin(unet)
        network = module.create_network(1.0, rank, rank, None, [], made[name], **options)
        network.apply_to([], made[name], False, True)
        network.requires_grad_(True).train()
    return made


def lycoris_variants(unet: UNet2DConditionModel, rank: int, unit: int) -> dict[str, torch.nn.Module]:
    """LyCORIS' LoCon, DyLoRA, LoHa and LoKr on the modules of LoRA-LierLa."""
    options: dict[str, dict[str, Any]] = {
        "LyCORIS' LoCon": {"network_module": "locon"},
        "LyCORIS' DyLoRA": {"network_module": "dylora", "block_size": unit},
        **{f"LyCORIS' {name}": {"network_module": own["algo"], **own} for name, own in KINDS.items()},
    }
    made: dict[str, torch.nn.Module] = {name: twin(unet) for name in options}
    for name, own in options.items():
        own.pop("algo", None)
        lycoris_network(made[name], rank, **own).requires_grad_(True).train()
    return made


def pass_of(unet: torch.nn.Module, latent: int, batch: int) -> Step:
    """One forward and backward pass."""
    torch.manual_seed(1)
    noisy = torch.randn(batch, 4, latent, latent, requires_grad=True)
    target, times = torch.randn(batch, 4, latent, latent), torch.randint(0, 1000, (batch,))
    text = torch.randn(batch, 77, unet.config.cross_attention_dim)  # type: ignore[union-attr]

    def step() -> None:
        torch.nn.functional.mse_loss(unet(noisy, times, text).sample, target).backward()
        noisy.grad = None
        for parameter in unet.parameters():
            parameter.grad = None

    return step


def timed(step: Step) -> float:
    """Seconds of a step: CPU time with one thread, so that other processes affect it less, else wall time."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    step()
    return clock() - start


def layers(
    model: str, latent: int, batch: int, rank: int, repeat: int, kohya: Path | None, cover: list[str]
) -> Iterator[Result]:
    """Measure and print the passes of all variants in the sets `cover`."""
    unet = base_unet(model)
    chosen = {
        name: one
        for name, one in variants(unet, rank, kohya).items()
        if "floor" in name or _covers(name) in cover or (name == "plain PEFT LoRA" and "lycoris" in cover)
    }
    steps = {name: pass_of(one, latent, batch) for name, one in chosen.items()}
    peaks = {name: peak_above_rest(step) for name, step in steps.items()}  # of the first pass
    rounds: list[dict[str, float]] = []
    for _ in range(repeat):
        rounds.append({name: timed(step) for name, step in steps.items()})
        if model != "tiny-sd":  # rounds are slow, so each is printed
            shown = ", ".join(f"{name} {1000 * seconds:.0f}" for name, seconds in rounds[-1].items())
            print(f"round {len(rounds)} (ms): {shown}", flush=True)
    print(f"\n{model}, latents {latent}x{latent}, batch {batch}, rank {rank}, fp32, {torch.get_num_threads()} threads")
    print(f"{'forward and backward of':38} {'ms':>8} {'/ floor':>8} {'/ PEFT':>8} {'MiB above weights':>18}")
    for name in steps:
        wider = "C3Lier" in name or cover == ["c3lier"]
        plain = "plain PEFT LoRA, C3Lier's modules" if wider else "plain PEFT LoRA"
        ms = 1000 * statistics.median(one[name] for one in rounds)
        to_floor = statistics.median(one[name] / one["base alone (floor)"] for one in rounds)
        to_peft = statistics.median(one[name] / one[plain] for one in rounds)
        print(f"{name:38} {ms:8.1f} {to_floor:8.3f} {to_peft:8.3f} {peaks[name]:18.0f}")
        yield Result(f"{model}: {name}", ms, to_peft, peaks[name])
    for dylora, plain in (("DyLoRA", "LierLa"), ("DyLoRA, C3Lier's modules", "C3Lier")):
        if dylora in steps:
            ratio = statistics.median(one[dylora] / one[plain] for one in rounds)
            print(f"{dylora} / {plain} of the same rank: {ratio:.3f}", flush=True)


def _covers(name: str) -> str:
    """The set that a variant belongs to, for --cover."""
    if "LoHa" in name or "LoKr" in name:
        return "lycoris"
    return "c3lier" if "C3Lier" in name else "lierla"


def loop(model: str, latent: int, batch: int, rank: int, repeat: int) -> Iterator[Result]:
    """Measure and print whole steps of the training program and steps written by hand, which take turns."""
    from lora_adapters.train.options.arguments import settings
    from lora_adapters.train.training.loop import train_prepared
    from lora_adapters.train.training.setup import prepare

    for module, args in (("networks.lora", None), ("networks.dylora", [f"unit={max(1, rank // 4)}", "sort_at=0"])):
        with tempfile.TemporaryDirectory() as folder:
            images = _images(Path(folder) / "images" / "1_x", max(8, batch), 8 * latent)
            options = settings(
                pretrained_model_name_or_path=str(ROOT / "examples" / "tiny-sd"),
                train_data_dir=str(images.parent),
                resolution=str(8 * latent),
                output_dir=str(Path(folder) / "out"),
                network_module=module,
                network_args=args,
                network_dim=rank,
                train_batch_size=batch,
                max_train_steps=repeat + 3,
                max_data_loader_n_workers=0,
                cache_latents=True,
                learning_rate=1e-4,
                seed=1,
            )
            run = prepare(options, _models(options, model))
            ours, bare = _in_turns(run, latent, batch)
            train_prepared(run)
        ratio = statistics.median(o / b for o, b in zip(ours[2:], bare[2:], strict=False))
        print(f"{model}, {module}: training loop {1000 * statistics.median(ours[2:]):.1f} ms a step, bare step "
              f"{1000 * statistics.median(bare[2:]):.1f} ms, ratio {ratio:.3f} (U-Net and text encoder, batch {batch}, "
              f"latents {latent}x{latent})", flush=True)  # fmt: skip
        yield Result(f"{model}: training loop, {module}", 1000 * statistics.median(ours[2:]), ratio)


def _in_turns(run: Any, latent: int, batch: int) -> tuple[list[float], list[float]]:
    """Two lists that are filled while `run` trains: seconds of its steps, and of bare steps between them."""
    ours: list[float] = []
    bare: list[float] = []
    models, optimizer = run.models, run.optimizer.optimizer
    noisy, target = torch.randn(batch, 4, latent, latent), torch.randn(batch, 4, latent, latent)
    ids = torch.randint(0, 100, (batch, 77))
    times = torch.randint(0, 1000, (batch,))
    state = {"since": 0.0, "inside": False}

    def step() -> None:
        text = models.text_encoders[0](ids).last_hidden_state
        torch.nn.functional.mse_loss(models.denoiser(noisy, times, text).sample, target).backward()
        torch.nn.utils.clip_grad_norm_(run.parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def between(*_: Any) -> None:
        if state["inside"]:
            return
        if state["since"]:
            ours.append(time.perf_counter() - state["since"])
        state["inside"] = True
        optimizer.zero_grad(set_to_none=True)
        if state["since"]:
            bare.append(timed(step))
        state["inside"] = False
        state["since"] = time.perf_counter()

    optimizer.register_step_post_hook(between)
    return ours, bare


def _models(options: argparse.Namespace, model: str) -> Any:
    """tiny-sd, or tiny-sd with a random U-Net of SD1.5's shapes and a random text encoder of CLIP ViT-L's shapes."""
    from transformers import CLIPTextConfig, CLIPTextModel

    from lora_adapters.train.models.base import load_base_models

    models = load_base_models(options)
    if model != "tiny-sd":
        sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        models.denoiser = base_unet(model).eval()
        models.text_encoders = [CLIPTextModel(CLIPTextConfig(**sizes)).requires_grad_(False).eval()]
    return models


def _images(folder: Path, count: int, size: int) -> Path:
    from PIL import Image

    folder.mkdir(parents=True)
    for number in range(count):
        Image.effect_noise((size, size), 40 + number).convert("RGB").save(folder / f"{number}.png")
        (folder / f"{number}.caption").write_text("noise")
    return folder


def main() -> None:
    """Run the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=["tiny-sd", "sd15"], default=["tiny-sd", "sd15"])
    parser.add_argument("--only", nargs="+", choices=["layers", "loop"], default=["layers", "loop"])
    covers = ["lierla", "c3lier", "lycoris"]
    parser.add_argument("--cover", nargs="+", choices=covers, default=covers)
    parser.add_argument("--latent", type=int, default=32, help="side of sd15's latents; tiny-sd has its own 8")
    parser.add_argument("--batch", type=int, default=1, help="sd15's batch; tiny-sd has 4")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=7, help="rounds of sd15; tiny-sd has eight times as many")
    parser.add_argument("--kohya", type=Path, help="a checkout of sd-scripts, whose modules then take part")
    parser.add_argument("--results", type=Path, help="JSON file for the numbers")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    found: list[Result] = []
    for model in args.models:
        small = model == "tiny-sd"
        size = (8, 4) if small else (args.latent, args.batch)
        repeat = 8 * args.repeat if small else args.repeat
        if "layers" in args.only:
            found += layers(model, *size, args.rank, repeat, args.kohya, args.cover)
        if "loop" in args.only:
            found += loop(model, *size, args.rank, repeat)
    if args.results:
        args.results.write_text(json.dumps([one._asdict() for one in found], indent=1))


if __name__ == "__main__":
    main()
