"""What training and image generation know of a family of base models: one class a family.

The classes are in one module a family (`sd`, `sdxl`), and are found in `registry`. Their `name` is that of the same
family in `lora_adapters.convert.families`. Nothing else in `lora_adapters.train` compares a family's name.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from lora_adapters.convert.families.names import text_path
from lora_adapters.convert.families.registry import by_name
from lora_adapters.train.data.cache_files import TEXT_ENDING, LatentFiles
from lora_adapters.train.models.noise_schedule import FLOW
from lora_adapters.train.models.schedulers import sampler
from lora_adapters.train.models.text_encoding import Encoded, Reading, Tokens, encode_tokens, tokenize, unread_layers


@dataclass(frozen=True)
class SizeConditions:
    """Sizes that some families' denoisers are conditioned on: (height, width) and (top, left) in pixels."""

    original: tuple[int, int]
    negative_original: tuple[int, int]
    crop: tuple[int, int]
    target: tuple[int, int]


class TrainingFamily(ABC):
    """One family of base models.

    Attributes:
        name: the family's name.
        kinds: the versions that differ in what is saved in metadata, by `BaseModels.kind`, with their titles.
        flags: options of the command line that declare a kind, by option.
        denoiser: the denoiser's component in a pipeline, which is adapted.
        denoiser_title: what the denoiser is called in messages.
        tokenizers, text_encoders: components in a pipeline, in the order in which their outputs are used.
        pipeline_class, image_to_image_class: diffusers' pipelines.
        pipeline_options: arguments of `pipeline_class` beside its components.
        image_to_image_options: the same of `image_to_image_class`.
        checkpoint_options: arguments of `pipeline_class.from_single_file`.
        latent_files: the names of the files that latents are cached in.
        fixed_clip_skip: the text encoders' layer (from the end) that the family was trained with, where --clip_skip
            has no effect; None if it has.
        frozen_text_encoders: those that get no adapter unless asked for.
        predictions: what its models may predict; the first is assumed where the scheduler's config says nothing.
        text_ending: the ending of the files that outputs of text encoders are cached in.
        sample_size: side of the latents, for a denoiser whose config does not give it.
        pixel_step: sides of images in pixels are multiples of it.
        guidance: the guidance scale of sample images, where a prompt has none.
        reads_negative_prompt: whether the pipeline uses a negative prompt.
        image_loss: whether flow matching compares images, over timesteps of --training_shift (SD3), and not
            velocities.
        unused_options: options of training that other families with the same objective have.
        rank_args: network_args that give a kind of layer its rank, with the pattern of its paths.
        block_args: network_args that say which blocks are trained, with the path of their stack.
        has_sizes: whether the denoiser is conditioned on `SizeConditions`.
        trained: whether its models are trained here, and drawn with step by step; else their pipeline draws whole.
        side: of images in pixels if none is given; None where the denoiser's or the family's `sample_size` tells.
    """

    name: ClassVar[str]
    kinds: ClassVar[Mapping[str, str]]
    flags: ClassVar[Mapping[str, str]] = {}
    denoiser: ClassVar[str]
    denoiser_title: ClassVar[str]
    tokenizers: ClassVar[tuple[str, ...]]
    text_encoders: ClassVar[tuple[str, ...]]
    pipeline_class: ClassVar[Any]
    image_to_image_class: ClassVar[Any]
    pipeline_options: ClassVar[Mapping[str, Any]] = {}
    image_to_image_options: ClassVar[Mapping[str, Any]] = {}
    checkpoint_options: ClassVar[Mapping[str, Any]] = {}
    latent_files: ClassVar[LatentFiles]
    fixed_clip_skip: ClassVar[int | None] = None
    has_sizes: ClassVar[bool] = False
    trained: ClassVar[bool] = True
    side: ClassVar[int | None] = None
    frozen_text_encoders: ClassVar[tuple[str, ...]] = ()
    predictions: ClassVar[tuple[str, ...]] = ("epsilon", "v_prediction")
    text_ending: ClassVar[str] = TEXT_ENDING
    sample_size: ClassVar[int] = 64
    pixel_step: ClassVar[int] = 8
    guidance: ClassVar[float] = 7.5
    reads_negative_prompt: ClassVar[bool] = True
    image_loss: ClassVar[bool] = False
    unused_options: ClassVar[tuple[str, ...]] = ()
    rank_args: ClassVar[Mapping[str, str]] = {}
    block_args: ClassVar[Mapping[str, str]] = {}

    @property
    def has_flow(self) -> bool:
        """Whether its models are trained by flow matching."""
        return FLOW in self.predictions

    def blocks_to_swap(self, count: int) -> Mapping[str, int]:
        """By the path of a stack of blocks, how many of them --blocks_to_swap means: as many as in kohya's trainer."""
        return {}

    @property
    def title(self) -> str:
        """The family in messages: the titles of all its kinds."""
        return "/".join(self.kinds.values())

    # --- which family it is -----------------------------------------------------------------------------------------

    @abstractmethod
    def in_folder(self, index: Mapping[str, Any]) -> bool:
        """Whether a diffusers folder with this model_index.json is of the family."""

    @abstractmethod
    def in_checkpoint(self, keys: Collection[str]) -> bool:
        """Whether an original checkpoint with these keys is of the family."""

    @abstractmethod
    def kind_of(self, pipeline: Any) -> str | None:
        """The kind of a loaded pipeline, None if it is of another family."""

    def absent_text_encoder(self, component: str, pipeline: Any) -> torch.nn.Module | None:
        """What stands for a text encoder that the pipeline lacks; None where the family's models need it."""
        return None

    def with_v2(self, kind: str, denoiser: Any) -> str | None:
        """The kind under --v2, which declares SD2.x; None if that contradicts the model."""
        return None

    # --- text -------------------------------------------------------------------------------------------------------

    def readings(self, clip_skip: int | None = None) -> tuple[Reading, ...]:
        """What the denoiser reads of each text encoder, where that is hidden states of equal length side by side."""
        raise NotImplementedError

    def tokenize(self, models: Any, captions: list[str], chunks: int = 1, weighted: bool = False) -> list[Tokens]:
        """The tokens of `captions` for each text encoder of `models` (BaseModels)."""
        return [tokenize(tokenizer, captions, chunks, weighted) for tokenizer in models.tokenizers]

    def encode(
        self,
        tokens: Sequence[Tokens],
        text_encoders: Sequence[Any],
        clip_skip: int | None = None,
        keep_mean: str = "none",
    ) -> Encoded:
        """The text encoders' outputs for tokens of each, see `encode_tokens`."""
        return encode_tokens(tokens, text_encoders, self.readings(clip_skip), keep_mean)

    def unread_layers(self, text_encoders: Sequence[Any], clip_skip: int | None) -> list[torch.nn.Module]:
        """The text encoders' layers that `encode` computes nothing from: they never get a gradient."""
        return unread_layers(text_encoders, self.readings(clip_skip))

    @abstractmethod
    def to_cache(self, encoded: Encoded, widths: Sequence[int]) -> dict[str, torch.Tensor]:
        """Text-encoder outputs under the names of kohya's cache files; `widths` are the text encoders'."""

    @abstractmethod
    def from_cache(self, cached: Mapping[str, torch.Tensor]) -> Encoded:
        """The reverse."""

    # --- the denoiser -----------------------------------------------------------------------------------------------

    def conditions(self, batch: Any, models: Any) -> torch.Tensor | None:
        """What the denoiser of `models` (BaseModels) is conditioned on beside a batch's text, on the CPU (n, ...)."""
        return None

    @abstractmethod
    def predict(
        self,
        denoiser: Any,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        text: Encoded,
        conditions: torch.Tensor | None,
    ) -> torch.Tensor:
        """The prediction (n, channels, h, w) for `noisy` (n, channels, h, w) at `timesteps` (n,)."""

    def block(self, path: str) -> int | None:
        """The number of the denoiser's block that a module is in, as presets of weights count; None outside of them."""
        return by_name(self.name).blocks.index(path)

    def sampler(
        self,
        name: str,
        prediction: str,
        zero_terminal_snr: bool,
        config: Mapping[str, Any],
        steps_offset: int | None = None,
    ) -> Any:
        """diffusers' scheduler for drawing, see `schedulers.sampler`; `config` is the base model's own."""
        if self.has_flow:  # there is one for these models: Euler's steps along the flow
            return FlowMatchEulerDiscreteScheduler.from_config(dict(config))
        return sampler(name, prediction, zero_terminal_snr, steps_offset, config)

    # --- the pipeline -----------------------------------------------------------------------------------------------

    def prompt_arguments(self, positive: Encoded, negative: Encoded) -> dict[str, Any]:
        """Encoded prompts as arguments of the pipelines' call."""
        return {"prompt_embeds": positive.hidden, "negative_prompt_embeds": negative.hidden}

    def image_arguments(self, prompts: Sequence[str], negative: Sequence[str], scale: float) -> dict[str, Any]:
        """Prompts and guidance as arguments of the call of a pipeline that draws whole (see `trained`)."""
        raise NotImplementedError

    def size_arguments(self, sizes: SizeConditions) -> dict[str, Any]:
        """Sizes as arguments of the pipelines' call."""
        return {}

    def noise_argument(self, noise: torch.Tensor) -> torch.Tensor:
        """Noise (n, channels, h, w) as the pipeline takes it."""
        return noise

    def drawn_latents(self, drawn: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """What the pipeline has drawn as latents (n, channels, height, width)."""
        return drawn

    # --- the saved file ---------------------------------------------------------------------------------------------

    @abstractmethod
    def metadata(self, kind: str, v_prediction: bool) -> dict[str, Any]:
        """kohya's metadata entries that say which base model an adapter is for."""


def is_text_encoder(component: str) -> bool:
    """Whether a component of a pipeline is a text encoder."""
    return component.startswith("text_encoder")


def full_path(component: str, path: str) -> str:
    """A module's path as adapters name it: with the `text_model.` that transformers may leave out."""
    return text_path(path) if is_text_encoder(component) else path
