"""Fills the caches: encodes each image with the VAE and each caption with the text encoders, once."""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from tqdm import tqdm

from lora_adapters.convert.terminal import is_quiet
from lora_adapters.train.data.buckets import Size
from lora_adapters.train.data.cache_files import (
    TEXT_ENDING,
    CachedLatents,
    LatentFiles,
    LatentsRequest,
    read_text,
    text_fits,
    vae_identity,
    write_latents,
    write_text,
)
from lora_adapters.train.data.captions import Moment, draw_caption
from lora_adapters.train.data.config import VAE_FACTOR
from lora_adapters.train.data.image_set import ImageSet, TrainingImage
from lora_adapters.train.data.loader import load_pixels
from lora_adapters.train.data.transforms import centred
from lora_adapters.train.data_error import DataError
from lora_adapters.train.seeding import normal_noise, python_random

logger = logging.getLogger(__name__)
NAMES_SHOWN = 5


def encode_latents(
    images: ImageSet,
    vae: Any,
    seed: int,
    to_disk: bool,
    batch_size: int,
    device: torch.device | str,
    files: LatentFiles,
    check: bool,
    rank: int,
    world_size: int,
) -> list[CachedLatents | str | DataError]:
    """Encode all images into latents; see TrainingData.cache_latents.

    Args:
        images: The images.
        vae: The VAE, on `device`.
        seed: The seed of the run.
        to_disk: Whether to store latents in files; otherwise they are kept in memory.
        batch_size: The number of images that are encoded together.
        device: The device of the VAE.
        files: The names and content of the files.
        check: Whether to check that existing files are from this image and this VAE.
        rank: The number of this process.
        world_size: The number of processes.

    Returns:
        For each image its latents, the path of their file, or the error if it cannot be encoded.

    Raises:
        DataError: The VAE is not supported.
    """
    identity = _identity(vae)
    requests = [_latents_request(image, identity) for image in images.images]
    cached: list[CachedLatents | str | DataError | None] = [None] * len(requests)
    paths = _existing(images.images, requests, files, check, cached) if to_disk else []
    numbers = [number for number, result in enumerate(cached) if result is None]
    if to_disk:
        numbers = _share(numbers, paths, [request.bucket for request in requests], rank, world_size)
    missing: dict[Size, list[int]] = defaultdict(list)
    for number in numbers:
        missing[requests[number].bucket].append(number)
    bar = tqdm(total=sum(map(len, missing.values())), desc="caching latents", disable=is_quiet() or rank != 0)
    for numbers in missing.values():
        for chunk in _chunks(numbers, batch_size):
            made = _encode(vae, [images.images[number] for number in chunk], seed, device)
            if files.normalised:
                made = [_normalised(vae, entry) for entry in made]
            for number, latents in zip(chunk, made, strict=True):
                if isinstance(latents, DataError):
                    cached[number] = latents
                elif to_disk:
                    write_latents(paths[number], latents, requests[number], keep_all=not check)
                else:
                    cached[number] = latents
            bar.update(len(chunk))
    bar.close()
    _warn_of_damaged([str(result) for result in cached if isinstance(result, DataError)])
    return [result if result is not None else paths[number] for number, result in enumerate(cached)]


def _identity(vae: Any) -> str:
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if factor != VAE_FACTOR:
        raise DataError(f"the VAE has a scale factor of {factor}; only {VAE_FACTOR} is supported")
    return vae_identity(vae)


def _existing(
    images: Sequence[TrainingImage],
    requests: Sequence[LatentsRequest],
    files: LatentFiles,
    check: bool,
    cached: list[CachedLatents | str | DataError | None],
) -> list[str]:
    """The path of each image's file; usable existing files are put into `cached`."""
    stems = _stems(images)
    paths = [files.path(stem, request.size) for stem, request in zip(stems, requests, strict=True)]
    _one_use_each([(path, request.bucket) for path, request in zip(paths, requests, strict=True)], requests)
    for number, request in enumerate(requests):
        cached[number] = files.existing(stems[number], request, check=check)
    return paths


