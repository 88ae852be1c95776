"""Writing a Diffusers folder as one checkpoint file in the original layout, which A1111 and ComfyUI can open."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.names import ModuleName
from lora_adapters.convert.families.original_layout import (
    VAE,
    Origin,
    clip_origins,
    open_clip_origins,
    unet_origins,
    vae_origins,
)
from lora_adapters.convert.families.text_encoder import TextEncoder
from lora_adapters.convert.families.transformer import Transformer
from lora_adapters.convert.families.transformer_tensors import to_original
from lora_adapters.convert.families.unet import PREFIX, UNet
from lora_adapters.convert.parsing import json_value

from .changed_weights import Change
from .checkpoint import Checkpoint, WeightsFile
from .files import read_tensors, read_text
from .folder_weights import variant, weights_of
from .weights_writing import Planned, write

ENDINGS = (".safetensors", ".ckpt")
Shapes = Mapping[str, tuple[int, ...]]
Naming = Callable[[Shapes], dict[str, Origin]]  # maps a component's tensors to their original names
_OPEN_CLIP_WIDTH = 1024  # the width of SD2.x's text encoder; that of CLIP is 768
_UNSUPPORTED = ("image_encoder", "image_normalizer")  # components that images depend on but the layout does not include


def is_single_file(target: str | Path) -> bool:
    """Whether the path to write a model to is that of a single weights file."""
    return Path(target).suffix.lower() in (*ENDINGS, ".pt", ".pth", ".bin")


def write_single_file(
    checkpoint: Checkpoint,
    target: str | Path,
    changes: Mapping[ModuleName, Change],
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a Diffusers folder as one file, with changed weights, atomically.

    The file contains the denoiser, the VAE and the text encoders. The layout does not include tokenizers, the scheduler
    and the safety checker.

    Args:
        checkpoint: An opened Diffusers folder.
        target: The file, .safetensors or .ckpt.
        changes: For each module to change, a function from its old weight to the new one; see `Checkpoint.write`.
        dtype: The dtype of all floating point tensors; None keeps the dtype of each.
        metadata: Entries for the header of a .safetensors file.

    Returns:
        The path that was written.

    Raises:
        AdapterError: A component is missing, or has tensors without a name in the original layout.
    """
    target = Path(target).expanduser()
    if target.suffix not in ENDINGS:
        raise AdapterError(f"{target}: a checkpoint in the original layout must end in {' or '.join(ENDINGS)}")
    if not _is_known(checkpoint):
        raise AdapterError(
            f"{checkpoint.path} is a folder of {checkpoint.family.title}, which can only be written as a folder: give "
            "--save_to the name of a folder"
        )
    extra = [name for name in _UNSUPPORTED if weights_of(checkpoint.path / name)]
    if extra:
        raise AdapterError(
            f"{checkpoint.path} has {extra[0]}, which a file in the original layout cannot contain: "
            "give --save_to the name of a folder"
        )
    planned: dict[str, Planned] = {}
    for component, origins in _components(checkpoint):
        parts: dict[str, Planned] = {}
        for file in _main_files(checkpoint, component):
            parts |= file.planned(changes, dtype)
        try:
            made = origins({key: one.shape for key, one in parts.items()})
        except AdapterError as error:
            raise AdapterError(f"{checkpoint.path / component}: {error}") from None
        planned |= {
            name: _combined(name, [parts[key] for key in origin.keys], origin.form) for name, origin in made.items()
        }
    planned |= _prediction_marks(checkpoint)
    write(target, planned, {"format": "pt", **(metadata or {})})
    return target


def _components(checkpoint: Checkpoint) -> list[tuple[str, Naming]]:
    """The components of the file, each with the function that names its tensors."""
    denoiser = checkpoint.family.denoiser
    layout = denoiser.layout
    transformer = isinstance(layout, Transformer)
    naming: Naming = partial(_transformer_origins, layout) if isinstance(layout, Transformer) else unet_origins
    vae = partial(_vae_origins, prefix=checkpoint.family.vae_prefix)
    listed: list[tuple[str, Naming]] = [(denoiser.name, naming), ("vae", vae)]
    for part in checkpoint.family.components:
        if transformer and part.role == "text_encoder":
            if (checkpoint.path / part.name).is_dir():  # T5 is optional in SD3
                listed.append((part.name, partial(_comfy_origins, prefix=part.others[0])))
        elif isinstance(part.layout, TextEncoder):
            listed.append((part.name, _text_naming(checkpoint, part.name, part.layout)))
    return listed


