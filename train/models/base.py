"""The base model from a folder, the Hub or a file: tokenizers, text encoders, VAE and denoiser."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler

from lora_adapters.convert.parsing import json_value, read_text
from lora_adapters.convert.portable import is_path
from lora_adapters.train.errors import OptionError, TrainingError
from lora_adapters.train.models.choices import ModelChoices
from lora_adapters.train.models.family import TrainingFamily
from lora_adapters.train.models.latents import LatentSpace
from lora_adapters.train.models.loading import checkpoint_keys, load_pipeline
from lora_adapters.train.models.noise_schedule import (
    FLOW,
    SD_BETAS,
    STEPS,
    betas,
    check_prediction,
    check_schedule_config,
    ends_in_noise,
    marks,
)
from lora_adapters.train.models.registry import (
    KIND_FLAGS,
    family_of_checkpoint,
    family_of_folder,
    family_of_kind,
    family_of_pipeline,
)
from lora_adapters.train.models.text_encoding import Encoded, Tokens
from lora_adapters.train.models.transformer_text import AbsentEncoder
from lora_adapters.train.models.vae_files import load_vae
from lora_adapters.train.options.model import ModelSource
from lora_adapters.train.options.values import required

log = logging.getLogger(__name__)

_WEIGHT_FILES = {".safetensors", ".ckpt", ".pt", ".pth", ".bin"}


@dataclass
class BaseModels:
    """The frozen parts of a pipeline.

    Args:
        kind: The version of the base model, one of its family's `kinds` such as sd1, sd2 or sdxl.
        tokenizers: The tokenizers of the text encoders, in the same order.
        text_encoders: The text encoders (transformers), in the order in which the denoiser uses their outputs.
        vae: The VAE (diffusers).
        denoiser: The model that predicts, such as Stable Diffusion's U-Net.
        prediction_type: epsilon, v_prediction or flow_matching.
        name: Where the model was loaded from.
        schedule_config: The config of the pipeline's scheduler.
        choices: The run's options for the model's inputs.
    """

    kind: str
    tokenizers: list[Any]
    text_encoders: list[Any]
    vae: Any
    denoiser: Any
    prediction_type: str = "epsilon"
    name: str = ""
    schedule_config: dict[str, Any] = field(default_factory=dict)
    choices: ModelChoices = field(default_factory=ModelChoices)

    @property
    def family(self) -> TrainingFamily:
        """The family of the base model."""
        return family_of_kind(self.kind)

    @property
    def v_prediction(self) -> bool:
        return self.prediction_type == "v_prediction"

    @property
    def denoiser_name(self) -> str:
        """The name of the denoiser's component in the pipeline."""
        return self.family.denoiser

    @property
    def components(self) -> dict[str, Any]:
        """The models that can have an adapter, by component name; the denoiser comes first."""
        return {self.denoiser_name: self.denoiser, **self._text_components()}

    @property
    def latent_space(self) -> LatentSpace:
        return LatentSpace.of(self.vae)

    @property
    def default_size(self) -> tuple[int, int]:
        """The (width, height) in pixels that the model was trained for."""
        side = (
            self.family.side
            or (getattr(self.denoiser.config, "sample_size", None) or self.family.sample_size)
            * self.latent_space.factor
        )
        return side, side

    def encode(self, tokens: Sequence[Tokens], clip_skip: int | None = None, keep_mean: str = "none") -> Encoded:
        """Encode tokens, one entry for each text encoder."""
        return self.family.encode(tokens, self.text_encoders, clip_skip, keep_mean)

    def tokenize(self, captions: list[str], chunks: int = 1, weighted: bool = False) -> list[Tokens]:
        """Tokenize captions for each text encoder."""
        return self.family.tokenize(self, captions, chunks, weighted)

    @property
    def betas(self) -> dict[str, Any]:
        """The arguments that give diffusers' schedulers the noise schedule that the model was trained with."""
        return betas(self.schedule_config)

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the model was trained with a schedule that ends in pure noise."""
        return ends_in_noise(self.schedule_config)

    def noise_schedule(self, zero_terminal_snr: bool = False) -> DDPMScheduler:
        """The training schedule: 1000 steps, the model's betas, and zero terminal SNR if asked or the model has it."""
        return DDPMScheduler(
            num_train_timesteps=STEPS,
            **self.betas,
            clip_sample=False,
            prediction_type=self.prediction_type,
            rescale_betas_zero_snr=zero_terminal_snr or self.zero_terminal_snr,
        )

    def pipeline(self, scheduler: Any) -> Any:
        """A diffusers pipeline that shares these modules, including their adapters; nothing is copied."""
        family = self.family
        parts: dict[str, Any] = {"vae": self.vae, family.denoiser: self.denoiser, "scheduler": scheduler}
        parts |= zip(family.tokenizers, self.tokenizers, strict=True)
        parts |= {**dict.fromkeys(family.text_encoders), **self._text_components()}
        return family.pipeline_class(**parts, **family.pipeline_options)

    def image_to_image(self, pipeline: Any) -> Any:
        """An image-to-image pipeline with the components of `pipeline`."""
        return self.family.image_to_image_class(**pipeline.components, **self.family.image_to_image_options)

    def _text_components(self) -> dict[str, Any]:
        named = zip(self.family.text_encoders, self.text_encoders, strict=True)
        return {name: model for name, model in named if not isinstance(model, AbsentEncoder)}


