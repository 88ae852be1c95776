#!/usr/bin/env python
"""Make smaller copies of training images: each image is copied unchanged, and resized to the area of each resolution.

    python train/resize_images_to_resolution.py --max_resolution 512x512,384x384 --copy_associated_files photos smaller

For photos/cat.JPG this writes smaller/cat.JPG (an unchanged copy), smaller/cat+512x512.jpg and smaller/cat+384x384.jpg.
The name contains the requested resolution; the image keeps its aspect ratio and has the area of that resolution.
Nothing is enlarged: an image with a smaller area is saved at its own size. Every copy is made from the original, with
EXIF orientation applied. JPEG is saved at quality 100 without chroma subsampling and with transparent parts on white;
PNG keeps transparency. Only the first frame of animations is used. Other files are copied unchanged; hidden files and
subfolders are ignored. A second run only writes files that are missing, damaged, older than their source, or made with
other settings.
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
    """The result of a run: numbers of files; `unreadable` and `too_small` are (image, reason)."""

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
    """Save the images of `src` in `dst`, unchanged and resized to the area of each resolution.

    Args:
        src: The folder of images.
        dst: The output folder, created if needed.
        resolutions: (width, height) pairs in pixels. They decide the area and the file name, not the aspect ratio.
        divisible_by: Centre-crop the resized images so that both sides are multiples of this number.
        interpolation: A name in `interpolation.RESIZING`.
        save_as_png: Save PNG with transparency instead of JPEG.
        copy_associated_files: Also copy files with the original's stem, such as captions, for each resized image.
        workers: The number of processes; None is one per core. In a script, more than one needs
            `if __name__ == "__main__":`.
        progress: Show a progress bar if the output is a terminal.

    Returns:
        The numbers of files, and the images that were skipped.

    Raises:
        ResizeError: An argument is invalid, the folder has no images, two files would get the same name, or no image
            can be read.
        OSError: A file cannot be copied.
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
    # disable=None shows the bar only on a terminal.
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
    """Run the jobs in this process or in several, and yield the outcomes in the order of the jobs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(workers or cores, len(jobs), 61)  # the maximum on Windows
    if count == 1:
        yield from map(work, jobs)
        return
    # Spawn on every system; only the parent process handles Ctrl-C.
    with ProcessPoolExecutor(count, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        try:
            yield from pool.map(work, jobs)
        except BrokenProcessPool as error:
            message = "a worker process could not start, or died: if it ran out of memory, try --workers 1"
            raise ResizeError(message) from error


def program(argv: Sequence[str] | None) -> None:
    """Parse the options and resize the images."""
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
    """Run the program; returns its exit status, which is 0 even if some images were skipped."""
    return run(program, argv, stopped="stopped; the same command continues from here", traceback=True)


if __name__ == "__main__":
    sys.exit(main())
