"""The base model, SD1.x, SD2.x or SDXL, from a folder, the hub or a file: tokenizers, text encoders, VAE, U-Net."""

import argparse
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from lora_adapters.compat import dtype_option, pipelines_can_avoid_mmap
from lora_adapters.convert.errors import first_line
from lora_adapters.convert.portable import is_path
from lora_adapters.convert.storage.hub_errors import HubError, hub_errors
from lora_adapters.convert.storage.sources import is_repo_id
from lora_adapters.train.errors import TrainingError
from lora_adapters.train.models.noise_schedule import (
    SD_BETAS,
    STEPS,
    betas,
    check_prediction,
    check_schedule_config,
    ends_in_noise,
    marks,
)

log = logging.getLogger(__name__)

_WEIGHT_FILES = {".safetensors", ".ckpt", ".pt", ".pth", ".bin"}
_PIPELINE_PARTS_UNUSED = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}


@dataclass
class BaseModels:
    """The frozen parts of a pipeline. `kind` is sd1, sd2 or sdxl; `prediction_type` is epsilon or v_prediction."""

    kind: str
    tokenizers: list[Any]
    text_encoders: list[Any]
    vae: Any  # AutoencoderKL
    unet: Any  # UNet2DConditionModel
    prediction_type: str = "epsilon"
    name: str = ""
    schedule_config: dict[str, Any] = field(default_factory=dict)

    @property
    def v_prediction(self) -> bool:
        return self.prediction_type == "v_prediction"

    @property
    def architecture(self) -> str:
        """ "sd" or "sdxl": the two ways in which blocks are counted."""
        return "sdxl" if self.kind == "sdxl" else "sd"

    @property
    def components(self) -> dict[str, Any]:
        """The models that may carry an adapter, by the name of their part in a pipeline."""
        names = ["text_encoder", "text_encoder_2"][: len(self.text_encoders)]
        return {"unet": self.unet, **dict(zip(names, self.text_encoders, strict=True))}

    @property
    def latent_scale(self) -> float:
        return self.vae.config.scaling_factor

    @property
    def betas(self) -> dict[str, Any]:
        """The arguments for diffusers' schedulers that make the noise schedule the model was trained with."""
        return betas(self.schedule_config)

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the model was trained with a schedule that ends in pure noise."""
        return ends_in_noise(self.schedule_config)

    def noise_schedule(self, zero_terminal_snr: bool = False) -> DDPMScheduler:
        """The training schedule: 1000 steps, with the model's own betas, ending in pure noise if asked or if it did."""
        return DDPMScheduler(
            num_train_timesteps=STEPS,
            **self.betas,
            clip_sample=False,
            prediction_type=self.prediction_type,
            rescale_betas_zero_snr=zero_terminal_snr or self.zero_terminal_snr,
        )

    def pipeline(self, scheduler: Any) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
        """A pipeline of these very modules, adapters included: nothing is copied."""
        parts: dict[str, Any] = {"vae": self.vae, "unet": self.unet, "scheduler": scheduler}
        parts |= {"tokenizer": self.tokenizers[0], "text_encoder": self.text_encoders[0]}
        if self.kind == "sdxl":
            parts |= {"tokenizer_2": self.tokenizers[1], "text_encoder_2": self.text_encoders[1]}
            return StableDiffusionXLPipeline(**parts)
        return StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )


def check_path(settings: argparse.Namespace) -> None:
    """Raise TrainingError for a base model that cannot be there, without loading anything."""
    name = settings.pretrained_model_name_or_path
    if not name:
        raise TrainingError(
            "--pretrained_model_name_or_path is missing: a checkpoint file, a Diffusers folder or a hub id"
        )
    path = Path(name)
    if path.is_dir() and not (path / "model_index.json").exists():
        raise TrainingError(f"{path} is not a Diffusers model: it has no model_index.json")
    looks_local = path.suffix in _WEIGHT_FILES or is_path(name) or name.count("/") > 1
    if not path.exists() and looks_local:
        raise TrainingError(f"base model {name} does not exist")


def architecture_on_disk(settings: argparse.Namespace) -> str | None:
    """ "sd" or "sdxl", told from a folder or .safetensors file without loading it; None where that cannot be told."""
    path = Path(settings.pretrained_model_name_or_path)
    if (path / "model_index.json").exists():
        return "sdxl" if '"text_encoder_2"' in (path / "model_index.json").read_text(encoding="utf-8") else "sd"
    if path.is_file() and path.suffix == ".safetensors":
        return "sdxl" if _has_two_text_encoders(path) else "sd"
    return None


