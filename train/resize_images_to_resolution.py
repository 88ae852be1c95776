#!/usr/bin/env python
"""Make smaller copies of training images: each image of a folder unchanged, and at the area of each resolution.

    python train/resize_images_to_resolution.py --max_resolution 512x512,384x384 --copy_associated_files photos smaller

For photos/cat.JPG this writes smaller/cat.JPG (an unchanged copy), smaller/cat+512x512.jpg and smaller/cat+384x384.jpg.
The name contains the requested resolution; the image keeps its aspect ratio and has the area of that resolution.
Nothing is enlarged: an image with a smaller area is saved at its own size. Every copy is made from the original,
upright. JPEG is saved at quality 100 with full colour resolution and transparent parts on white; PNG keeps
transparency. Only the first of several frames is used. Other files are copied unchanged; hidden files and subfolders
are ignored. A second run only writes files that are missing, damaged, older than their source, or made with other
settings.
"""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

if __name__ == "__main__" and not __package__:  # run as a file: take this checkout's lora_adapters
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lora_adapters.convert.terminal import is_quiet, say
from lora_adapters.convert.tools.command_line import run
from lora_adapters.train.interpolation import RESIZING
from lora_adapters.train.resizing.options import DEFAULT_RESOLUTIONS, parse
from lora_adapters.train.resizing.plan import Job, ResizeError, ResizeOptionError, plan
from lora_adapters.train.resizing.process import Outcome, copy_if_older, process
from lora_adapters.train.resizing.resize import Size


@dataclass(frozen=True)
class Summary:
    """What a run did. Counts are of files; `unreadable` and `too_small` are (image, reason)."""

    images: int
    resized: int
    kept: int
    copied: int
    unreadable: tuple[tuple[Path, str], ...]
    too_small: tuple[tuple[Path, str], ...]
    folders: int

    @property
    def pictures(self) -> int:
        """Deprecated: use `images`."""
        return self.images

    def __str__(self) -> str:
        always = {"images": self.images, "resized": self.resized, "already there": self.kept, "copied": self.copied}
        unusual = {
            "images skipped": len(self.unreadable),
            "sizes left out": len(self.too_small),
            "subfolders left alone": self.folders,
        }
        counts = always | {name: count for name, count in unusual.items() if count}
        return ", ".join(f"{name}: {count}" for name, count in counts.items())


def resize_images(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    resolutions: Sequence[Size] = DEFAULT_RESOLUTIONS,
    *,
    divisible_by: int = 1,
    interpolation: str = "area",
    save_as_png: bool = False,
    copy_associated_files: bool = False,
    workers: int | None = None,
    progress: bool = False,
) -> Summary:
    """Save the images of `src` in `dst`, as they are and at the area of each resolution.

    Args:
        src: the folder of images.
        dst: the folder to write to, made if needed.
        resolutions: (width, height) pairs in pixels; only width · height and the name depend on them.
        divisible_by: crop the resized images from the centre, so that it divides both sides.
        interpolation: a name in `interpolation.RESIZING`.
        save_as_png: PNG with transparency, instead of JPEG.
        copy_associated_files: give each resized image a copy of the files that share the original's stem (captions).
        workers: processes; None for one per core. From a script, more than one needs `if __name__ == "__main__":`.
        progress: show a progress bar on a terminal.

    Returns:
        What was done.

    Raises:
        ResizeError: for a bad argument, a folder without images, two files with one target, or if no image can be read.
        OSError: if a file cannot be copied.
    """
    src, dst = Path(src), Path(dst)
    if interpolation not in RESIZING:
        raise ResizeOptionError(f"interpolation {interpolation!r}: choose one of {', '.join(RESIZING)}")
    for name, number in (("divisible_by", divisible_by), ("workers", 1 if workers is None else workers)):
        if number < 1:
            raise ResizeOptionError(f"{name} {number}: give 1 or more")
    suffix = ".png" if save_as_png else ".jpg"
    jobs, copies, folders = plan(src, dst, resolutions, suffix, copy_associated_files)
    work = partial(process, divisible_by=divisible_by, interpolation=interpolation)
    # disable=None shows the bar on a terminal only.
    bar = tqdm(_run(work, jobs, workers), "resize", len(jobs), unit="image", disable=None if progress else True)
    outcomes = list(bar)
    sources = [job.original.source for job in jobs]
    unreadable = tuple((file, done.unreadable) for file, done in zip(sources, outcomes, strict=True) if done.unreadable)
    if len(unreadable) == len(jobs):
        file, reason = unreadable[0]
        raise ResizeError(f"{src}: none of its {len(jobs)} images can be read; the first, {file.name}: {reason}")
    return Summary(
        images=len(jobs),
        resized=sum(done.resized for done in outcomes),
        kept=sum(done.kept for done in outcomes),
        copied=sum(done.copied for done in outcomes) + sum(copy_if_older(copy) for copy in copies),
        unreadable=unreadable,
        too_small=tuple((f, why) for f, done in zip(sources, outcomes, strict=True) for why in done.too_small),
        folders=folders,
    )


def _run(work: partial[Outcome], jobs: Sequence[Job], workers: int | None) -> Iterator[Outcome]:
    """The outcomes in the order of the jobs, from this process or from several."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(workers or cores, len(jobs), 61)  # Windows cannot wait for more than 61 processes
    if count == 1:
        yield from map(work, jobs)
        return
    # Spawned on every system alike; Ctrl-C is left to the parent.
    with ProcessPoolExecutor(count, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        try:
            yield from pool.map(work, jobs)
        except BrokenProcessPool as error:
            message = "a worker process could not start, or died: if memory is short, try --workers 1"
            raise ResizeError(message) from error


def program(argv: Sequence[str] | None) -> None:
    """The program's body."""
    src, dst, settings = parse(argv)
    options = dict(vars(settings))
    resolutions = options.pop("max_resolution") or DEFAULT_RESOLUTIONS
    summary = resize_images(src, dst, resolutions, progress=not is_quiet(), **options)
    for file, reason in summary.unreadable:
        print(f"warning: skipped {file}: {reason}", file=sys.stderr)
    for file, reason in summary.too_small:
        print(f"warning: left out a size of {file}: {reason}", file=sys.stderr)
    say(summary)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status, which is 0 even if some images had to be skipped."""
    return run(program, argv, stopped="stopped; the same command continues from here", traceback=True)


if __name__ == "__main__":
    sys.exit(main())
