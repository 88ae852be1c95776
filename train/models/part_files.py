"""Loads transformer base models whose parts are in separate files, as for kohya's trainers and ComfyUI.

The base model is the transformer's file; text encoders and VAE are in the same file or in files named by options. Such
files contain only weights. Configs are derived from tensor shapes and the released models, or read from a Diffusers
folder of the same kind (--model_config). Tokenizers are read from that folder, from --tokenizer_cache_dir or from the
Hub.
"""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from lora_adapters.convert.errors import AdapterError, first_line
from lora_adapters.convert.families.registry import by_name
from lora_adapters.convert.families.transformer import Transformer
from lora_adapters.train.errors import TrainingError
from lora_adapters.train.models.part_weights import (
    denoiser_weights,
    empty,
    fill,
    has_part,
    own_part,
    part_of_file,
    read_weights,
    text_weights,
    weight_names,
)
from lora_adapters.train.models.vae_files import PREFIXES as VAE_PREFIXES
from lora_adapters.train.models.vae_files import load_vae
from lora_adapters.train.options.model import ModelSource

log = logging.getLogger(__name__)

_DENOISER_PREFIXES = ("model.diffusion_model.", "diffusion_model.")


@dataclass(frozen=True)
class TextPart:
    """A text encoder that can be in a separate file.

    Args:
        option: The option that names its file.
        title: Its name in messages.
        model: The class in transformers.
        config: The config of the released model.
        tokenizer: The Hub repository of its tokenizer.
        tokenizer_options: Arguments for loading the tokenizer from that repository.
        optional: Whether the family's models work without it.
    """

    option: str
    title: str
    model: Any
    config: Mapping[str, Any]
    tokenizer: str
    tokenizer_options: Mapping[str, Any] = field(default_factory=dict)
    optional: bool = False


def check_parts(settings: ModelSource, family: Any) -> None:
    """Check that all parts of a base model in files exist. Only tensor names are read.

    Args:
        settings: The options that name the files.
        family: The family of the base model (TransformerFamily).

    Raises:
        TrainingError: A file or a part is missing, or two options name the VAE.
    """
    path = Path(str(settings.pretrained_model_name_or_path))
    for name in _options(family):
        file = getattr(settings, name)
        if file and not Path(file).is_file():
            raise TrainingError(f"--{name} {file}: there is no such file")
    if settings.ae and settings.vae:
        raise TrainingError("--ae and --vae both name the VAE: give only one")
    if not path.is_file():
        return
    inside = weight_names(path)
    missing = [
        f"--{part.option} ({part.title})"
        for component, part in family.text_parts.items()
        if not (part.optional or getattr(settings, part.option) or has_part(inside, _prefixes(family, component)))
    ]
    if not (settings.ae or settings.vae or has_part(inside, VAE_PREFIXES)):
        missing.append("--ae (the VAE)" if family.name == "flux" else "--vae")
    if missing:
        raise TrainingError(f"{path} lacks parts of the model: name their files with {', '.join(missing)}")


def _options(family: Any) -> list[str]:
    return [*(part.option for part in family.text_parts.values()), "ae"]


def load_parts(path: Path, family: Any, settings: ModelSource, dtype: torch.dtype) -> Any:
    """Load a pipeline from a transformer's file and the files of its other parts.

    Args:
        path: The base model under the original code's names, with or without the other parts.
        family: Its family (TransformerFamily).
        settings: The options that name files, configs and tokenizers.
        dtype: The dtype of the weights.

    Returns:
        A pipeline of the family's class.

    Raises:
        TrainingError: A part, a config or a tokenizer is missing or does not fit.
    """
    check_parts(settings, family)
    tensors = read_weights(path, whole=settings.disable_mmap_load_safetensors)
    without = [
        part.option
        for component, part in family.text_parts.items()
        if part.optional and not (getattr(settings, part.option) or has_part(tensors, _prefixes(family, component)))
    ]
    tokenizers = _tokenizers(family, settings, without)
    denoiser = _denoiser(path, family, settings, tensors, dtype)
    parts = text_encoders(family, settings, dtype, tensors, str(path))
    parts["vae"] = load_vae(settings.ae or settings.vae or str(path), dtype, settings, family.vae_config)
    parts[family.denoiser] = denoiser
    parts["scheduler"] = _scheduler(family, settings, denoiser)
    return family.pipeline_class(**parts, **tokenizers)


