"""Generates the requested images in batches with diffusers' pipelines."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from lora_adapters.train.errors import TrainingError
from lora_adapters.train.generation.networks import LiveNetworks, MergedNetworks
from lora_adapters.train.generation.options import GenerateSettings
from lora_adapters.train.generation.requests import ImageRequest
from lora_adapters.train.models.base import BaseModels
from lora_adapters.train.models.family import SizeConditions
from lora_adapters.train.models.text_encoding import Encoded, windows
from lora_adapters.train.resizing.resize import UnreadableImage, on_white, read_image

log = logging.getLogger(__name__)

_OWN = ("prompt", "negative_prompt", "seed", "start", "where", "file")  # fields that may differ within a batch


def start_image(request: ImageRequest) -> Image.Image | None:
    """The input image of img2img, with EXIF orientation, on white, at the request's size; None without img2img."""
    if request.start is None:
        return None
    try:
        image = on_white(read_image(request.start)).convert("RGB")
    except UnreadableImage as error:
        raise TrainingError(f"--image_path {request.start}: {error}") from None
    if request.width is None or request.height is None or image.size == (request.width, request.height):
        return image
    return image.resize((request.width, request.height), Image.Resampling.LANCZOS)


def completed(request: ImageRequest, models: BaseModels) -> ImageRequest:
    """Fill in the default guidance scale and size of a request.

    Args:
        request: The request for an image.
        models: The base model, whose family defines the defaults and the multiple that sides must have.

    Returns:
        The request. Its size is its own, the nearest allowed size to the input image, or the model's.
    """
    own, step = models.default_size, models.family.pixel_step
    scale = models.family.guidance if request.scale is None else request.scale
    image = start_image(request)
    width, height = request.width or own[0], request.height or own[1]
    if image is not None and request.width is None:
        width, height = (max(step, round(side / step) * step) for side in image.size)
    sides = tuple(max(step, side - side % step) for side in (width, height))
    if sides != (width, height):
        log.warning("%s: sides must be multiples of %d; %dx%d is used", request.where, step, *sides)
    return replace(request, scale=scale, width=sides[0], height=sides[1])


