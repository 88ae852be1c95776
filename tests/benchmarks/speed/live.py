#!/usr/bin/env python3
"""One measurement on a live pipeline, for a separate process; prints one line of JSON.

usage: live.py CASE --side ours|stock --size sd15|sdxl|flux --file ADAPTER [--second ADAPTER] [--number N] [--repeat N]

CASE is one of: load (with N other adapters loaded), turns (load the file and the second file in turns), set_adapters
(change active adapters and weights), weights (change only the weights, repeatedly), rank, draw (one call of the U-Net
with N active adapters), fuse, unfuse (N adapters). "stock" is diffusers without this package. Times are CPU seconds of
the process with one thread, which is about the time on an idle machine; `wall` is the wall time. For turns the line
has the results of both files, named by their options.
"""

import argparse
import gc
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent.parent))

from peak_memory import Peak, peaks_above_rest

from speed.pipelines import give_weights, pipeline

LATENT = 32  # side of the latents: images of 256 pixels, with and without the prompt
CALLS = 50  # calls per measurement of an action that takes about a millisecond


class Measured(NamedTuple):
    """CPU and wall seconds of each call, the peak memory of one call, and its number of torch operations."""

    times: list[tuple[float, float]]
    memory: Peak
    operations: int | None = None


def timed(action: Callable[[], Any], undo: Callable[[], Any], repeat: int) -> Measured:
    """Measure the CPU and wall seconds of `repeat` calls of the action, and the peak memory of one call.

    Two calls come before: the first one for imports, which is not measured, the second one for the memory.
    """
    return in_turns({"": action}, undo, repeat)[""]


def in_turns(actions: dict[str, Callable[[], Any]], undo: Callable[[], Any], repeat: int) -> dict[str, Measured]:
    """Like `timed`, for several actions that take turns: name -> measurement."""
    memory, times = {}, {name: [] for name in actions}
    for name, action in actions.items():
        action()
        undo()
        gc.collect()
        memory[name] = peaks_above_rest(action)
        undo()
    for _ in range(repeat):
        for name, action in actions.items():
            gc.collect()
            start, cpu = time.perf_counter(), time.process_time()
            action()
            times[name].append((time.process_time() - cpu, time.perf_counter() - start))
            undo()
    return {name: Measured(times[name], memory[name]) for name in actions}


def nothing() -> None:
    """An empty undo function."""


class Operations(TorchDispatchMode):
    """Counts torch operations."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def several(pipe: Any, args: argparse.Namespace) -> list[str]:
    """Load `--number` adapters, and return their names."""
    names = [f"adapter{number}" for number in range(args.number)]
    for number, name in enumerate(names):
        pipe.load_lora_weights(args.second if number % 2 else args.file, adapter_name=name)
    return names


def load(pipe: Any, args: argparse.Namespace) -> Measured:
    """`pipe.load_lora_weights(file)`."""
    several(pipe, args)
    undo = (lambda: pipe.delete_adapters("a")) if args.number else pipe.unload_lora_weights
    return timed(lambda: pipe.load_lora_weights(args.file, adapter_name="a"), undo, args.repeat)


def turns(pipe: Any, args: argparse.Namespace) -> dict[str, Measured]:
    """`pipe.load_lora_weights` of two files in turns."""
    loads = {name: partial(pipe.load_lora_weights, getattr(args, name)) for name in ("file", "second")}
    return in_turns(loads, pipe.unload_lora_weights, args.repeat)


def set_adapters(pipe: Any, args: argparse.Namespace) -> Measured:
    """`pipe.set_adapters` with two loaded adapters."""
    pipe.load_lora_weights(args.file, adapter_name="a")
    pipe.load_lora_weights(args.second, adapter_name="b")
    return timed(lambda: pipe.set_adapters(["a", "b"], [0.7, 0.3]), lambda: pipe.set_adapters(["b"]), args.repeat)


def weights(pipe: Any, args: argparse.Namespace) -> Measured:
    """`pipe.set_adapters` with other weights for the active adapters, like moving a slider."""
    names = several(pipe, args)

    def slide() -> None:
        for call in range(CALLS):
            pipe.set_adapters(names, [(call + number) / CALLS for number in range(len(names))])

    found = timed(slide, nothing, args.repeat)
    return Measured([(cpu / CALLS, wall / CALLS) for cpu, wall in found.times], found.memory)


def draw(pipe: Any, args: argparse.Namespace) -> Measured:
    """One call of the U-Net, in float32."""
    names = several(pipe, args)
    if names:
        pipe.set_adapters(names, [1 / len(names)] * len(names))
    give_weights(pipe.unet)
    config = pipe.unet.config
    given = torch.randn(2, config.in_channels, LATENT, LATENT), 500, torch.randn(2, 77, config.cross_attention_dim)

    def call() -> None:
        with torch.no_grad():
            pipe.unet(*given)

    with Operations() as counted:
        call()
    return timed(call, nothing, args.repeat)._replace(operations=counted.count)


def fuse(pipe: Any, args: argparse.Namespace) -> Measured:
    """`pipe.fuse_lora()` of the U-Net's adapters, in float32."""
    pipe.set_adapters(several(pipe, args))
    give_weights(pipe.unet)
    return timed(lambda: pipe.fuse_lora(["unet"]), lambda: pipe.unfuse_lora(["unet"]), args.repeat)


def unfuse(pipe: Any, args: argparse.Namespace) -> Measured:
    """`pipe.unfuse_lora()`."""
    pipe.set_adapters(several(pipe, args))
    give_weights(pipe.unet)
    pipe.fuse_lora(["unet"])
    return timed(lambda: pipe.unfuse_lora(["unet"]), lambda: pipe.fuse_lora(["unet"]), args.repeat)


def rank(pipe: Any, args: argparse.Namespace) -> Measured:
    """Change the rank of a DyLoRA: with set_rank, or in stock diffusers by loading another file."""
    pipe.load_lora_weights(args.file, adapter_name="a")
    if args.side == "ours":
        from lora_adapters import set_rank

        return timed(lambda: set_rank(pipe, 4), lambda: set_rank(pipe, 16), args.repeat)

    def change(file: str) -> None:
        pipe.delete_adapters("a")
        pipe.load_lora_weights(file, adapter_name="a")

    return timed(lambda: change(args.second), lambda: change(args.file), args.repeat)


CASES = {
    "load": load,
    "turns": turns,
    "set_adapters": set_adapters,
    "weights": weights,
    "rank": rank,
    "draw": draw,
    "fuse": fuse,
    "unfuse": unfuse,
}


def medians(found: Measured) -> dict[str, float | int | None]:
    """The printed values of a measurement."""
    cpu, wall = (statistics.median(column) for column in zip(*found.times, strict=True))
    return {
        "seconds": cpu,
        "wall": wall,
        "MiB": found.memory.resident,
        "anonymous": found.memory.anonymous,
        "operations": found.operations,
    }


def main() -> None:
    """Run the measurement and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--side", choices=("ours", "stock"), required=True)
    parser.add_argument("--size", choices=("sd15", "sdxl", "flux"), required=True)
    parser.add_argument("--file", required=True)
    parser.add_argument("--second")
    parser.add_argument("--number", type=int, default=0, help="of adapters that are there")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    if args.side == "ours":
        import lora_adapters  # noqa: F401
    pipe = pipeline(args.size)
    found = CASES[args.case](pipe, args)
    assert ("lora_adapters" in sys.modules) == (args.side == "ours")
    line = {name: medians(one) for name, one in found.items()} if isinstance(found, dict) else medians(found)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