def text_encoders(
    family: Any,
    settings: ModelSource,
    dtype: torch.dtype,
    inside: Mapping[str, torch.Tensor] | None = None,
    base: str = "",
) -> dict[str, Any]:
    """The text encoders of a base model in files.

    Args:
        family: The family of the base model (TransformerFamily).
        settings: The options that name files and configs.
        dtype: The dtype of the weights.
        inside: The tensors of the base model's file, which may contain parts that no option names. None if the base
            model is not a file: then only parts that options name are returned.
        base: The name of that file, for messages.

    Returns:
        Component -> text encoder; None for an optional one that is missing.

    Raises:
        TrainingError: A file or config does not fit.
    """
    made: dict[str, Any] = {}
    for component, part in family.text_parts.items():
        file = getattr(settings, part.option)
        if file:
            where = f"--{part.option} {file}"
            tensors = own_part(
                read_weights(Path(file), settings.disable_mmap_load_safetensors), _prefixes(family, component)
            )
        elif inside is not None:
            where, tensors = base, part_of_file(inside, _prefixes(family, component))
            if not tensors:
                log.info("%s has no %s, which is optional for %s", base, part.title, family.title)
                made[component] = None
                continue
        else:
            continue
        config = _text_config(component, part, settings)
        model = empty(partial(part.model, config))
        made[component] = fill(model, partial(text_weights, model, tensors), dtype, f"{where} ({part.title})")
    return made


def _prefixes(family: Any, component: str) -> tuple[str, ...]:
    part = by_name(family.name).component(component)
    assert part is not None, component
    return part.others


def _denoiser(
    path: Path, family: Any, settings: ModelSource, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> Any:
    own = own_part(tensors, _DENOISER_PREFIXES)
    if settings.model_config:
        config = _config(family.transformer_class, family.denoiser, settings)
    else:
        try:
            config = family.denoiser_config({name: tuple(tensor.shape) for name, tensor in own.items()})
        except KeyError as error:
            raise TrainingError(f"{path} lacks {error.args[0]}; is it a complete {family.title}?") from None
    model = empty(lambda: family.transformer_class.from_config(config))
    layout = by_name(family.name).denoiser.layout
    assert isinstance(layout, Transformer)
    return fill(model, partial(denoiser_weights, model, own, layout), dtype, str(path))


def _config(kind: Any, component: str, settings: ModelSource) -> dict[str, Any]:
    """A component's config from --model_config."""
    where = settings.model_config
    try:
        return dict(kind.load_config(where, subfolder=component, cache_dir=settings.tokenizer_cache_dir))
    except OSError as error:
        raise TrainingError(f"--model_config {where} has no config of the {component}: {first_line(error)}") from error


def _text_config(component: str, part: TextPart, settings: ModelSource) -> Any:
    kind = part.model.config_class
    if not settings.model_config:
        return kind(**part.config)
    try:
        return kind.from_pretrained(settings.model_config, subfolder=component, cache_dir=settings.tokenizer_cache_dir)
    except OSError as error:
        raise TrainingError(
            f"--model_config {settings.model_config} has no config of the {component}: {first_line(error)}"
        ) from error


def _scheduler(family: Any, settings: ModelSource, denoiser: Any) -> Any:
    if settings.model_config:
        return FlowMatchEulerDiscreteScheduler.from_config(
            _config(FlowMatchEulerDiscreteScheduler, "scheduler", settings)
        )
    return FlowMatchEulerDiscreteScheduler(**family.scheduler_config(denoiser))


def _tokenizers(family: Any, settings: ModelSource, without: Collection[str] = ()) -> dict[str, Any]:
    """Load the tokenizers of all text encoders, by component; None for text encoders whose option is in `without`."""
    from transformers import AutoTokenizer

    found: dict[str, Any] = {}
    for component, part in zip(family.tokenizers, family.text_parts.values(), strict=True):
        if part.option in without:
            found[component] = None
            continue
        kept = Path(settings.tokenizer_cache_dir or "") / part.tokenizer.replace("/", "_")
        if settings.model_config:
            source, options = settings.model_config, {"subfolder": component}
        elif settings.tokenizer_cache_dir and kept.is_dir():  # as kohya's trainers store them
            source, options = str(kept), dict(part.tokenizer_options)
        else:
            source, options = part.tokenizer, dict(part.tokenizer_options)
        try:
            found[component] = AutoTokenizer.from_pretrained(source, cache_dir=settings.tokenizer_cache_dir, **options)
        except (OSError, ValueError, AdapterError) as error:
            raise TrainingError(
                f"the tokenizer of {part.title} cannot be loaded from {source} ({first_line(error)}): weight files "
                "contain none; without access to the Hub, give --model_config=<Diffusers folder of the same kind of "
                f"model, weights not needed>, or --tokenizer_cache_dir=<folder with {kept.name}>"
            ) from error
    return found