def load_base_models(settings: argparse.Namespace, dtype: torch.dtype = torch.float32) -> BaseModels:
    """Load what --pretrained_model_name_or_path and --vae name, frozen and in evaluation mode, in `dtype`."""
    check_path(settings)
    name = settings.pretrained_model_name_or_path
    path = Path(name)
    pipeline = _from_file(path, settings, dtype) if path.is_file() else _from_folder(name, settings, dtype)
    models = from_pipeline(pipeline, name)
    if settings.vae:
        models.vae = _load_vae(settings.vae, dtype, settings)
    if path.is_file():
        models.schedule_config |= marks(path)
        models.prediction_type = models.schedule_config.get("prediction_type", "epsilon")
    check_kind(models, settings)
    check_schedule_config(models.schedule_config, name)
    if settings.v_parameterization:
        models.prediction_type = "v_prediction"
    elif settings.v2:
        models.prediction_type = "epsilon"  # with --v2 it is --v_parameterization that tells
    check_prediction(models.prediction_type, name)
    if models.betas != SD_BETAS or models.zero_terminal_snr:
        own = ", ".join(f"{key}={value}" for key, value in models.betas.items() if key != "trained_betas")
        log.info("noise schedule of %s: %s%s", name, own, ", zero terminal SNR" if models.zero_terminal_snr else "")
    for module in (*models.text_encoders, models.vae, models.unet):
        module.requires_grad_(False).eval()
    return models


def from_pipeline(pipeline: Any, name: str = "") -> BaseModels:
    """The parts of a loaded pipeline. TrainingError for a kind of pipeline that is not Stable Diffusion's."""
    if not isinstance(getattr(pipeline, "unet", None), UNet2DConditionModel) or pipeline.text_encoder is None:
        raise TrainingError(f"{name or 'the base model'} is a {type(pipeline).__name__}, not SD1.x, SD2.x or SDXL")
    encoders, tokenizers = [pipeline.text_encoder], [pipeline.tokenizer]
    if getattr(pipeline, "text_encoder_2", None) is not None:
        encoders.append(pipeline.text_encoder_2)
        tokenizers.append(pipeline.tokenizer_2)
    one_encoder = "sd2" if pipeline.unet.config.cross_attention_dim == 1024 else "sd1"
    kind = one_encoder if len(encoders) == 1 else "sdxl"
    schedule = {**pipeline.scheduler.config, "_class_name": type(pipeline.scheduler).__name__}
    prediction = schedule.get("prediction_type", "epsilon")
    return BaseModels(kind, tokenizers, encoders, pipeline.vae, pipeline.unet, prediction, name, schedule)


def check_kind(models: BaseModels, settings: argparse.Namespace) -> None:
    """Raise TrainingError where --v2 contradicts the model that was loaded."""
    if settings.v2 and models.kind == "sdxl":
        raise TrainingError(f"--v2 is for SD2.x; {models.name} is SDXL")
    if settings.v2 and models.kind == "sd1" and models.unet.config.cross_attention_dim == 768:
        raise TrainingError(f"--v2 is for SD2.x; {models.name} is SD1.x")
    if settings.v2:
        models.kind = "sd2"


def check_clip_skip(models: BaseModels, clip_skip: int | None) -> None:
    """Raise TrainingError where --clip_skip skips more layers than the text encoder has; for SDXL it has no meaning."""
    layers = models.text_encoders[0].config.num_hidden_layers
    if clip_skip is not None and models.kind != "sdxl" and clip_skip > layers:
        raise TrainingError(f"--clip_skip {clip_skip}: the text encoder has {layers} layers")


def _from_folder(name: str, settings: argparse.Namespace, dtype: torch.dtype) -> Any:
    options: dict[str, Any] = {**dtype_option(dtype), "cache_dir": settings.tokenizer_cache_dir}
    if settings.disable_mmap_load_safetensors:
        if not pipelines_can_avoid_mmap():
            raise TrainingError("--disable_mmap_load_safetensors needs diffusers 0.37 or newer for a Diffusers folder")
        options["disable_mmap"] = True
    if settings.lowram and torch.cuda.is_available():
        options["device_map"] = "cuda"
    try:
        encoders = _text_encoders(name, dtype, settings.tokenizer_cache_dir, options.get("device_map"))
        return DiffusionPipeline.from_pretrained(name, **options, **_unused_parts(name), **encoders)
    except OSError as error:
        here = "" if Path(name).exists() else "no such file or folder is here, and "
        raise TrainingError(f"base model {name} cannot be loaded: {here}{_why(name, error)}") from error