def _is_known(checkpoint: Checkpoint) -> bool:
    """Whether the original layout's names of all tensors are known."""
    layout = checkpoint.family.denoiser.layout
    return isinstance(layout, UNet) or (isinstance(layout, Transformer) and any(stack.norms for stack in layout.stacks))


def _transformer_origins(layout: Transformer, shapes: Shapes) -> dict[str, Origin]:
    return {f"{PREFIX}{name}": origin for name, origin in to_original(layout, shapes).items()}


def _comfy_origins(keys: Collection[str], prefix: str) -> dict[str, Origin]:
    """ComfyUI's names of a text encoder's tensors: CLIP's with `text_model.`, T5's unchanged."""
    clip = any(".self_attn." in key for key in keys)
    bare = ("text_model.", "text_projection.")
    levels = {key: "text_model." if clip and not key.startswith(bare) else "" for key in keys}
    return {f"{prefix}{level}{key}": Origin((key,)) for key, level in levels.items()}


def _vae_origins(keys: Collection[str], prefix: str) -> dict[str, Origin]:
    return {f"{prefix}{name.removeprefix(VAE)}": origin for name, origin in vae_origins(keys).items()}


def _text_naming(checkpoint: Checkpoint, component: str, layout: TextEncoder) -> Naming:
    """The function that names a text encoder's tensors, as in CLIP or in open_clip."""
    if layout.open_clip and (not layout.clip or _is_open_clip(checkpoint, component)):
        return partial(open_clip_origins, prefix=layout.open_clip[0])
    return partial(clip_origins, prefix=layout.clip[0])


def _main_files(checkpoint: Checkpoint, component: str) -> list[WeightsFile]:
    """The weights files of a component in its main variant, or in its only variant."""
    files = [file for file in checkpoint.files if file.path.parent.name == component]
    if component == "vae":
        files = [WeightsFile(path, *read_tensors(path), {}) for path in weights_of(checkpoint.path / "vae")]
    if not files:
        raise AdapterError(
            f"{checkpoint.path} has no {component} with weights, but a single file needs the U-Net, the VAE and the "
            "text encoders: give --save_to the name of a folder"
        )
    variants = sorted({variant(file.path) for file in files})
    if len(variants) > 1 and variants[0] != "":
        raise AdapterError(
            f"{checkpoint.path / component} has several variants and no main one ({', '.join(variants)}): keep only one"
        )
    return [file for file in files if variant(file.path) == variants[0]]


def _is_open_clip(checkpoint: Checkpoint, component: str) -> bool:
    """Whether a text encoder is open_clip's, as in SD2.x; its activation function and layout differ from CLIP's."""
    config = _config(checkpoint.path / component / "config.json")
    if "hidden_act" in config:
        return config["hidden_act"] == "gelu"
    text = [module for module in checkpoint.modules if module.component == component]
    return bool(text) and checkpoint.weight(text[0]).shape[1] == _OPEN_CLIP_WIDTH


def _prediction_marks(checkpoint: Checkpoint) -> dict[str, Planned]:
    """Empty tensors that tell A1111 and ComfyUI that an SDXL model predicts v, and that it has zero terminal SNR."""
    scheduler = _config(checkpoint.path / "scheduler" / "scheduler_config.json")
    if not checkpoint.family.marks_v_prediction or scheduler.get("prediction_type") != "v_prediction":
        return {}
    names = ["v_pred", *(["ztsnr"] if scheduler.get("rescale_betas_zero_snr") else [])]
    return {name: Planned.copy(torch.zeros(0)) for name in names}


def _config(file: Path) -> dict[str, Any]:
    try:
        config = json_value(read_text(file))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _combined(name: str, parts: Sequence[Planned], form: str) -> Planned:
    """Plan a tensor of the original layout that consists of one or several tensors of the folder."""
    first = parts[0]
    if form == "same" or (form == "conv" and len(first.shape) != 2):
        return first
    if form == "conv":
        return Planned(first.dtype, (*first.shape, 1, 1), lambda: first.make()[:, :, None, None])
    if form == "swapped":
        return Planned(first.dtype, first.shape, lambda: torch.cat(first.make().chunk(2)[::-1]))
    if form == "transposed":
        return Planned(first.dtype, first.shape[::-1], lambda: first.make().T)
    if any(part.dtype != first.dtype or part.shape[1:] != first.shape[1:] for part in parts):
        raise AdapterError(f"{name}: q, k and v differ in dtype or width, but are one tensor in the original layout")
    shape = (sum(part.shape[0] for part in parts), *first.shape[1:])
    return Planned(first.dtype, shape, lambda: torch.cat([part.make() for part in parts]))
