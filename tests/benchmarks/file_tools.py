#!/usr/bin/env python3
"""Measures time and memory of the file tools at full size, as whole processes, optionally next to kohya's scripts.

usage: file_tools.py [--folder DIR] [--only WORD ...] [--results FILE.json] [--markdown FILE.md]
                     [--missing] [--kohya CHECKOUT --kohya_python PYTHON] [--check]

Creates complete checkpoints and adapters with random weights and the shapes of SD1.5, SDXL and Flux.1 in the folder,
runs each tool on them, and prints wall time, CPU time (low if a tool waits for the disk), peak resident memory, and the
peak of anonymous memory (not mapped files), sampled every 20 ms from /proc (Linux only). Flux.1's files need 75 GB, and
are only created if --only contains the word flux. --check compares the error of extraction with the optimum, computed
from all singular values of every module. --results stores the numbers, so that later calls can measure other cases
(with --missing, those without numbers), and --markdown writes all of them.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from lora_adapters.convert import Adapter  # noqa: E402
from lora_adapters.convert.storage.checkpoint import Checkpoint  # noqa: E402
from tests.benchmarks.full_size import SIZES, make_adapter, make_checkpoint, make_lycoris  # noqa: E402

KINDS = ("lora", "loha", "lokr", "dora", "full")  # with equally many modules; kohya's scripts can merge only the first


class Case(NamedTuple):
    """One measurement: a script and its options, and for extraction the two models with the true difference."""

    name: str
    script: str
    options: list[str]
    out: Path
    truth: tuple[Path, Path] | None = None


def measure(command: list[str], most: float, path: str | None = None) -> dict[str, Any]:
    """Wall and CPU time (s), peak resident and anonymous memory (MB), and the exit status of a process."""
    start, before = time.perf_counter(), _cpu_of_children()
    environment = os.environ if path is None else {**os.environ, "PYTHONPATH": path}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=path and path.split(":")[0],
        env=environment,
    )  # fmt: skip
    anonymous = peak = 0
    seconds = 0.0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            lines = (line.split() for line in status.splitlines() if line.startswith(("RssAnon", "VmHWM")))
            sizes = {words[0]: int(words[1]) for words in lines}
            anonymous, peak = max(anonymous, sizes.get("RssAnon:", 0)), max(peak, sizes.get("VmHWM:", 0))
        except (OSError, IndexError, ValueError):
            pass
        seconds = time.perf_counter() - start
        if seconds > most:
            process.kill()
            break
        time.sleep(0.02)
    seconds = time.perf_counter() - start
    said = (process.communicate()[0] or "").strip().splitlines()
    return {
        "seconds": round(seconds, 2),
        "cpu": round(_cpu_of_children() - before, 2),
        "anonymous": anonymous // 1024,
        "peak": peak // 1024,
        "status": "stopped" if seconds > most else process.returncode,
        "said": next((line for line in said if line.startswith("relative error")), said[-1] if said else ""),
    }


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def excess(out: Path, truth: tuple[Path, Path]) -> dict[str, float]:
    """By how many percent the error of an extracted adapter exceeds the optimum for its rank.

    The optimum is the norm of the omitted singular values, computed from the Gram matrix in float64.
    """
    adapter, base, tuned = Adapter.load(out), *map(Checkpoint.open, truth)
    ours, theirs = base.modules, tuned.modules
    above, left, whole = [], 0.0, 0.0
    for module, one in adapter.modules.items():
        delta = tuned.weight(module, theirs[module]).double() - base.weight(module, ours[module]).double()
        matrix = delta.flatten(1)
        gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
        best = float(torch.linalg.eigvalsh(gram)[: -one.rank or None].clamp_min(0).sum())
        up, down = one.matrices(torch.float64)
        missing = float((matrix - one.scale * up @ down).square().sum())
        if best > 1e-12 * float(matrix.square().sum()):
            above.append(100 * ((missing / best) ** 0.5 - 1))
        left, whole = left + missing, whole + float(matrix.square().sum())
    return {"least": round(min(above), 3), "most": round(max(above), 3), "error": round((left / whole) ** 0.5, 4)}


def cases(folder: Path, size: str) -> Iterator[Case]:
    """The measurements of one size; their names begin with the size."""
    out = folder / "out.safetensors"
    a, b = (folder / f"{size}-{name}.safetensors" for name in "ab")
    base, tuned = folder / f"{size}.safetensors", folder / f"{size}-tuned.safetensors"
    to, pair = ["--save_to", str(out)], ["--models", str(a), str(b), "--ratios", "0.6", "0.4"]

    def many(count: int) -> list[str]:
        return ["--models", *[str(a)] * count, "--ratios", *["0.1"] * count]

    into = ["--sd_model", str(base), *to, "--save_precision", "fp16"]
    models = ["--model_org", str(base), "--model_tuned", str(tuned), *to]
    if size == "flux":
        yield Case("flux merge 2 into the model", "merge_lora", ["--sd_model", str(base), *to, *pair], out)
        yield Case("flux extract dim 32", "extract_lora_from_models", [*models, "--dim", "32"], out, (base, tuned))
        return
    yield Case(f"{size} svd-merge 32 + 16 to 32", "svd_merge_lora", [*to, "--new_rank", "32", *pair], out)
    yield Case(f"{size} merge 2 into the model", "merge_lora", [*into, *pair], out)
    for kind in KINDS:
        lycoris = ["--models", str(folder / f"{size}-{kind}.safetensors")]
        yield Case(f"{size} merge a {kind} of all layers into the model", "merge_lora", [*into, *lycoris], out)
    extracting = "extract_lora_from_models"
    yield Case(f"{size} extract dim 32", extracting, [*models, "--dim", "32"], out, (base, tuned))
    wide = [*models, "--dim", "128", "--conv_dim", "64"]
    yield Case(f"{size} extract dim 128 conv_dim 64", extracting, wide, out, (base, tuned))
    for count in (1, 2, 4, 8, 16):
        yield Case(f"{size} curve: svd-merge {count}", "svd_merge_lora", [*to, "--new_rank", "32", *many(count)], out)
        yield Case(f"{size} curve: merge {count} into the model", "merge_lora", [*into, *many(count)], out)
    wider = ["--sd_model", str(folder / f"{size}-float.safetensors"), *to, *many(1)]
    yield Case(f"{size} curve: merge 1 into the model in float32", "merge_lora", wider, out)


def sizes(words: list[str] | None) -> tuple[str, ...]:
    """The sizes to measure for these words of --only; Flux.1, which is very large, only if it is named."""
    return SIZES if words and "flux" in words else tuple(size for size in SIZES if size != "flux")


def make_inputs(folder: Path, size: str, options: list[str]) -> None:
    """Create the input files of a measurement, if they do not exist yet."""
    make_adapter(folder / f"{size}-a.safetensors", size, 32, None, 1)
    make_adapter(folder / f"{size}-b.safetensors", size, 16, None, 2)
    if size != "flux":
        make_adapter(folder / f"{size}-lora.safetensors", size, 16, 16, 3)
        for kind in KINDS[1:]:
            if str(path := folder / f"{size}-{kind}.safetensors") in options:
                make_lycoris(path, size, kind, 3)
    half = torch.bfloat16 if size == "flux" else torch.float16
    for name, tuned, dtype in (
        ("", False, half),
        ("-tuned", True, half),
        ("-float", False, torch.float32),
    ):
        path = folder / f"{size}{name}.safetensors"
        if str(path) in options:
            make_checkpoint(path, size, tuned, dtype)


def kohyas(case: Case, python: str, checkout: Path) -> list[str]:
    """The command line of kohya's script for the same case."""
    script, options = case.script, list(case.options)
    if case.name.startswith("sdxl") and script == "merge_lora":
        script = "sdxl_merge_lora"
    if case.name.startswith("sdxl") and script == "extract_lora_from_models":
        options.append("--sdxl")
    return [python, str(checkout / "networks" / f"{script}.py"), *options]


