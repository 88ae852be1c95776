"""What a file is where it is not a plain low-rank adapter of SD or SDXL, by the names of its tensors.

The first mark that one of the keys has tells the kind. Some kinds are read by `formats.lycoris`. Which of them stock
diffusers may load whole is marked too, for files that are not read after all: its layers hold token embeddings and
convolutions of other dimensions, which this package's do not.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeVar

import torch

from lora_adapters.convert.errors import UnknownFormatError

logger = logging.getLogger(__name__)
_BUNDLED = re.compile(r"bundle_emb\.[^.]+\..+")
T = TypeVar("T")


class Kind(NamedTuple):
    """A kind of file: what it is called, and the mark in its keys.

    is_read: whether the format of LyCORIS' files (`formats.lycoris`) has it. diffusers: whether diffusers' own loading
    may be tried.
    """

    name: str
    mark: re.Pattern[str]
    is_read: bool = False
    diffusers: bool = False
    other_model: bool = False


def _kind(name: str, mark: str, **facts: bool) -> Kind:
    return Kind(name, re.compile(mark), **facts)


KINDS = (
    _kind(
        "a Control LoRA of Flux.1, with norms in place of the model's, for diffusers' FluxControlPipeline",
        r"\.(query|key)_norm\.scale$",
        diffusers=True,
    ),
    _kind("a LoHa adapter", r"\.hada_[wt]\d", is_read=True),
    _kind("a LoKr adapter", r"\.lokr_[wt]\d", is_read=True),
    _kind("an OFT adapter", r"\.oft_blocks$", is_read=True),
    _kind("an OFT adapter", r"\.oft_[Rrs]\b", is_read=True),
    _kind("a BOFT adapter", r"\.boft_[Rs]\b", is_read=True),
    _kind("an OFT adapter", r"\.oft_diag|\.(b?oft|hra)_\w+$"),
    _kind("a GLoRA adapter", r"\.[ab][12]\.weight$", is_read=True),
    _kind("an (IA)3 adapter", r"\.(on_input$|ia3_l\b)", is_read=True),
    _kind("a T-LoRA adapter", r"\.(lambda_layer|[pq]_layer\.weight)$"),
    _kind("a VeRA adapter", r"\bvera_(lambda|A|B)"),
    _kind("an adapter with weights of norm layers", r"\.[wb]_norm$", is_read=True),
    _kind("an adapter with full differences of weights", r"\.diff(_b)?$", is_read=True),
    _kind("a LoCon adapter with a trained scalar", r"\.scalar$", is_read=True),
    _kind("a DoRA adapter", r"\.dora_scale$", is_read=True),
    _kind("a DoRA adapter", r"\.lora_magnitude_vector\b", is_read=True, diffusers=True),
    _kind("a LoRA with biases", r"\.lora_(B|up|up\.linear)(\.\w+)?\.bias$", is_read=True, diffusers=True),
    _kind("a LoRA of token embeddings", r"\.lora_embedding_[AB]\b", diffusers=True),
    _kind("a Control-LoRA", r"^lora_controlnet$"),
    _kind("an adapter for Stable Cascade", r"^(lora_)?prior_", other_model=True),
    _kind(
        "an adapter for a model with transformers in the place of the U-Net",
        r"^(lora_)?transformer[._]|\b(double|single|joint)_blocks[._]|_(double|single|joint)_blocks_"
        r"|^lora_te3_|^text_encoder_3\.|\bt5xxl\b",
        other_model=True,
    ),
    _kind("an IP-Adapter", r"^(ip_adapter|image_proj)\."),
    _kind("an embedding (textual inversion)", r"\bstring_to_(param|token)\b|^(emb_params|clip_[lg])$"),
    _kind("a whole checkpoint", r"^(model\.diffusion_model|cond_stage_model|conditioner|first_stage_model)\."),
)


def kind_of(keys: Iterable[str]) -> tuple[Kind, str] | None:
    """The kind that the keys tell, and the key that tells it; None if none does."""
    keys = list(keys)
    for kind in KINDS:
        key = next((key for key in keys if kind.mark.search(key)), None)
        if key is not None:
            return kind, key
    return None


def unread(keys: Iterable[str], otherwise: str) -> UnknownFormatError:
    """The error for a file that is not read: its kind and the key that tells it, or `otherwise` where none does."""
    match = kind_of(keys)
    if match is None:
        return UnknownFormatError(otherwise)
    kind, key = match
    if kind.other_model:
        return UnknownFormatError(f"it is {kind.name}, of none that is known here ({key:.100})")
    return UnknownFormatError(f"it is {kind.name} ({key:.100}), which is not read")


def may_go_to_diffusers(keys: Iterable[str]) -> bool:
    """Whether stock diffusers may load the file whole: kinds that its layers hold, and those that nobody knows here."""
    match = kind_of(keys)
    return match is None or match[0].diffusers


def split_bundled(tensors: Mapping[str, T]) -> tuple[dict[str, T], dict[str, T]]:
    """Split off the embeddings that a LoRA file may contain (`bundle_emb.<token>...`).

    Args:
        tensors: The tensors of the file.

    Returns:
        The other tensors, and the embeddings by their keys without `bundle_emb.`.
    """
    rest, embeddings = {}, {}
    for key, tensor in tensors.items():
        if _BUNDLED.fullmatch(key) is None:
            rest[key] = tensor
        else:
            embeddings[key.removeprefix("bundle_emb.")] = tensor
    return rest, embeddings


def without_strays(tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """The tensors without single numbers that are no module's and mark no kind of file, such as a training's `step`."""
    strays = [key for key, one in tensors.items() if "." not in key and one.numel() <= 1 and kind_of([key]) is None]
    if not strays or len(strays) == len(tensors):
        return tensors
    logger.info("Numbers in the file that are no module's are left out: %s", ", ".join(strays)[:200])
    return {key: tensor for key, tensor in tensors.items() if key not in strays}


def warn_of_embeddings(embeddings: Mapping[str, object], where: str) -> None:
    """Warn that a format has no place for a file's embeddings, which are left out."""
    if embeddings:
        logger.warning("%s has no place for embeddings, which are left out: %s", where, ", ".join(embeddings))
