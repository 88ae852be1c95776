"""Writes the study's table, plot and image sheets from the records of its runs."""

import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw, ImageFont

from lora_adapters import Adapter

from .methods import RANKS
from .tasks import PROMPTS, TASKS

PLAIN, CUT = "plain LoRA, one training a rank", "plain LoRA of rank 16, cut by SVD"
SHEET = ("plain", "ours sorted", "ours sqrt spread", "ours sqrt", "ours sqrt frozen", "kohya", "lycoris")
HEAD = 48  # height of a sheet's titles in pixels
THICK = {PLAIN: "black", "ours sorted": "red"}  # the default method, and the method that it is compared with
Losses = dict[tuple[str, str, int], list[float]]  # (task, row of the table, rank) -> one loss per seed
Rates = Mapping[str, Mapping[str, float]]  # task -> method -> learning rate


def records(out: Path) -> list[dict[str, Any]]:
    """The records of all finished runs."""
    return [json.loads(file.read_text()) for file in sorted((out / "runs").glob("*.json"))]


def best_rates(runs: Iterable[Mapping[str, Any]], task: str, seed: int) -> dict[str, float]:
    """Method -> the learning rate with the lowest loss (mean over the method's ranks) for that task and seed."""
    best: dict[str, tuple[float, float]] = {}
    for run in runs:
        if run["seed"] == seed and run["task"] == task:
            found = statistics.mean(run["losses"].values()), run["lr"]
            best[run["method"]] = min(best.get(run["method"], found), found)
    return {method: lr for method, (_, lr) in best.items()}


def collected(runs: list[dict[str, Any]], seeds: list[int]) -> tuple[Losses, Rates]:
    """The losses at each method's best learning rate on each task, and these rates."""
    rates = {task: best_rates(runs, task, seeds[0]) for task in TASKS}
    losses: Losses = {}
    for run in sorted(runs, key=lambda one: one["seed"]):
        if run["seed"] not in seeds or run["lr"] != rates[run["task"]].get(run["method"]):
            continue
        row = PLAIN if run["method"].startswith("plain") else run["method"]
        for name, values in ((row, run["losses"]), (CUT, run["svd"])):
            for rank, loss in values.items():
                losses.setdefault((run["task"], name, int(rank)), []).append(loss)
        if run["method"] == "plain r16":
            losses.setdefault((run["task"], CUT, 16), []).append(run["losses"]["16"])
    return losses, rates


def tasks_of(losses: Losses) -> list[str]:
    """The tasks with runs."""
    return [task for task in TASKS if any(where == task for where, *_ in losses)]


def rows_of(losses: Losses, task: str) -> list[str]:
    """The rows of a task's table, in the order of the study's question."""
    found = {name for where, name, _ in losses if where == task}
    ours = sorted(name for name in found if name.startswith("ours"))
    return [name for name in (PLAIN, CUT, *ours, "kohya", "lycoris") if name in found]


def spread(values: list[float]) -> float:
    """The standard deviation over seeds; 0 for one seed."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def against_plain(losses: Losses, task: str, name: str, rank: int) -> list[float]:
    """loss / (loss of plain LoRA at that rank) - 1 for each seed, with the same images and noise."""
    pairs = zip(losses.get((task, name, rank), []), losses.get((task, PLAIN, rank), []), strict=False)
    return [one / plain - 1 for one, plain in pairs]


def table(losses: Losses, rates: Rates, runs: list[dict[str, Any]], base: Mapping[str, float]) -> str:
    """A table for each task: mean loss ± standard deviation over seeds, and the difference from plain LoRA."""
    lines = []
    for task in tasks_of(losses):
        lines += [f"### {task}", "", f"The base model's loss: {base[task]:.4f}.", ""]
        lines += [f"| held-out loss at rank | {' | '.join(map(str, RANKS))} | learning rate |"]
        lines.append("|" + "---|" * (len(RANKS) + 2))
        for name in rows_of(losses, task):
            cells = []
            for rank in RANKS:
                values = losses.get((task, name, rank), [])
                if not values:
                    cells.append("")
                    continue
                cell = f"{statistics.mean(values):.4f}"
                if len(values) > 1:
                    cell += f" ±{spread(values):.4f}"
                difference = against_plain(losses, task, name, rank)
                if name != PLAIN and difference:
                    cell += f" ({statistics.mean(difference):+.1%})"
                cells.append(cell)
            methods = {PLAIN: [f"plain r{rank}" for rank in RANKS], CUT: ["plain r16"]}.get(name, [name])
            used = ", ".join(f"{rates[task][one]:g}" for one in methods if one in rates[task])
            lines.append(f"| {name} | {' | '.join(cells)} | {used} |")
        lines.append("")
    seconds: dict[str, list[float]] = {}
    for run in runs:
        seconds.setdefault("plain" if run["method"].startswith("plain") else run["method"], []).append(
            run["cpu_seconds"] / run["steps"]
        )
    lines += ["| method | CPU seconds a step (median) |", "|---|---|"]
    lines += [f"| {name} | {statistics.median(values):.3f} |" for name, values in seconds.items()]
    return "\n".join(lines) + "\n"


def plot(losses: Losses, file: Path) -> None:
    """Plot loss against rank with error bars, and next to it the difference from plain LoRA."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = tasks_of(losses)
    figure, axes = pyplot.subplots(len(tasks), 2, figsize=(13, 4.6 * len(tasks)), squeeze=False)
    for row, task in enumerate(tasks):
        names = rows_of(losses, task)
        for axis in axes[row]:
            axis.set_prop_cycle(color=pyplot.get_cmap("tab20").colors)
        for index, name in enumerate(names):
            ranks = [rank for rank in RANKS if losses.get((task, name, rank))]
            places = [2 ** (0.03 * (index - len(names) / 2)) * rank for rank in ranks]  # side by side
            style = {"marker": "o", "markersize": 4, "capsize": 2, "label": name}
            if name in THICK:
                style |= {"color": THICK[name], "linewidth": 2.5, "zorder": 3}
            elif "frozen" in name:
                style |= {"linestyle": "--"}
            values = [losses[task, name, rank] for rank in ranks]
            axes[row][0].errorbar(places, list(map(statistics.mean, values)), list(map(spread, values)), **style)
            values = [[100 * one for one in against_plain(losses, task, name, rank)] for rank in ranks]
            if all(values):
                axes[row][1].errorbar(places, list(map(statistics.mean, values)), list(map(spread, values)), **style)
        axes[row][0].set_title(f"{task}: held-out loss")
        axes[row][1].set_title(f"{task}: difference from plain LoRA of that rank, %")
        axes[row][1].axhspan(-2, 2, color="0.9")
        for axis in axes[row]:
            axis.set_xscale("log", base=2)
            axis.set_xticks(RANKS, RANKS)
            axis.set_xlabel("rank")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="lower center", ncols=5, fontsize=9)
    figure.tight_layout(rect=(0, 0.14 / len(tasks), 1, 1))
    figure.savefig(file, dpi=90)