def _text_encoders(name: str, dtype: torch.dtype, cache: str | None, device_map: str | None) -> dict[str, Any]:
    """The text encoders of a folder or repository, whole: what transformers does not find, it fills at random.

    Versions of transformers name these weights differently, and not all read the others' files.
    """
    import transformers

    index, loaded = DiffusionPipeline.load_config(name, cache_dir=cache), {}
    for part in ("text_encoder", "text_encoder_2"):
        library, kind = index.get(part) or (None, None)
        if library == "transformers" and kind is not None:
            model, found = getattr(transformers, kind).from_pretrained(
                name, subfolder=part, dtype=dtype, cache_dir=cache, device_map=device_map, output_loading_info=True
            )
            if found["missing_keys"]:
                raise TrainingError(
                    f"base model {name}: its {part} lacks {min(found['missing_keys'])} for transformers "
                    f"{transformers.__version__}; was it saved by another version? Load and save it with that one"
                )
            loaded[part] = model
    return loaded


def _why(name: str, error: OSError) -> str:
    """What is wrong with a folder, or with a repository: diffusers' own message leaves the latter to a traceback."""
    if not Path(name).exists() and is_repo_id(name):
        from huggingface_hub import hf_hub_download

        try:
            with hub_errors(name):
                hf_hub_download(name, "model_index.json")
        except HubError as hub:
            return str(hub)
    return first_line(error)


def _unused_parts(name: str) -> dict[str, None]:
    """Parts of the pipeline that training has no use for, to be left unloaded."""
    index = Path(name) / "model_index.json"
    text = index.read_text(encoding="utf-8") if index.exists() else ""
    return {part: None for part in _PIPELINE_PARTS_UNUSED if f'"{part}"' in text}


def _from_file(path: Path, settings: argparse.Namespace, dtype: torch.dtype) -> Any:
    """A single file needs configs and a tokenizer: --model_config's, or those of the hub's original model."""
    two_encoders = _has_two_text_encoders(path)
    kind = StableDiffusionXLPipeline if two_encoders else StableDiffusionPipeline
    options: dict[str, Any] = {**dtype_option(dtype), "cache_dir": settings.tokenizer_cache_dir}
    if not two_encoders:
        options |= {"safety_checker": None, "feature_extractor": None}
    if settings.model_config:
        options["config"] = settings.model_config
    if settings.disable_mmap_load_safetensors:
        options["disable_mmap"] = True
    try:
        pipeline = kind.from_single_file(str(path), **options)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        if settings.model_config:
            raise TrainingError(f"{path} cannot be loaded with --model_config: {first_line(error)}") from error
        raise TrainingError(
            f"{path} cannot be loaded: {first_line(error)}; a checkpoint file holds neither configs nor a tokenizer: "
            "without access to the hub, give --model_config=<Diffusers folder of the same kind of model>"
        ) from error
    for part, model in pipeline.components.items():
        for name, parameter in model.named_parameters() if isinstance(model, torch.nn.Module) else ():
            if parameter.is_meta:
                raise TrainingError(f"{path} lacks {name} of the {part}; is it whole, and is --model_config its kind?")
    return pipeline


def _has_two_text_encoders(path: Path) -> bool:
    """Whether a checkpoint file is SDXL's. Pickled files are read without running what they contain."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                return any(key.startswith("conditioner.embedders.1.") for key in file.keys())  # noqa: SIM118
        except SafetensorError as error:
            raise TrainingError(f"{path} is not a safetensors file: {error}") from None
    try:
        content = torch.load(path, map_location="meta", weights_only=True, mmap=True)
    except Exception as error:  # pickle's errors are of many kinds, and all mean the same here
        raise TrainingError(
            f"{path} cannot be read as plain weights ({first_line(error)}); use a .safetensors version of it"
        ) from None
    return any(str(key).startswith("conditioner.embedders.1.") for key in content.get("state_dict", content))


def _load_vae(name: str, dtype: torch.dtype, settings: argparse.Namespace) -> AutoencoderKL:
    path = Path(name)
    try:
        if path.is_file():
            config = {"config": settings.model_config, "subfolder": "vae"} if settings.model_config else {}
            return AutoencoderKL.from_single_file(str(path), **dtype_option(dtype), **config)
        whole_model = (path / "model_index.json").exists()
        return AutoencoderKL.from_pretrained(name, **dtype_option(dtype), subfolder="vae" if whole_model else None)
    except OSError as error:
        raise TrainingError(f"--vae {name} cannot be loaded: {first_line(error)}") from error
