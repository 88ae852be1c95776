#!/usr/bin/env python3
"""Measures the CPU seconds of `lora-adapters COMMAND --help` for every command, and prints a markdown table.

usage: help_times.py [--rounds N] [--most SECONDS]

Each command runs in a separate process; the table has the median of the rounds. With --most the exit status is 1 if a
command takes longer.
"""

import argparse
import resource
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from lora_adapters.cli import PROGRAMS


def cpu_seconds(command: str) -> float:
    """User and system time of a command's --help."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = [sys.executable, "-m", "lora_adapters", command, "--help"]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    """Measure all commands and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--most", type=float, help="CPU seconds that a command may take")
    args = parser.parse_args()
    times = {command: statistics.median(cpu_seconds(command) for _ in range(args.rounds)) for command in PROGRAMS}
    print("| command | CPU seconds of --help |\n|---|---|")
    for command, seconds in times.items():
        print(f"| `{command}` | {seconds:.2f} |")
    slow = [command for command, seconds in times.items() if args.most is not None and seconds > args.most]
    if slow:
        print(f"above {args.most:g} s: {', '.join(slow)}")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
