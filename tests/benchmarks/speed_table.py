#!/usr/bin/env python3
"""Runs all benchmarks of the project, compared with the installed other projects; writes a markdown table and a chart.

usage: speed_table.py --out DIR [--only live training files] [--sizes sd15 sdxl flux] [--ranks 4 16 64] [--rounds N]
                      [--kohya CHECKOUT [--kohya_python PYTHON]] [--report]

live: loading adapters, changing their weights and the rank of a DyLoRA on full-size pipelines, with and without this
package in separate processes that take turns; and loading other kinds of adapters in turns with a LoRA that has equally
many modules. training: training.py. files: file_tools.py (needs 75 GB of disk for flux). Every finished measurement is
stored in a JSON file in DIR, so that the same command continues an interrupted run.
--report measures nothing, and writes DIR/table.md and DIR/chart.png (needs matplotlib) from the stored results.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

SIDES = ("ours", "stock")
KEPT = ("seconds", "MiB", "anonymous", "operations")
DRAWN = ("sd15",)  # sizes with a U-Net that is run: its weights need 3.4 GB in float32
KINDS = ("loha", "lokr", "dora", "full in float16", "full in bfloat16", "norm")  # loaded at the sizes in DRAWN
Results = dict[str, Any]


class Case(NamedTuple):
    """A measurement on a live pipeline: its name, live.py's case, its files, and the number of loaded adapters."""

    name: str
    case: str
    size: str
    rank: int
    file: Path
    second: Path | None = None
    number: int = 0


def kept_in(file: Path) -> Any:
    """The content of a JSON file; None if it does not exist."""
    return json.loads(file.read_text()) if file.exists() else None