def sheet(out: Path, base: Path, task: str, rates: Mapping[str, float], seed: int) -> None:
    """Generate a sheet with the first seed's adapters: a block of prompts for each method, a column for each rank."""
    pipe = StableDiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    prompts, shown, side = PROMPTS[task], (1, 4, 16), 96
    stems = {(run["task"], run["method"], run["lr"], run["seed"]): file for file, run in files(out)}

    def adapter_of(name: str, rank: int) -> Adapter | None:
        method = f"plain r{rank}" if name == "plain" else name
        file = stems.get((task, method, rates.get(method), seed))
        if file is None or not file.with_suffix(".safetensors").exists():
            return None
        adapter = Adapter.load(file.with_suffix(".safetensors"))
        return adapter if rank == adapter.rank else adapter.truncate(rank)

    columns: list[tuple[str, list[Image.Image]]] = [("base", drawn(pipe, prompts, None))]
    for name in SHEET:
        for rank in shown:
            adapter = adapter_of(name, rank)
            if adapter is not None:
                columns.append((f"{name.replace(' ', chr(10), 1)}\nrank {rank}", drawn(pipe, prompts, adapter)))
    image = Image.new("RGB", (120 + len(columns) * (side + 3), HEAD + len(prompts) * (side + 3)), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(11)
    for row, prompt in enumerate(prompts):
        pen.text((6, HEAD + row * (side + 3) + side // 2), prompt, "black", font, anchor="lm")
    for column, (title, images) in enumerate(columns):
        left = 120 + column * (side + 3)
        pen.multiline_text((left + side // 2, HEAD // 2), title, "black", font, anchor="mm", align="center")
        for row, one in enumerate(images):
            image.paste(one.resize((side, side), Image.Resampling.BICUBIC), (left, HEAD + row * (side + 3)))
    image.quantize(192).save(out / f"{task}.png", optimize=True)


def files(out: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The records and their files."""
    return [(file, json.loads(file.read_text())) for file in sorted((out / "runs").glob("*.json"))]


def drawn(pipe: Any, prompts: tuple[str, ...], adapter: Adapter | None) -> list[Image.Image]:
    """Generate one image per prompt, with the same noise for every adapter."""
    if adapter is not None:
        adapter.to_pipeline(pipe, "shown")
    generators = [torch.Generator().manual_seed(1) for _ in prompts]
    images = pipe(list(prompts), num_inference_steps=20, guidance_scale=4.0, generator=generators).images
    if adapter is not None:
        pipe.unload_lora_weights()
    return images


def write(out: Path, base: Path, seeds: list[int]) -> None:
    """Write table.md, plot.png and a sheet for each task."""
    runs = records(out)
    losses, rates = collected(runs, seeds)
    (out / "table.md").write_text(table(losses, rates, runs, json.loads((out / "about.json").read_text())["losses"]))
    try:
        plot(losses, out / "plot.png")
    except ImportError:
        print("no plot: matplotlib is not installed (pip install lora-adapters[benchmarks])")
    for task in tasks_of(losses):
        sheet(out, base, task, rates[task], seeds[0])