def check_path(settings: ModelSource) -> str:
    """Return the base model's name. TrainingError if it cannot exist; nothing is loaded."""
    name = settings.pretrained_model_name_or_path
    if not name:
        raise OptionError(
            "--pretrained_model_name_or_path is missing: give a checkpoint file, a Diffusers folder or a Hub repository"
        )
    path = Path(name)
    if path.is_dir() and not (path / "model_index.json").exists():
        raise TrainingError(f"{path} is not a Diffusers model: it has no model_index.json")
    looks_local = path.suffix in _WEIGHT_FILES or is_path(name) or name.count("/") > 1
    if not path.exists() and looks_local:
        raise TrainingError(f"base model {name} does not exist")
    return name


def family_on_disk(settings: ModelSource) -> TrainingFamily | None:
    """The family of a Diffusers folder or .safetensors file, without loading it; None if only loading can tell."""
    path = Path(required(settings.pretrained_model_name_or_path, "--pretrained_model_name_or_path"))
    index = path / "model_index.json"
    if index.exists():
        try:
            content = json_value(read_text(index))
        except (OSError, ValueError):
            return None  # loading reports the error
        return family_of_folder(content, str(path), settings.draws) if isinstance(content, dict) else None
    if path.is_file() and path.suffix == ".safetensors":
        return family_of_checkpoint(checkpoint_keys(path))
    return None


def load_base_models(settings: ModelSource, dtype: torch.dtype = torch.float32) -> BaseModels:
    """Load --pretrained_model_name_or_path and --vae in `dtype`, frozen and in evaluation mode."""
    name = check_path(settings)
    path = Path(name)
    models = from_pipeline(load_pipeline(name, settings, dtype), name)
    if settings.vae and not models.family.has_flow:  # flow matching models load it with the other parts
        models.vae = load_vae(settings.vae, dtype, settings)
    if path.is_file():
        models.schedule_config |= marks(path)
        models.prediction_type = models.schedule_config.get("prediction_type", models.family.predictions[0])
    check_kind(models, settings)
    check_schedule_config(models.schedule_config, name, models.family.predictions)
    if settings.v_parameterization:
        models.prediction_type = "v_prediction"
    elif settings.v2:
        models.prediction_type = "epsilon"  # with --v2 only --v_parameterization decides
    check_prediction(models.prediction_type, name, models.family.predictions)
    if models.prediction_type == FLOW:
        log.info("%s: flow matching", name)
    elif models.betas != SD_BETAS or models.zero_terminal_snr:
        own = ", ".join(f"{key}={value}" for key, value in models.betas.items() if key != "trained_betas")
        log.info("noise schedule of %s: %s%s", name, own, ", zero terminal SNR" if models.zero_terminal_snr else "")
    for module in (*models.text_encoders, models.vae, models.denoiser):
        module.requires_grad_(False).eval()
    return models


def from_pipeline(pipeline: Any, name: str = "") -> BaseModels:
    """The parts of a loaded pipeline. TrainingError if its family is unknown or a text encoder is missing."""
    family, kind = family_of_pipeline(pipeline, name)
    tokenizers, text_encoders = (
        [getattr(pipeline, part) for part in parts] for parts in (family.tokenizers, family.text_encoders)
    )
    for number, part in enumerate(family.text_encoders):
        text_encoders[number] = text_encoders[number] or family.absent_text_encoder(part, pipeline)
        if text_encoders[number] is None:
            raise TrainingError(f"{name or 'the base model'} has no {part}, which it needs")
    schedule = {**pipeline.scheduler.config, "_class_name": type(pipeline.scheduler).__name__}
    prediction = schedule.get("prediction_type", family.predictions[0])
    denoiser = getattr(pipeline, family.denoiser)
    return BaseModels(kind, tokenizers, text_encoders, pipeline.vae, denoiser, prediction, name, schedule)


def check_kind(models: BaseModels, settings: ModelSource) -> None:
    """Raise TrainingError if --v2 contradicts the model that was loaded."""
    if not settings.v2:
        return
    kind = models.family.with_v2(models.kind, models.denoiser)
    if kind is None:
        raise TrainingError(f"--v2 is for SD2.x; {models.name} is {models.family.kinds[models.kind]}")
    models.kind = kind


def check_fixed_clip_skip(family: TrainingFamily, clip_skip: int | None) -> None:
    """Raise TrainingError if --clip_skip differs from the fixed value that the family was trained with."""
    fixed = family.fixed_clip_skip
    if fixed is not None and clip_skip not in (None, fixed):
        raise TrainingError(
            f"--clip_skip {clip_skip}: {family.title} was trained with {fixed}, and supports no other value"
        )


def check_declared_kind(models: BaseModels, settings: ModelSource) -> None:
    """Raise TrainingError if an option (--v1, --v2, --sdxl) declares another kind of model than was loaded."""
    for flag, kind in KIND_FLAGS.items():
        if getattr(settings, flag) and models.kind != kind:
            raise TrainingError(f"--{flag}: {models.name} is {models.kind}")


def check_clip_skip(models: BaseModels, clip_skip: int | None) -> None:
    """Raise TrainingError if --clip_skip has an effect and exceeds the number of the text encoder's layers."""
    if clip_skip is None or models.family.has_flow:
        return
    layers = models.text_encoders[0].config.num_hidden_layers
    if models.family.fixed_clip_skip is None and clip_skip > layers:
        raise TrainingError(f"--clip_skip {clip_skip}: the text encoder has {layers} layers")
