#!/usr/bin/env python3
"""Compares one DyLoRA training with separate LoRA trainings for each rank.

usage: rank_study.py --out DIR [--steps N] [--seeds N ...] [--rates R R [--third]] [--only WORD ...] [--workers N]
                     [--tasks style subject] [--base FOLDER] [--kohya CHECKOUT] [--report]

Trains a small base model on a style and on a subject with plain LoRA at each rank, this package's DyLoRA, kohya's
DyLoRA (if a checkout of sd-scripts is given) and LyCORIS' DyLoRA (if lycoris-lora is installed), with the same steps,
images and noise, and measures the held-out denoising loss at ranks 1, 2, 4, 8 and 16. On each task, the learning rate
of each method is chosen with the first seed among --rates, and with --third one more rate next to the better one. The
rate with the lowest mean loss over ranks is then used for the other seeds.

Every finished run is a file in DIR/runs, so that the same command continues an interrupted study. --report (also done
at the end) writes DIR/table.md, DIR/plot.png (needs matplotlib) and a sheet of images for each task.
"""

import argparse
import hashlib
import json
import multiprocessing
import re
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from study import report, tasks, training
from study.methods import Method, methods
from tqdm import tqdm


class Job(NamedTuple):
    """One run."""

    task: str
    method: Method
    lr: float
    seed: int

    def stem(self) -> str:
        """The file name of its results, without suffix."""
        return f"{self.task}-{re.sub('[^a-z0-9]+', '_', self.method.name)}-{self.lr:g}-seed{self.seed}"


def prepare(out: Path, base: Path, steps: int) -> None:
    """Create the folder of runs, the encoded tasks, and the base model's losses.

    SystemExit if the folder contains results of another base model or number of steps.
    """
    (out / "runs").mkdir(parents=True, exist_ok=True)
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    now = {"base": hashlib.sha256(weights.read_bytes()).hexdigest()[:12], "steps": steps}
    about = out / "about.json"
    if about.exists():
        before = json.loads(about.read_text())
        if {key: before[key] for key in now} != now:
            raise SystemExit(f"error: {out} holds results of another base model or number of steps: give another --out")
        return
    pipe = StableDiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32)
    losses = {}
    for name in tasks.TASKS:
        losses[name] = training.held_out_loss(pipe.unet.eval(), tasks.prepared(name, out, pipe).held_out)
    about.write_text(json.dumps({**now, "losses": losses}))


_shared: dict[str, Any] = {}


def start_worker(out: Path, folder: Path, kohya: Path | None, steps: int) -> None:
    """Load what every run of a worker process needs."""
    torch.set_num_threads(1)  # matrices are small: two processes are faster than two threads
    torch.set_flush_denormal(True)
    base = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32).requires_grad_(False)
    loaded = {name: tasks.prepared(name, out, None) for name in tasks.TASKS}
    _shared.update(out=out, kohya=kohya, steps=steps, base=base, tasks=loaded)


def do(job: Job) -> str:
    """Run a job and save its record; the adapter of seed 0 is saved for the sheets."""
    record, adapter = training.run(
        _shared["base"], job.method, _shared["tasks"][job.task], job.lr, job.seed, _shared["steps"], _shared["kohya"]
    )
    runs = _shared["out"] / "runs"
    if job.seed == 0:
        adapter.save(runs / f"{job.stem()}.safetensors", dtype=torch.float16)
    partial = runs / f"{job.stem()}.partial"
    partial.write_text(json.dumps(record) + "\n")
    partial.replace(runs / f"{job.stem()}.json")
    return job.stem()


def finish(jobs: Iterable[Job], out: Path, args: argparse.Namespace) -> None:
    """Run the jobs that have no record yet."""
    left = [job for job in jobs if not (out / "runs" / f"{job.stem()}.json").exists()]
    if not left:
        return
    context = multiprocessing.get_context("spawn")
    shared = (out, args.base, args.kohya, args.steps)
    with ProcessPoolExecutor(args.workers, context, start_worker, shared) as pool:
        waiting = [pool.submit(do, job) for job in left]
        for done in tqdm(as_completed(waiting), total=len(left), desc="runs", mininterval=10):
            done.result()


def further(best: float, tried: list[float]) -> float:
    """The next learning rate beyond the best one, in steps of the ratio between the tried rates."""
    ordered = sorted(tried)
    step = ordered[1] / ordered[0]
    return best / step if best == ordered[0] else best * step


def main() -> None:
    """Run the missing runs, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--steps", type=int, default=150, help="training steps of every run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the first one finds the rates")
    parser.add_argument("--rates", type=float, nargs=2, default=[2e-3, 4e-3], help="learning rates to try")
    parser.add_argument("--third", action="store_true", help="try a third rate, on the side of the better one")
    parser.add_argument("--only", nargs="+", help="only methods with one of these words in their name")
    parser.add_argument("--tasks", nargs="+", choices=tasks.TASKS, default=tasks.TASKS)
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--base", type=Path, default=tasks.BASE, help="a Diffusers folder (default: examples/tiny-sd)")
    parser.add_argument("--kohya", type=Path, help="a checkout of sd-scripts")
    parser.add_argument("--report", action="store_true", help="run nothing, report what is there")
    args = parser.parse_args()
    if args.kohya and not (args.kohya / "networks" / "dylora.py").exists():
        raise SystemExit(f"error: {args.kohya} is no checkout of sd-scripts: it has no networks/dylora.py")
    out = args.out.resolve()
    prepare(out, args.base, args.steps)
    chosen = [one for one in methods(args.kohya) if not args.only or any(word in one.name for word in args.only)]
    if not args.report:
        first = args.seeds[0]
        finish([Job(task, one, lr, first) for task in args.tasks for lr in args.rates for one in chosen], out, args)
        if args.third:
            tried = [one for one in report.records(out) if one["lr"] in args.rates]
            best = {task: report.best_rates(tried, task, first) for task in args.tasks}
            pairs = [(task, one) for task in args.tasks for one in chosen]
            finish([Job(task, one, further(best[task][one.name], args.rates), first) for task, one in pairs], out, args)
        best = {task: report.best_rates(report.records(out), task, first) for task in args.tasks}
        whole = [(task, one, seed) for seed in args.seeds for task in args.tasks for one in chosen]
        finish([Job(task, one, best[task][one.name], seed) for task, one, seed in whole], out, args)
    report.write(out, args.base, args.seeds)
    print((out / "table.md").read_text())


if __name__ == "__main__":
    sys.exit(main())
