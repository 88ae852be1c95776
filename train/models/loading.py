"""Loading a base model's pipeline from a diffusers folder, a repository on the Hub or a checkpoint file."""

import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from lora_adapters.compat import dtype_option, pipelines_can_avoid_mmap
from lora_adapters.convert.errors import first_line
from lora_adapters.convert.storage.hub_errors import HubError, hub_errors
from lora_adapters.convert.storage.sources import is_repo_id
from lora_adapters.train.errors import TrainingError
from lora_adapters.train.models.family import TrainingFamily
from lora_adapters.train.models.part_files import check_parts, load_parts, text_encoders
from lora_adapters.train.models.registry import family_of_checkpoint, family_of_folder
from lora_adapters.train.models.transformer import TransformerFamily
from lora_adapters.train.models.vae_files import load_vae
from lora_adapters.train.options.model import ModelSource

_PIPELINE_PARTS_UNUSED = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}


def load_pipeline(name: str, settings: ModelSource, dtype: torch.dtype) -> Any:
    """Load the pipeline of --pretrained_model_name_or_path in `dtype`. TrainingError if that fails."""
    path = Path(name)
    return _from_file(path, settings, dtype) if path.is_file() else _from_folder(name, settings, dtype)


def _from_folder(name: str, settings: ModelSource, dtype: torch.dtype) -> Any:
    options: dict[str, Any] = {**dtype_option(dtype), "cache_dir": settings.tokenizer_cache_dir}
    if settings.disable_mmap_load_safetensors:
        if not pipelines_can_avoid_mmap():
            raise TrainingError("--disable_mmap_load_safetensors needs diffusers 0.37 or newer for a Diffusers folder")
        options["disable_mmap"] = True
    if settings.lowram and torch.cuda.is_available():
        options["device_map"] = "cuda"
    try:
        index = DiffusionPipeline.load_config(name, cache_dir=settings.tokenizer_cache_dir)
        family = family_of_folder(index, name, settings.draws)
        _check_denoiser(name, family, settings.tokenizer_cache_dir)
        parts = _other_parts(name, family, settings, dtype)
        wanted = {part: kind for part, kind in index.items() if part not in parts}
        parts |= _text_encoders(name, wanted, dtype, settings.tokenizer_cache_dir, options.get("device_map"))
        return DiffusionPipeline.from_pretrained(name, **options, **_unused_parts(name), **parts)
    except OSError as error:
        here = "" if Path(name).exists() else "there is no local file or folder of this name, and "
        raise TrainingError(f"base model {name} cannot be loaded: {here}{_why(name, error)}") from error


def _check_denoiser(name: str, family: TrainingFamily, cache: str | None) -> None:
    """Raise TrainingError for a variant that is not supported, before its weights are loaded."""
    if isinstance(family, TransformerFamily):
        family.check_config(family.transformer_class.load_config(name, subfolder=family.denoiser, cache_dir=cache))


def _other_parts(name: str, family: Any, settings: ModelSource, dtype: torch.dtype) -> dict[str, Any]:
    """The text encoders and VAE whose files are given by options, which replace those of the folder or repository."""
    if not isinstance(family, TransformerFamily):
        return {}
    own = copy.copy(settings)
    own.model_config = settings.model_config or name
    check_parts(settings, family)
    parts = text_encoders(family, own, dtype)
    if vae := settings.ae or settings.vae:
        parts["vae"] = load_vae(vae, dtype, own, family.vae_config)
    return parts


def _text_encoders(
    name: str, index: dict[str, Any], dtype: torch.dtype, cache: str | None, device_map: str | None
) -> dict[str, Any]:
    """Load the text encoders of a folder or repository. TrainingError if weights are missing.

    transformers initialises missing weights randomly. Its versions name these weights differently, and some versions
    cannot read the files of others.
    """
    import transformers

    loaded = {}
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        library, kind = index.get(part) or (None, None)
        if library == "transformers" and kind is not None:
            model, report = getattr(transformers, kind).from_pretrained(
                name, subfolder=part, dtype=dtype, cache_dir=cache, device_map=device_map, output_loading_info=True
            )
            if report["missing_keys"]:
                raise TrainingError(
                    f"base model {name}: {part} lacks {min(report['missing_keys'])}, which transformers "
                    f"{transformers.__version__} needs; if another version saved it, load and save it with that one"
                )
            loaded[part] = model
    return loaded


def _why(name: str, error: OSError) -> str:
    """The reason of an error in one line. For Hub repositories diffusers gives it only in the traceback."""
    if not Path(name).exists() and is_repo_id(name):
        from huggingface_hub import hf_hub_download

        try:
            with hub_errors(name):
                hf_hub_download(name, "model_index.json")
        except HubError as hub:
            return str(hub)
    return first_line(error)


def _unused_parts(name: str) -> dict[str, None]:
    """Parts of the pipeline that training does not need, with None so that they are not loaded."""
    index = Path(name) / "model_index.json"
    text = index.read_text(encoding="utf-8") if index.exists() else ""
    return {part: None for part in _PIPELINE_PARTS_UNUSED if f'"{part}"' in text}


def _from_file(path: Path, settings: ModelSource, dtype: torch.dtype) -> Any:
    """Load a checkpoint file. Configs and tokenizers come from --model_config or the original model on the Hub."""
    family = family_of_checkpoint(checkpoint_keys(path))
    if isinstance(family, TransformerFamily):
        return load_parts(path, family, settings, dtype)
    options: dict[str, Any] = {**dtype_option(dtype), "cache_dir": settings.tokenizer_cache_dir}
    options |= family.checkpoint_options
    if settings.model_config:
        options["config"] = settings.model_config
    if settings.disable_mmap_load_safetensors:
        options["disable_mmap"] = True
    try:
        pipeline = family.pipeline_class.from_single_file(str(path), **options)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        if settings.model_config:
            raise TrainingError(f"{path} cannot be loaded with --model_config: {first_line(error)}") from error
        raise TrainingError(
            f"{path} cannot be loaded: {first_line(error)}; checkpoint files have no configs and no tokenizer: "
            "without access to the Hub, give --model_config=<Diffusers folder of the same kind of model>"
        ) from error
    for part, model in pipeline.components.items():
        for name, parameter in model.named_parameters() if isinstance(model, torch.nn.Module) else ():
            if parameter.is_meta:
                raise TrainingError(f"{path} lacks {name} of the {part}; is it complete, and does --model_config fit?")
    return pipeline


def checkpoint_keys(path: Path) -> list[str]:
    """The names of the tensors in a checkpoint file. Pickles are read without executing code in them."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                return list(file.keys())
        except SafetensorError as error:
            raise TrainingError(f"{path} is not a safetensors file: {error}") from None
    try:
        content = torch.load(path, map_location="meta", weights_only=True, mmap=True)
    except Exception as error:  # unpickling raises many kinds of errors
        raise TrainingError(
            f"{path} cannot be read as plain weights ({first_line(error)}); use a .safetensors version of it"
        ) from None
    return [str(key) for key in content.get("state_dict", content)]