def _cells(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return [""] * 5
    if found["status"] not in (0, "stopped"):
        return ["fails", *[""] * 4]
    stopped = found["status"] == "stopped"
    above = found.get("excess")
    shown = "" if above is None else f"{above['least']:.2f} to {above['most']:.2f} %"
    took = f"{'over ' if stopped else ''}{found['seconds']:.1f} s"
    return [
        took,
        f"{found['cpu']:.1f} s" if "cpu" in found else "",
        f"{found['anonymous']} MB",
        f"{found['peak']} MB",
        shown,
    ]


def markdown(results: dict[str, Any]) -> str:
    """The results as tables: cases, curves and kinds."""
    lines = [
        "| what | time | CPU | anonymous | resident | error above the optimum |",
        "|---|---|---|---|---|---|",
    ]
    kinds = {f"{size} merge a {kind} of all layers into the model": size for size in SIZES for kind in KINDS}
    for name, row in results.items():
        if "curve" not in name and name not in kinds:
            lines.append(f"| {name} | {' | '.join(_cells(row.get('ours')))} |")
            if "kohya" in row:
                lines.append(f"| ... with kohya's script | {' | '.join(_cells(row['kohya']))} |")
    lines += ["", "| curve | time | CPU | anonymous | resident |", "|---|---|---|---|---|"]
    for name, row in results.items():
        if "curve" in name:
            lines.append(f"| {name.replace('curve: ', '')} | {' | '.join(_cells(row.get('ours'))[:4])} |")
    lines += ["", "| kind | time | CPU | anonymous | resident | of the LoRA's CPU |", "|---|---|---|---|---|---|"]
    for name, size in kinds.items():
        row, lora = (
            results.get(one, {}).get("ours", {}) for one in (name, f"{size} merge a lora of all layers into the model")
        )
        if row:
            ratio = f"{row['cpu'] / lora['cpu']:.2f}" if lora.get("cpu") and "cpu" in row else ""
            lines.append(f"| {name} | {' | '.join(_cells(row)[:4])} | {ratio} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to make the files, and keep them (default: a temporary one)")
    parser.add_argument("--only", nargs="*", help="only what has all of these words in its name")
    parser.add_argument("--missing", action="store_true", help="only what has no numbers in --results yet")
    parser.add_argument("--make", action="store_true", help="only make the files that the measurements read")
    parser.add_argument("--check", action="store_true", help="compare errors of extraction with the optimum (minutes)")
    parser.add_argument("--results", type=Path, help="JSON file to add the numbers to")
    parser.add_argument("--markdown", type=Path, help="write all numbers of --results as tables")
    parser.add_argument("--kohya", type=Path, help="a checkout of sd-scripts to measure in the same run")
    parser.add_argument("--kohya_python", default=sys.executable)
    parser.add_argument("--kohya_only", action="store_true", help="measure kohya's scripts only")
    parser.add_argument("--most", type=float, default=3600, help="seconds after which a process is stopped")
    args = parser.parse_args()
    results = json.loads(args.results.read_text()) if args.results and args.results.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for case in (case for size in sizes(args.only) for case in cases(folder, size)):
            if args.only is not None and not all(word in case.name.split() for word in args.only):
                continue
            commands = {"ours": ([sys.executable, str(ROOT / "convert" / f"{case.script}.py"), *case.options], None)}
            if (
                args.kohya and "curve" not in case.name and "of all layers" not in case.name
            ):  # with several adapters its svd-merge takes many minutes
                path = os.pathsep.join([str(args.kohya), os.environ.get("PYTHONPATH", "")])
                commands["kohya"] = (kohyas(case, args.kohya_python, args.kohya), path)
            if args.missing and commands.keys() <= results.get(case.name, {}).keys():
                continue
            make_inputs(folder, case.name.split()[0], case.options)
            for who, (command, path) in {} if args.make else commands.items():
                if (who == "ours" and args.kohya_only) or (args.missing and who in results.get(case.name, {})):
                    continue
                case.out.unlink(missing_ok=True)
                found = measure(command, args.most, path)
                if args.check and case.truth and found["status"] == 0:
                    found["excess"] = excess(case.out, case.truth)
                print(case.name, who, found, flush=True)
                results.setdefault(case.name, {})[who] = found
                if args.results:
                    args.results.write_text(json.dumps(results, indent=1))
    if args.markdown:
        args.markdown.write_text(markdown(results))


if __name__ == "__main__":
    main()