def machine() -> str:
    """Processor, cores, memory and the versions of the libraries."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    facts = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    named = {key.strip(): value.strip() for key, value in facts.items()}
    model = named.get("model name") or platform.processor()
    if "model" in named:
        model += f" (family {named.get('cpu family')}, model {named['model']})"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "peft", "transformers"))
    return f"{model}, {os.cpu_count()} cores, {memory:.0f} GB; Python {platform.python_version()}, {libraries}"


def live_cases(folder: Path, sizes: list[str], ranks: list[int]) -> Iterator[Case]:
    """All measurements on live pipelines."""
    for size in sizes:
        for rank in ranks:
            yield Case(f"{size} load rank {rank}", "load", size, rank, folder / f"{size}-lora-{rank}.safetensors")
        rank = ranks[len(ranks) // 2]
        one, two = (folder / f"{size}-lora-{number}.safetensors" for number in (rank, f"{rank}-b"))
        yield Case(f"{size} load an eighth adapter, rank {rank}", "load", size, rank, one, two, 7)
        yield Case(f"{size} set_adapters", "set_adapters", size, rank, one, two)
        yield Case(f"{size} set_adapters, other weights", "weights", size, rank, one, two, 2)
        dial, cut = folder / f"{size}-dylora-16.safetensors", folder / f"{size}-dylora-4.safetensors"
        yield Case(f"{size} set_rank", "rank", size, 16, dial, cut)
        if size in DRAWN:
            for number in (0, 1, 3, 8):
                yield Case(f"{size} draw with {number}", "draw", size, rank, one, two, number)
            for case in ("fuse", "unfuse"):
                yield Case(f"{size} {case} 3", case, size, rank, one, two, 3)


def kind_cases(folder: Path, sizes: list[str]) -> Iterator[Case]:
    """Loading other kinds of adapters into float16 pipelines, in turns with a LoRA that has equally many modules."""
    for size in (size for size in sizes if size in DRAWN):
        for kind in KINDS:
            lora = folder / f"{size}-lora-16-{'few' if kind == 'norm' else 'all'}.safetensors"
            yield Case(
                f"{size} load {kind}", "turns", size, 16, folder / f"{size}-{kind.replace(' ', '-')}.safetensors", lora
            )


def make_kind(case: Case) -> None:
    """Create an adapter of another kind, and a LoRA of rank 16 with equally many modules."""
    import torch

    from tests.benchmarks import full_size

    kind, _, dtype = case.name.split(maxsplit=2)[2].partition(" in ")
    own = [getattr(torch, dtype)] if dtype else []
    full_size.make_lycoris(case.file, case.size, kind, 3, *own)
    most = len(list(full_size.norms(case.size))) if kind == "norm" else None
    full_size.make_adapter(case.second, case.size, case.rank, case.rank, 3, most)


def make_files(case: Case) -> None:
    """Create the adapters of a measurement with random weights, by default for the modules of LoRA-LierLa."""
    from lora_adapters.convert import Adapter
    from lora_adapters.convert.formats.metadata import DyLora
    from tests.benchmarks.full_size import make_adapter

    if case.case == "turns":
        make_kind(case)
        return
    for seed, path in enumerate(path for path in (case.file, case.second) if path is not None):
        if path.exists():
            continue
        if case.case == "rank":
            plain = make_adapter(path.with_name(f"{case.size}-lora-16.safetensors"), case.size, 16, None, 1)
            dylora = Adapter.load(plain).as_dylora(DyLora(4))
            dylora.save(case.file)
            dylora.truncate(4).save(case.second)
        else:
            make_adapter(path, case.size, case.rank, None, 1 + seed)


def run_live(case: Case, side: str) -> dict[str, Any]:
    """Run live.py in a separate process, and return its result."""
    command = [sys.executable, str(HERE / "speed" / "live.py"), case.case, "--side", side]
    command += ["--size", case.size, "--file", str(case.file)]
    command += ["--second", str(case.second)] if case.second else []
    command += ["--number", str(case.number)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {case.name}, {side}: {done.stderr.strip().splitlines()[-1]}")
    printed: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return printed


def measure_live(case: Case, rounds: int) -> dict[str, Any]:
    """Measure a case: median seconds and MiB of each side, and the median of the rounds' ratios ours / stock.

    For "turns" the two sides are the other kind and the LoRA, which take turns in each process.
    """
    found: dict[str, list[dict[str, float]]] = {}
    for number in range(rounds):
        if case.case == "turns":
            printed = run_live(case, "ours")
            runs = {"kind": printed["file"], "lora": printed["second"]}
        else:
            runs = {side: run_live(case, side) for side in (SIDES if number % 2 == 0 else SIDES[::-1])}
        for side, run in runs.items():
            found.setdefault(side, []).append(run)
    first, second = (found[side] for side in (("kind", "lora") if case.case == "turns" else SIDES))
    return {
        **{side: {key: middle(one.get(key) for one in runs) for key in KEPT} for side, runs in found.items()},
        "ratio": statistics.median(one["seconds"] / two["seconds"] for one, two in zip(first, second, strict=True)),
        "rounds": rounds,
    }  # fmt: skip


def middle(values: Iterable[float | None]) -> float | None:
    """The median of the values that are not None; None if there are none."""
    counted = [value for value in values if value is not None]
    return statistics.median(counted) if counted else None


def training(args: argparse.Namespace) -> None:
    """Run training.py, unless its results already exist in the folder."""
    kept = args.out / "training.json"
    if kept.exists():
        return
    command = [sys.executable, str(HERE / "training.py"), *(["--kohya", str(args.kohya)] if args.kohya else [])]
    command += ["--models", "tiny-sd", *(["sd15"] if "sd15" in args.sizes else []), "--latent", str(args.latent)]
    subprocess.run([*command, "--results", str(kept)], check=True)


def files(args: argparse.Namespace, folder: Path) -> None:
    """Run file_tools.py, which stores its own results in the folder and measures only missing cases."""
    command = [sys.executable, str(HERE / "file_tools.py"), "--folder", str(folder), "--most", str(args.most)]
    command += ["--missing", "--results", str(args.out / "files.json"), "--markdown", str(args.out / "files.md")]
    if args.kohya:
        command += ["--kohya", str(args.kohya), "--kohya_python", args.kohya_python]
    for size in args.sizes:
        subprocess.run([*command, "--only", size], check=True)


def seconds(value: float) -> str:
    """A time as text, in seconds or milliseconds."""
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.0f} ms" if value >= 0.01 else f"{1000 * value:.2f} ms"


def peaks(one: dict[str, Any]) -> str:
    """Peak memory as text: all resident memory and, if measured, anonymous memory."""
    anonymous = one.get("anonymous")
    return f"{one['MiB']:.0f} MiB" if anonymous is None else f"{one['MiB']:.0f} MiB, {anonymous:.0f}"


def table(results: Results, out: Path) -> str:
    """All results as markdown."""
    lines = [f"Machine: {results['machine']}.", ""]
    lines += ["CPU seconds of one thread (medians of processes that took turns), and the peak of memory above the"]
    lines += ["pipeline's: all of it, and that which is not the pages of mapped files.", ""]
    lines += [
        "| | ours | diffusers alone | ours / diffusers | memory ours | memory diffusers | operations of torch |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, one in results["live"].items():
        ours, stock = one["ours"], one["stock"]
        cells = [name, seconds(ours["seconds"]), seconds(stock["seconds"]), f"{one['ratio']:.3f}"]
        cells += [peaks(ours), peaks(stock)]
        counts = ours.get("operations"), stock.get("operations")
        cells.append("" if None in counts else f"{counts[0]:.0f}, {counts[1]:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    if results.get("kinds"):
        lines += ["", "Loads of other kinds, in turns with that of a LoRA of rank 16 with as many modules.", ""]
        lines += ["| | CPU | of the LoRA's | memory | the LoRA's |", "|---|---|---|---|---|"]
    for name, one in results.get("kinds", {}).items():
        cells = [name, seconds(one["kind"]["seconds"]), f"{one['ratio']:.2f}", peaks(one["kind"]), peaks(one["lora"])]
        lines.append(f"| {' | '.join(cells)} |")
    steps = kept_in(out / "training.json")
    if steps:
        lines += [
            "",
            "Training steps: forward and backward pass, against plain PEFT LoRA on the same modules; of a training",
        ]
        lines += ["loop, whole steps against bare ones.", ""]
        lines += ["| | ms | / plain PEFT or bare step | MiB above the weights |", "|---|---|---|---|"]
        for one in steps:
            memory = "" if one["MiB"] is None else f"{one['MiB']:.0f}"
            lines.append(f"| {one['name']} | {one['ms']:.1f} | {one['ratio']:.3f} | {memory} |")
    if (out / "files.md").exists():
        lines += ["", (out / "files.md").read_text().strip()]
    return "\n".join(lines) + "\n"


def chart(results: Results, out: Path) -> None:
    """Draw DIR/chart.png: ratios to diffusers and to PEFT, loading time against rank, file tools next to kohya's.

    There is a panel for each of them with results, and no chart without results.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps, tools = kept_in(out / "training.json") or [], kept_in(out / "files.json") or {}
    kinds = results.get("kinds", {})
    panels = [
        (results["live"], lambda axes: bars(axes, ratios(results["live"].items()), "time, ours / diffusers alone")),
        (results["live"], lambda axes: loading(axes, results["live"])),
        (kinds, lambda axes: bars(axes, ratios(kinds.items()), "time to load / a LoRA with as many modules")),
        (steps, lambda axes: bars(axes, ratios((s["name"], s) for s in steps), "a step / plain PEFT or bare step")),
        (tools, lambda axes: file_tools(axes, tools)),
    ]
    draw = [panel for measured, panel in panels if measured]
    rows = -(-len(draw) // 2)
    if not draw:
        return
    figure, grid = pyplot.subplots(rows, 2, figsize=(15, 6 * rows), squeeze=False)
    for axes, panel in zip(grid.flat, draw, strict=False):
        panel(axes)
    for axes in list(grid.flat)[len(draw) :]:
        axes.set_axis_off()
    figure.tight_layout()
    figure.savefig(out / "chart.png", dpi=90)


def ratios(measured: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, float]:
    """Name -> ratio of each measurement."""
    return {name: one["ratio"] for name, one in measured}


def loading(axes: Any, live: Results) -> None:
    """Plot loading seconds against the rank."""
    for size in dict.fromkeys(name.split()[0] for name in live):
        loads = {int(name.split()[-1]): one for name, one in live.items() if name.startswith(f"{size} load rank")}
        for side, line in (("ours", "-"), ("stock", "--")):
            times = [loads[rank][side]["seconds"] for rank in sorted(loads)]
            label = f"{size}, {side if side == 'ours' else 'diffusers alone'}"
            axes.plot(sorted(loads), times, line, marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("rank")
    axes.set_ylabel("CPU seconds")
    axes.set_title("load_lora_weights")
    axes.legend()


def file_tools(axes: Any, tools: dict[str, Any]) -> None:
    """Plot seconds of our file tools next to kohya's."""
    for who, color, shift in (("ours", "tab:blue", -0.2), ("kohya", "tab:orange", 0.2)):
        rows = [(n, row[who]["seconds"]) for n, row in enumerate(tools.values()) if who in row]
        axes.barh([n + shift for n, _ in rows], [value for _, value in rows], 0.4, color=color, label=who)
    axes.set_yticks(range(len(tools)), tools)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(left=1)
    axes.set_xlabel("seconds")
    axes.set_title("file tools, whole processes")
    axes.legend()


def bars(axes: Any, values: dict[str, float], title: str) -> None:
    """Plot horizontal bars, with a line at 1."""
    axes.barh(list(values), list(values.values()))
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=8)
    axes.set_title(f"{title} (less is faster)")


def main() -> None:
    """Measure what has no results yet, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results and of the files that are made")
    parser.add_argument(
        "--only", nargs="+", choices=("live", "training", "files"), default=("live", "training", "files")
    )
    parser.add_argument("--cases", nargs="+", help="of the live ones, only those with one of these words in their name")
    parser.add_argument("--sizes", nargs="+", choices=("sd15", "sdxl", "flux"), default=["sd15", "sdxl"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[4, 16, 64], help="of adapters to load")
    parser.add_argument("--latent", type=int, default=32, help="side of SD1.5's latents in the training steps")
    parser.add_argument("--most", type=float, default=900, help="seconds after which a file tool is stopped")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side, in turns")
    parser.add_argument("--kohya", type=Path, help="a checkout of sd-scripts to measure in the same run")
    parser.add_argument("--kohya_python", default=sys.executable)
    parser.add_argument("--make", action="store_true", help="only make the adapters of the live measurements")
    parser.add_argument("--report", action="store_true", help="measure nothing, write what is there")
    args = parser.parse_args()
    args.out = args.out.resolve()
    folder = args.out / "files"
    folder.mkdir(parents=True, exist_ok=True)
    kept = args.out / "results.json"
    results: Results = kept_in(kept) or {"live": {}}
    results["machine"] = machine()
    if "live" in args.only and not args.report:
        for case in (*live_cases(folder, args.sizes, args.ranks), *kind_cases(folder, args.sizes)):
            there = results.setdefault("kinds" if case.case == "turns" else "live", {})
            if case.name in there or (args.cases and not any(word in case.name for word in args.cases)):
                continue
            make_files(case)
            if not args.make:
                there[case.name] = measure_live(case, args.rounds)
                print(case.name, there[case.name], flush=True)
                kept.write_text(json.dumps(results, indent=1))
    if not args.report and not args.make:
        if "training" in args.only:
            training(args)
        if "files" in args.only:
            files(args, folder)
    (args.out / "table.md").write_text(table(results, args.out))
    try:
        chart(results, args.out)
    except ImportError:
        print("no chart: matplotlib is not installed (pip install lora-adapters[benchmarks])")
    print((args.out / "table.md").read_text())


if __name__ == "__main__":
    main()
