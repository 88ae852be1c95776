#!/usr/bin/env python3
"""One measurement on a live pipeline, in a process of its own; prints one line of JSON.

usage: live.py CASE --side ours|stock --size sd15|sdxl|flux --file ADAPTER [--second ADAPTER] [--repeat N]

CASE is one of: load, set_adapters, rank. "stock" is diffusers without this package. Times are CPU seconds of the
process with one thread, about what it takes on a machine with nothing else to do; `wall` is what it took on this one.
"""

import argparse
import gc
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent.parent))

from peak_memory import peak_above_rest

from speed.pipelines import pipeline

Measured = tuple[list[tuple[float, float]], float]


def timed(action: Callable[[], Any], undo: Callable[[], Any], repeat: int) -> Measured:
    """CPU and wall seconds of each of `repeat` calls of the action, and the MiB of one more before them."""
    gc.collect()
    memory = peak_above_rest(action)
    undo()
    found = []
    for _ in range(repeat):
        gc.collect()
        start, cpu = time.perf_counter(), time.process_time()
        action()
        found.append((time.process_time() - cpu, time.perf_counter() - start))
        undo()
    return found, memory


def nothing() -> None:
    """Nothing to undo."""


def load(pipe: Any, args: argparse.Namespace) -> Measured:
    """`pipe.load_lora_weights(file)`."""
    return timed(lambda: pipe.load_lora_weights(args.file, adapter_name="a"), pipe.unload_lora_weights, args.repeat)


def set_adapters(pipe: Any, args: argparse.Namespace) -> Measured:
    """`pipe.set_adapters` between two adapters that are there."""
    pipe.load_lora_weights(args.file, adapter_name="a")
    pipe.load_lora_weights(args.second, adapter_name="b")
    return timed(lambda: pipe.set_adapters(["a", "b"], [0.7, 0.3]), lambda: pipe.set_adapters(["b"]), args.repeat)


def rank(pipe: Any, args: argparse.Namespace) -> Measured:
    """From one rank of a DyLoRA to another: set_rank here, the other rank's file in stock diffusers."""
    pipe.load_lora_weights(args.file, adapter_name="a")
    if args.side == "ours":
        from lora_adapters import set_rank

        return timed(lambda: set_rank(pipe, 4), lambda: set_rank(pipe, 16), args.repeat)

    def change(file: str) -> None:
        pipe.delete_adapters("a")
        pipe.load_lora_weights(file, adapter_name="a")

    return timed(lambda: change(args.second), lambda: change(args.file), args.repeat)


CASES = {"load": load, "set_adapters": set_adapters, "rank": rank}


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--side", choices=("ours", "stock"), required=True)
    parser.add_argument("--size", choices=("sd15", "sdxl", "flux"), required=True)
    parser.add_argument("--file", required=True)
    parser.add_argument("--second")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    if args.side == "ours":
        import lora_adapters  # noqa: F401
    pipe = pipeline(args.size)
    times, memory = CASES[args.case](pipe, args)
    assert ("lora_adapters" in sys.modules) == (args.side == "ours")
    cpu, wall = (statistics.median(column) for column in zip(*times, strict=True))
    print(json.dumps({"seconds": cpu, "wall": wall, "MiB": memory}))


if __name__ == "__main__":
    main()
