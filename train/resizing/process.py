"""Writes all files for one source image, each atomically, so that an interrupted run leaves no partial files."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lora_adapters.convert.storage.atomic import replacing
from lora_adapters.train.resizing.plan import Copy, Job, ResizeError
from lora_adapters.train.resizing.resize import (
    UnreadableImage,
    centre_crop,
    divisible_size,
    fitted_size,
    on_white,
    read_image,
    resize,
)


@dataclass(frozen=True)
class Outcome:
    """The result for one image: numbers of files resized, kept and copied; `unreadable` and `too_small` are reasons."""

    resized: int = 0
    kept: int = 0
    copied: int = 0
    unreadable: str | None = None
    too_small: tuple[str, ...] = ()


def process(job: Job, divisible_by: int, interpolation: str) -> Outcome:
    """Write the missing and outdated files of `job`. OSError or ResizeError if a file cannot be written."""
    note = f"resized with interpolation={interpolation} divisible_by={divisible_by}"
    source = job.original.source
    missing = [version for version in job.versions if not _is_done(version.target, source, note)]
    done = [version for version in job.versions if version not in missing]
    too_small = []
    if missing:
        try:
            image = read_image(source)
        except UnreadableImage as error:
            return Outcome(unreadable=str(error))
        flat = on_white(image) if any(version.target.suffix == ".jpg" for version in missing) else image
        for version in missing:
            fitted = fitted_size(image.size, version.resolution)
            cropped = divisible_size(fitted, divisible_by)
            if 0 in cropped:
                size, asked = ("x".join(map(str, pair)) for pair in (fitted, version.resolution))
                too_small.append(f"{size} at {asked} is less than divisible_by {divisible_by}")
                continue
            base = flat if version.target.suffix == ".jpg" else image
            _save(centre_crop(resize(base, fitted, interpolation), cropped), version.target, note, source)
            done.append(version)
    copies = [job.original, *(copy for version in done for copy in version.associated)]
    copied = sum(copy_if_older(copy) for copy in copies)
    kept = len(job.versions) - len(missing)
    return Outcome(resized=len(done) - kept, kept=kept, copied=copied, too_small=tuple(too_small))


def copy_if_older(copy: Copy) -> bool:
    """Copy a file unless the target is at least as new as the source, so that later edits are kept. True if copied."""
    if copy.target.exists() and copy.target.stat().st_mtime_ns >= copy.source.stat().st_mtime_ns:
        return False
    with replacing(copy.target) as temporary:
        shutil.copy2(copy.source, temporary)
    return True


def _is_done(target: Path, source: Path, note: str) -> bool:
    try:
        if target.stat().st_mtime_ns < source.stat().st_mtime_ns:
            return False
        with Image.open(target) as image:
            image.load()
            comment = image.info.get("comment") or image.info.get("Comment")
    except Exception:  # any error means that the file must be written again
        return False
    return comment in (note, note.encode())


def _save(image: Image.Image, target: Path, note: str, source: Path) -> None:
    profile = image.info.get("icc_profile")
    try:
        with replacing(target) as temporary:
            if target.suffix == ".png":
                text = PngInfo()
                text.add_text("Comment", note)
                image.save(temporary, "PNG", pnginfo=text, icc_profile=profile)
            else:
                # Without subsampling=0 Pillow halves the colour resolution, even at quality 100.
                image.save(temporary, "JPEG", quality=100, subsampling=0, comment=note, icc_profile=profile)
            # The source's date may be in the future if a camera's clock is wrong.
            newest = max(temporary.stat().st_mtime_ns, source.stat().st_mtime_ns)
            os.utime(temporary, ns=(newest, newest))
    except OSError as error:
        raise ResizeError(f"{target} cannot be written: {error.strerror or error}") from error