def _share(
    numbers: Iterable[int], paths: Sequence[str], buckets: Sequence[Size], rank: int, world_size: int
) -> list[int]:
    """The images that this process encodes: each entry of a file once, and each file by only one process.

    Images are assigned by number, not by which files are missing, since another process may have started to write.
    """
    owner: dict[str, int] = {}
    for number, path in enumerate(paths):
        owner.setdefault(path, number % world_size)
    entries = {(paths[number], buckets[number]): number for number in numbers if owner[paths[number]] == rank}
    return list(entries.values())


def encode_text(
    images: ImageSet,
    encode: Callable[[list[str]], dict[str, torch.Tensor]],
    to_disk: bool,
    batch_size: int,
    encoder: str,
    check: bool,
    rank: int,
    world_size: int,
    ending: str = TEXT_ENDING,
) -> list[dict[str, torch.Tensor] | str]:
    """Encode the captions of all images; see TrainingData.cache_text.

    Args:
        images: The images.
        encode: Returns the text-encoder outputs of captions; the first dimension of each is the caption.
        to_disk: Store outputs in files next to the images and reuse existing files, instead of keeping them in memory.
        batch_size: The number of captions that are encoded together.
        encoder: The identity of the text encoders, stored in the files.
        check: Whether to check that existing files are from this caption and these text encoders.
        rank: The number of this process; with `to_disk` each process encodes a part.
        world_size: The number of processes.
        ending: The end of the files' names.

    Returns:
        For each image the outputs, or the path of their file.

    Raises:
        DataError: Two images with different captions would use the same file.
    """
    captions = [draw_caption(image.origin.caption, image.subset, python_random(0), Moment()) for image in images.images]
    if not to_disk:
        distinct = sorted(set(captions))
        outputs = dict(zip(distinct, _encode_captions(distinct, encode, batch_size, rank), strict=True))
        return [outputs[caption] for caption in captions]
    paths = [stem + ending for stem in _stems(images.images)]
    _one_use_each([(path,) for path in paths], captions)
    with torch.no_grad():
        like = {name: value[0] for name, value in encode([""]).items()}
    missing = []
    for number in range(rank, len(paths), world_size):
        path, caption = paths[number], captions[number]
        if not (text_fits(path, caption, encoder, like) if check else _readable(path)):
            missing.append(number)
    made = _encode_captions([captions[number] for number in missing], encode, batch_size, rank)
    for number, output in zip(missing, made, strict=True):
        write_text(paths[number], output, captions[number], encoder)
    return list(paths)


def _latents_request(image: TrainingImage, identity: str) -> LatentsRequest:
    origin, subset = image.origin, image.subset
    return LatentsRequest(
        size=origin.size,
        bucket=image.placement.bucket,
        flip=subset.flip_aug,
        alpha_mask=subset.alpha_mask,
        vae=identity,
        modified=origin.source.modified(),
        length=origin.source.length(),
        interpolation=subset.resize_interpolation or "",
    )


def _stems(images: Sequence[TrainingImage]) -> list[str]:
    stems = []
    for image in images:
        if image.origin.cache_stem is None:
            raise DataError(f"{image.subset.name}: caches on disk need a folder: give cache_dir in its subset")
        stems.append(image.origin.cache_stem)
    return stems


def _one_use_each(entries: Sequence[tuple[Any, ...]], uses: Sequence[Any]) -> None:
    """Raise DataError if two images need the same cache entry (path, ...) for different content."""
    first: dict[tuple[Any, ...], Any] = {}
    for entry, use in zip(entries, uses, strict=True):
        if first.setdefault(entry, use) != use:
            raise DataError(
                f"{entry[0]} would hold two different caches (the same image in two subsets, or two images whose "
                "names differ only in the suffix): cache in memory instead of on disk, or separate them"
            )


