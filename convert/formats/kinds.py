"""Recognising the kind of a file that is not a plain low-rank adapter of SD or SDXL, by the names of its tensors.

The kind is that of the first mark that matches one of the keys. Some kinds are read by `formats.lycoris`. For files
that this package cannot read, `Kind.diffusers` says whether stock diffusers may load them: it supports token embeddings
and convolutions with other numbers of dimensions.
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
    """A kind of file.

    Attributes:
        name: The kind with its article, for messages.
        mark: A pattern that is searched in the keys.
        is_read: Whether `formats.lycoris` reads the kind.
        diffusers: Whether diffusers' own loading may be tried.
        other_model: Whether the kind belongs to a model that is not supported.
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
    """The kind of a file and the key that identifies it; None if no key does."""
    keys = list(keys)
    for kind in KINDS:
        key = next((key for key in keys if kind.mark.search(key)), None)
        if key is not None:
            return kind, key
    return None


def unread(keys: Iterable[str], otherwise: str) -> UnknownFormatError:
    """The error for an unsupported file: it names the kind and the key that identifies it, or else is `otherwise`."""
    match = kind_of(keys)
    if match is None:
        return UnknownFormatError(otherwise)
    kind, key = match
    if kind.other_model:
        return UnknownFormatError(f"it is {kind.name} that is not supported ({key:.100})")
    return UnknownFormatError(f"it is {kind.name} ({key:.100}), which is not supported")


def may_go_to_diffusers(keys: Iterable[str]) -> bool:
    """Whether to let stock diffusers try to load the file: kinds that it supports, and unknown ones."""
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
    """The tensors without scalars that belong to no module and identify no kind, such as the `step` of a training."""
    strays = [key for key, one in tensors.items() if "." not in key and one.numel() <= 1 and kind_of([key]) is None]
    if not strays or len(strays) == len(tensors):
        return tensors
    logger.info("Scalars in the file that belong to no module are ignored: %s", ", ".join(strays)[:200])
    return {key: tensor for key, tensor in tensors.items() if key not in strays}


def warn_of_embeddings(embeddings: Mapping[str, object], where: str) -> None:
    """Warn that a format cannot store the embeddings of a file, which are left out."""
    if embeddings:
        logger.warning("%s cannot store embeddings, which are left out: %s", where, ", ".join(embeddings))