class Drawer:
    """Generates images with the models of `pipe`. `default_multipliers`: one for each adapter that is not merged."""

    def __init__(
        self,
        models: BaseModels,
        settings: GenerateSettings,
        device: torch.device,
        pipe: Any,
        working: LiveNetworks | MergedNetworks,
        default_multipliers: Sequence[float],
    ):
        self.models, self.settings, self.device = models, settings, device
        self._working, self._multipliers = working, tuple(default_multipliers)
        self._plain: Any = pipe
        self._image_to_image: Any = models.image_to_image(pipe) if models.family.trained else None
        for pipeline in filter(None, (self._plain, self._image_to_image)):
            pipeline.set_progress_bar_config(disable=True)

    def draw(self, requests: Sequence[ImageRequest]) -> Iterator[tuple[ImageRequest, Image.Image]]:
        """Yield each request with its image, in order. An image does not depend on the other images of its batch."""
        for batch in self._batches(requests):
            yield from zip(batch, self._draw(batch), strict=True)

    def _batches(self, requests: Sequence[ImageRequest]) -> Iterator[list[ImageRequest]]:
        batch: list[ImageRequest] = []
        for request in requests:
            if batch and (len(batch) == self.settings.batch_size or self._key(batch[0]) != self._key(request)):
                yield batch
                batch = []
            batch.append(request)
        if batch:
            yield batch

    def _key(self, request: ImageRequest) -> tuple[Any, ...]:
        blank: dict[str, Any] = dict.fromkeys(_OWN)
        plain = replace(request, **blank)
        return plain, request.start is None, self._windows(request)

    def _windows(self, request: ImageRequest) -> int:
        """The number of 75-token windows that the longer of both texts needs, at most --max_embeddings_multiples."""
        if self.models.family.has_flow:
            return 1
        texts = (request.prompt, request.negative_prompt)
        needed = max(windows(tokenizer, text) for tokenizer in self.models.tokenizers for text in texts)
        return min(needed, self.settings.max_embeddings_multiples or needed)

    @torch.no_grad()
    def _draw(self, batch: list[ImageRequest]) -> list[Image.Image]:
        first = batch[0]
        width, height = first.width or 0, first.height or 0
        self._working.use(first.multipliers or self._multipliers, first.rank)
        if not self.models.family.trained:
            return self._drawn_whole(batch)
        chunks = self._windows(first)
        positive = self._encode([request.prompt for request in batch], chunks)
        negative = self._encode([request.negative_prompt for request in batch], chunks)
        generators = [torch.Generator().manual_seed(request.seed) for request in batch]
        call: dict[str, Any] = {
            **self.models.family.prompt_arguments(positive, negative),
            **self.models.family.size_arguments(_size_conditions(first, width, height)),
            "num_inference_steps": first.steps,
            "guidance_scale": first.scale,
            "generator": generators,
            "output_type": "latent",
        }
        if first.start is None:
            noise = self.models.family.noise_argument(self._noise(generators, width, height))
            call |= {"width": width, "height": height, "latents": noise}
        else:
            images = [start_image(request) for request in batch]
            call |= {"image": self._to_latents([image for image in images if image]), "strength": first.strength}
            if self.models.family.has_flow:
                call |= {"width": width, "height": height}
        factor = self.models.latent_space.factor
        drawn = self._pipeline(first)(**call).images
        return self._decoded(self.models.family.drawn_latents(drawn, height // factor, width // factor))

    def _drawn_whole(self, batch: list[ImageRequest]) -> list[Image.Image]:
        """Generate images with a plain call of a pipeline that encodes the prompts itself."""
        first = batch[0]
        prompts, negative = ([getattr(one, name) for one in batch] for name in ("prompt", "negative_prompt"))
        return self._pipeline(first)(
            **self.models.family.image_arguments(prompts, negative, first.scale or 0.0),
            width=first.width,
            height=first.height,
            num_inference_steps=first.steps,
            generator=[torch.Generator().manual_seed(one.seed) for one in batch],
        ).images

    def _noise(self, generators: list[torch.Generator], width: int, height: int) -> torch.Tensor:
        """Noise (n, channels, h, w), drawn in float32: in half precision torch versions draw different numbers."""
        space = self.models.latent_space
        shape = (1, space.channels, height // space.factor, width // space.factor)
        noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
        return noise.to(self.device, self.models.denoiser.dtype)

    def _pipeline(self, request: ImageRequest) -> Any:
        pipe = self._plain if request.start is None else self._image_to_image
        offset = 0 if self.settings.force_scheduler_zero_steps_offset else None
        # Set on the existing pipeline, since the pipeline's constructor changes the scheduler's steps_offset.
        zero = self.settings.zero_terminal_snr
        own = self.models.schedule_config
        pipe.scheduler = self.models.family.sampler(request.sampler, self.models.prediction_type, zero, own, offset)
        return pipe

    def _encode(self, texts: list[str], chunks: int) -> Encoded:
        tokens = self.models.tokenize(texts, chunks, weighted=True)
        return self.models.encode(tokens, self.settings.clip_skip, keep_mean=self.settings.emb_normalize_mode)

    def _to_latents(self, images: list[Image.Image]) -> torch.Tensor:
        """Encode images into normalised latents (n, channels, h, w) in the denoiser's dtype, using posterior means."""
        vae = self.models.vae
        pixels = torch.stack([torch.from_numpy(np.asarray(image).copy()) for image in images]).permute(0, 3, 1, 2)
        pixels = (pixels.to(self.device, vae.dtype) / 255) * 2 - 1
        means = [vae.encode(part).latent_dist.mean for part in pixels.split(self._vae_batch())]
        return self.models.latent_space.normalised(torch.cat(means)).to(self.models.denoiser.dtype)

    def _decoded(self, latents: torch.Tensor) -> list[Image.Image]:
        vae = self.models.vae
        parts = self.models.latent_space.unnormalised(latents.to(vae.dtype)).split(self._vae_batch())
        pixels = torch.cat([vae.decode(part).sample for part in parts]).float()
        if not pixels.isfinite().all():
            raise TrainingError("the image contains NaN: try --no_half_vae, or --bf16 in place of --fp16")
        pixels = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
        return [Image.fromarray(image.numpy()) for image in pixels]

    def _vae_batch(self) -> int:
        asked, batch = self.settings.vae_batch_size, self.settings.batch_size
        if asked is None:
            return batch
        return max(1, int(batch * asked) if asked < 1 else int(asked))


def _size_conditions(request: ImageRequest, width: int, height: int) -> SizeConditions:
    """The size conditions of a request. Default: the image's size without crop, also for the negative prompt."""
    original = (request.original_height or height, request.original_width or width)
    return SizeConditions(
        original=original,
        negative_original=(
            request.negative_original_height or original[0],
            request.negative_original_width or original[1],
        ),
        crop=(request.crop_top or 0, request.crop_left or 0),
        target=(height, width),
    )