def _warn_of_damaged(reasons: list[str]) -> None:
    if reasons:
        names = "; ".join(reasons[:NAMES_SHOWN]) + ("; ..." if len(reasons) > NAMES_SHOWN else "")
        logger.warning("%d images cannot be used and are replaced by others: %s", len(reasons), names)


def _encode(
    vae: Any, images: list[TrainingImage], seed: int, device: torch.device | str
) -> list[CachedLatents | DataError]:
    """The latents of each image, or the error of a damaged image; the others of the batch are still encoded."""
    loaded: list[tuple[torch.Tensor, torch.Tensor | None] | DataError] = []
    for image in images:
        try:
            loaded.append(load_pixels(image, centred(image.placement)))
        except DataError as error:
            loaded.append(error)
    whole = [part for part in loaded if not isinstance(part, DataError)]
    kept = [image for image, part in zip(images, loaded, strict=True) if not isinstance(part, DataError)]
    made = iter(_encode_whole(vae, kept, whole, seed, device) if whole else [])
    return [part if isinstance(part, DataError) else next(made) for part in loaded]


def _encode_whole(
    vae: Any,
    images: list[TrainingImage],
    loaded: list[tuple[torch.Tensor, torch.Tensor | None]],
    seed: int,
    device: torch.device | str,
) -> list[CachedLatents]:
    pixels = torch.stack([part for part, _ in loaded])
    plain = _sample_latents(vae, pixels, images, seed, device, "plain")
    flipped: list[torch.Tensor | None] = [None] * len(images)
    if any(image.subset.flip_aug for image in images):
        mirrored = _sample_latents(vae, pixels.flip(-1), images, seed, device, "flipped")
        flipped = [latents if image.subset.flip_aug else None for latents, image in zip(mirrored, images, strict=True)]
    masks = [mask if image.subset.alpha_mask else None for (_, mask), image in zip(loaded, images, strict=True)]
    return [CachedLatents(*parts) for parts in zip(plain, flipped, masks, strict=True)]


def _normalised(vae: Any, made: CachedLatents | DataError) -> CachedLatents | DataError:
    """Normalise latents for the denoiser: (latents - shift) * scale, from the VAE's config."""
    if isinstance(made, DataError):
        return made
    shift, scale = getattr(vae.config, "shift_factor", None) or 0.0, vae.config.scaling_factor
    flipped = None if made.flipped is None else (made.flipped - shift) * scale
    return CachedLatents((made.latents - shift) * scale, flipped, made.mask)


@torch.no_grad()
def _sample_latents(
    vae: Any, pixels: torch.Tensor, images: list[TrainingImage], seed: int, device: torch.device | str, kind: str
) -> list[torch.Tensor]:
    """Sample latents (c, height/8, width/8) from each image's posterior, in float32 on the CPU."""
    posterior = vae.encode(pixels.to(device, vae.dtype)).latent_dist
    means, spreads = posterior.mean.float().cpu(), posterior.std.float().cpu()
    samples = []
    for image, mean, spread in zip(images, means, spreads, strict=True):
        latents = mean + spread * normal_noise(mean.shape, seed, "posterior", kind, image.origin.source.name)
        if not torch.isfinite(latents).all():
            raise DataError(
                f"{image.origin.source.name}: the VAE returns NaN in {vae.dtype}: run it in float32 (--no_half_vae)"
            )
        samples.append(latents)
    return samples


def _encode_captions(
    captions: list[str], encode: Callable[[list[str]], dict[str, torch.Tensor]], batch_size: int, rank: int
) -> Iterator[dict[str, torch.Tensor]]:
    with tqdm(total=len(captions), desc="caching text-encoder outputs", disable=is_quiet() or rank != 0) as bar:
        for chunk in _chunks(captions, batch_size):
            with torch.no_grad():
                outputs = {name: value.detach().float().cpu() for name, value in encode(list(chunk)).items()}
            for index in range(len(chunk)):
                yield {name: value[index].clone() for name, value in outputs.items()}
            bar.update(len(chunk))


def _readable(path: str) -> bool:
    try:
        return bool(read_text(path))
    except DataError:
        return False


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
