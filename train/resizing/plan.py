"""Plans which files to write for a folder of images, and checks for name clashes before anything is written."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_adapters.convert.errors import OneLineError, UsageError
from lora_adapters.train.data.image_suffixes import READ
from lora_adapters.train.resizing.resize import Size

# A latent cache is valid only for the original image, not for resized ones.
NOT_ASSOCIATED = {".npz"}


class ResizeError(OneLineError):
    """The request cannot be carried out. The message says what is wrong, where, and what to do."""


class ResizeOptionError(ResizeError, UsageError):
    """An option is invalid, independently of the folders' content. The program exits with status 2."""


@dataclass(frozen=True)
class Copy:
    """A file to copy unchanged."""

    source: Path
    target: Path


@dataclass(frozen=True)
class Version:
    """A resized image, and the associated files (captions) that are copied under its name."""

    resolution: Size
    target: Path  # the suffix, .png or .jpg, decides the format
    associated: tuple[Copy, ...] = ()


@dataclass(frozen=True)
class Job:
    """The files to write for one image."""

    original: Copy
    versions: tuple[Version, ...]


def plan(
    src: Path, dst: Path, resolutions: Sequence[Size], suffix: str, copy_associated: bool
) -> tuple[list[Job], list[Copy], int]:
    """Plan the resized images and the copies of other files.

    Args:
        src: The folder with the original images.
        dst: The folder for the new images.
        resolutions: (width, height) pairs in pixels, whose areas limit the sizes.
        suffix: ".png" or ".jpg", the format of the resized images.
        copy_associated: Copy captions and other files of the same name for each resized image.

    Returns:
        A job for each image, the other files to copy, and the number of subfolders, which are not entered.

    Raises:
        ResizeError: A folder is missing, has no images, or two files would get the same name.
        ResizeOptionError: A resolution is not positive.
    """
    if not resolutions or any(side < 1 for pair in resolutions for side in pair):
        raise ResizeOptionError(f"resolutions {list(resolutions)}: give pairs of 1 or more")
    if not src.is_dir():
        raise ResizeError(f"{src} is not a folder" if src.exists() else f"{src} does not exist")
    if dst.exists() and not dst.is_dir():
        raise ResizeError(f"{dst} is not a folder")
    if dst.exists() and src.samefile(dst):
        raise ResizeError(f"{src} is both source and destination: give another folder for the smaller images")
    entries = sorted(entry for entry in src.iterdir() if not entry.name.startswith("."))
    files = [entry for entry in entries if not entry.is_dir()]
    images = [file for file in files if file.suffix.lower() in READ]
    others = [file for file in files if file.suffix.lower() not in READ]
    if not images:
        raise ResizeError(f"{src} has no images ({' '.join(sorted(READ))})")
    by_stem: dict[str, list[Path]] = {}
    for file in others:
        if copy_associated and file.suffix.lower() not in NOT_ASSOCIATED:
            by_stem.setdefault(file.stem, []).append(file)

    def version(image: Path, resolution: Size) -> Version:
        stem = f"{image.stem}+{resolution[0]}x{resolution[1]}"
        associated = (Copy(file, dst / (stem + file.suffix)) for file in by_stem.get(image.stem, []))
        return Version(resolution, dst / (stem + suffix), tuple(associated))

    jobs = [
        Job(Copy(image, dst / image.name), tuple(version(image, pair) for pair in dict.fromkeys(resolutions)))
        for image in images
    ]
    copies = [Copy(file, dst / file.name) for file in others]
    _refuse_shared_targets(jobs, copies)
    return jobs, copies, len(entries) - len(files)


def _refuse_shared_targets(jobs: Sequence[Job], copies: Sequence[Copy]) -> None:
    targets = [(copy.source, copy.target) for copy in (*copies, *(job.original for job in jobs))]
    for job in jobs:
        for version in job.versions:
            targets.append((job.original.source, version.target))
            targets.extend((copy.source, copy.target) for copy in version.associated)
    seen: dict[str, Path] = {}
    for source, target in targets:
        other = seen.setdefault(os.path.normcase(target), source)
        if other != source:
            raise ResizeError(f"{other} and {source.name} would both become {target}: rename one of them")
