"""Reads weight files of base model parts, renames tensors for diffusers and transformers, and loads them."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from transformers import T5EncoderModel

from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.original_layout import VAE, vae_origins
from lora_adapters.convert.families.transformer import Transformer
from lora_adapters.convert.families.transformer_tensors import from_original
from lora_adapters.convert.storage.files import is_safetensors, read_tensors
from lora_adapters.convert.storage.scaled_weights import dequantised, neighbours, refuse
from lora_adapters.train.errors import TrainingError

Tensors = Mapping[str, torch.Tensor]
Model = TypeVar("Model", bound=torch.nn.Module)

_SHARED = ("shared.weight", "encoder.embed_tokens.weight")  # the same T5 tensor under two names


def read_weights(file: Path, whole: bool) -> dict[str, torch.Tensor]:
    """Read a weight file. Scaled fp8 weights are converted to bfloat16.

    Args:
        file: A .safetensors file, or a pickle of plain tensors.
        whole: Read a .safetensors file into memory instead of mapping it.

    Returns:
        Name -> tensor, without scales.

    Raises:
        TrainingError: The file cannot be read, or its quantisation is not supported.
    """
    tensors, scales = _opened(file, whole)
    return {
        name: dequantised(tensors[name], tensors[scales[name]], scales[name]).bfloat16()
        if name in scales
        else tensors[name]
        for name in _names(tensors, scales)
    }


def weight_names(file: Path) -> list[str]:
    """The names of the tensors that `read_weights` returns; no weights are converted."""
    return _names(*_opened(file, whole=False))


def _opened(file: Path, whole: bool) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A file's tensors without entries that no model uses, and weight name -> name of its scale."""
    try:
        if whole and file.is_file() and is_safetensors(file):
            from safetensors.torch import load

            tensors = load(file.read_bytes())
        else:
            tensors, _ = read_tensors(file)
        beside = neighbours(tensors)
        refuse(beside.foreign, beside.foreign, str(file))
    except AdapterError as error:
        raise TrainingError(error) from None
    return {name: tensor for name, tensor in tensors.items() if name not in beside.extras}, dict(beside.scales)


def _names(tensors: Tensors, scales: Mapping[str, str]) -> list[str]:
    """The names of a file's tensors, without scales."""
    beside = set(scales.values())
    return [name for name in tensors if name not in beside]


def has_part(names: Iterable[str], prefixes: Iterable[str]) -> bool:
    """Whether any of the names starts with one of the prefixes."""
    starts = tuple(prefixes)
    return any(name.startswith(starts) for name in names)


def part_of_file(tensors: Tensors, prefixes: Iterable[str]) -> dict[str, torch.Tensor]:
    """The tensors under the first prefix that occurs in a file, named without it; {} if no prefix occurs."""
    for prefix in prefixes:
        found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if found:
            return found
    return {}


def own_part(tensors: Tensors, prefixes: Iterable[str]) -> dict[str, torch.Tensor]:
    """Like `part_of_file`, but all tensors if no prefix occurs."""
    return part_of_file(tensors, prefixes) or dict(tensors)


def empty(make: Callable[[], Model]) -> Model:
    """Create a model with weights on the meta device, for `fill`."""
    with init_empty_weights(include_buffers=False):
        return make()


def denoiser_weights(model: torch.nn.Module, tensors: Tensors, layout: Transformer) -> dict[str, torch.Tensor]:
    """The state dict of diffusers' transformer, from tensors under the original code's names."""
    return from_original(layout, model.state_dict(), tensors)


def vae_weights(model: Any, tensors: Tensors) -> dict[str, torch.Tensor]:
    """The state dict of diffusers' VAE, from tensors under the original code's names or diffusers' names."""
    keys = list(model.state_dict())
    if all(key in tensors for key in keys):
        return {key: tensors[key] for key in keys}
    found = {}
    for name, origin in vae_origins(keys).items():
        original = name.removeprefix(VAE)
        if original not in tensors:
            raise AdapterError(f"it lacks {original}")
        tensor = tensors[original]
        found[origin.keys[0]] = tensor[:, :, 0, 0] if origin.form == "conv" and tensor.ndim == 4 else tensor
    return found


def text_weights(model: torch.nn.Module, tensors: Tensors) -> dict[str, torch.Tensor]:
    """The state dict of a transformers text encoder, from tensors named by any version of transformers."""
    found = {}
    for key in model.state_dict():
        spellings = (key, f"text_model.{key}", key.removeprefix("text_model."), *(_SHARED if key in _SHARED else ()))
        name = next((one for one in spellings if one in tensors), None)
        if name is None:
            raise AdapterError(f"it lacks {key}")
        found[key] = tensors[name]
    return found


def fill(model: Model, weights: Callable[[], Tensors], dtype: torch.dtype, where: str) -> Model:
    """Load weights into an empty model, in `dtype`.

    Args:
        model: A model from `empty`.
        weights: Returns the state dict.
        dtype: The dtype of the weights. With float16, weights in the class's `_keep_in_fp32_modules` are float32.
        where: The source, for error messages.

    Returns:
        The same model, in evaluation mode.

    Raises:
        TrainingError: A tensor is missing, or has another shape.
    """
    try:
        found = weights()
    except AdapterError as error:
        raise TrainingError(f"{where}: {error}") from None
    wide = tuple(getattr(model, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else ()
    table: dict[str, Any] = {}
    for name, old in model.state_dict().items():
        new = found[name]
        if new.shape != old.shape:
            raise TrainingError(
                f"{where}: {name} is {list(new.shape)}, not {list(old.shape)}: the model does not fit --model_config, "
                "or without that option the released model"
            )
        kept = torch.float32 if any(part in name.split(".") for part in wide) else dtype
        table[name] = new.to(kept) if new.is_floating_point() else new
    model.load_state_dict(table, assign=True)
    if isinstance(model, T5EncoderModel):
        model.set_input_embeddings(model.shared)  # tie the two names again
    return model.eval()
