"""Encodes captions for the denoiser: tokens, chunks of 75 tokens, prompt weights, hidden states."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_adapters.train.moving import computing_device, moved

_PIECES = re.compile(r"\\[()\[\]\\]|:\s*([+-]?\d*\.?\d+)\s*\)|[()\[\]]|[^\\()\[\]:]+|[:\\]")
_ROUND, _SQUARE = 1.1, 1 / 1.1


@dataclass
class Encoded:
    """Text-encoder outputs: `hidden` (n, tokens, width), and `pooled` (n, width) for families that use it.

    mask: (n, tokens), 1 for tokens that are attended to and 0 for others; None if there is no mask.
    """

    hidden: torch.Tensor
    pooled: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Encoded":
        """The same outputs on another device or in another dtype."""
        pooled = None if self.pooled is None else moved(self.pooled, device, dtype)
        mask = None if self.mask is None else moved(self.mask, device)
        return Encoded(moved(self.hidden, device, dtype), pooled, mask)


@dataclass(frozen=True)
class Reading:
    """Which outputs of a text encoder a denoiser uses.

    Args:
        layer: The n-th hidden state from the end; None for the encoder's last_hidden_state, which is normalised.
        normalised: Whether the final normalisation is applied to that hidden state.
        pooled: Whether the projection of the end token, which is computed from the last layer, is used as well.
    """

    layer: int | None = None
    normalised: bool = True
    pooled: bool = False

    @property
    def deepest(self) -> int:
        """The last layer that is used, counted from the end."""
        return 1 if self.pooled else self.layer or 1


@dataclass
class Tokens:
    """Token `ids` (n, chunks, length), and `weights` of the same shape if captions have weights.

    mask: The same shape, 1 for tokens and 0 for masked padding; None if there is no mask.
    """

    ids: torch.Tensor
    weights: torch.Tensor | None = None
    mask: torch.Tensor | None = None


def weighted_parts(text: str) -> list[tuple[str, float]]:
    """Split a prompt such as "a (red:1.3) [old] hat" into parts with weights.

    (x) multiplies the weight of x by 1.1, [x] by 1/1.1, (x:w) by w; nested factors multiply. A backslash escapes a
    bracket. A bracket that is not closed extends to the end of the prompt.

    Args:
        text: The prompt.

    Returns:
        (text, weight) of each part.
    """
    parts: list[tuple[str, float]] = []
    opened: list[tuple[str, int]] = []  # (bracket, index in `parts` where its content begins)

    def close(kind: str, factor: float) -> None:
        while opened:
            bracket, start = opened.pop()
            own = factor if bracket == kind else (_ROUND if bracket == "(" else _SQUARE)
            parts[start:] = [(piece, weight * own) for piece, weight in parts[start:]]
            if bracket == kind:
                return

    for match in _PIECES.finditer(text):
        piece = match.group(0)
        kinds = [kind for kind, _ in opened]
        if piece in "([":
            opened.append((piece, len(parts)))
        elif match.group(1) is not None and "(" in kinds:
            close("(", float(match.group(1)))
        elif piece == ")" and "(" in kinds:
            close("(", _ROUND)
        elif piece == "]" and "[" in kinds:
            close("[", _SQUARE)
        else:
            parts.append((piece[1:] if len(piece) == 2 and piece[0] == "\\" else piece, 1.0))
    while opened:
        close(opened[-1][0], _ROUND if opened[-1][0] == "(" else _SQUARE)
    merged: list[tuple[str, float]] = []
    for piece, weight in parts:
        if merged and merged[-1][1] == weight:
            merged[-1] = (merged[-1][0] + piece, weight)
        else:
            merged.append((piece, weight))
    return merged


def tokenize(tokenizer, captions: list[str], chunks: int = 1, weighted: bool = False) -> Tokens:
    """Tokenize captions in several windows of the tokenizer's length, each with a start and an end token.

    Args:
        tokenizer: A tokenizer of transformers.
        captions: n captions.
        chunks: The number of windows. Tokens beyond the last one are cut off.
        weighted: Whether captions have weights; see `weighted_parts`.

    Returns:
        Ids (n, chunks, length), and weights of the same shape or None.
    """
    room = tokenizer.model_max_length - 2
    start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    all_ids, all_weights = [], []
    for caption in captions:
        ids: list[int] = []
        weights: list[float] = []
        for part, weight in weighted_parts(caption) if weighted else [(caption, 1.0)]:
            tokens = tokenizer(part, add_special_tokens=False, truncation=False, verbose=False).input_ids
            ids += tokens
            weights += [weight] * len(tokens)
        for chunk in range(chunks):
            own, factors = (x[chunk * room : (chunk + 1) * room] for x in (ids, weights))
            rest = room - len(own)
            all_ids.append([start, *own, end, *[pad] * rest])
            all_weights.append([1.0, *factors, 1.0, *[1.0] * rest])
    shape = (len(captions), chunks, room + 2)
    return Tokens(torch.tensor(all_ids).view(shape), torch.tensor(all_weights).view(shape) if weighted else None)


def windows(tokenizer, text: str) -> int:
    """The number of windows that a text needs, not counting the syntax of weights; at least 1."""
    parts = [part for part, _ in weighted_parts(text)]
    count = sum(
        len(tokenizer(part, add_special_tokens=False, truncation=False, verbose=False).input_ids) for part in parts
    )
    return max(1, -(-count // (tokenizer.model_max_length - 2)))


def join_chunks(states: torch.Tensor) -> torch.Tensor:
    """(n, chunks, length, width) to (n, chunks*(length-2)+2, width), without the inner start and end tokens."""
    if states.shape[1] == 1:
        return states[:, 0]
    inner = states[:, :, 1:-1].flatten(1, 2)
    return torch.cat([states[:, 0, :1], inner, states[:, -1, -1:]], dim=1)


def encode_tokens(
    tokens: Sequence[Tokens], text_encoders: Sequence[Any], readings: Sequence[Reading], keep_mean: str = "none"
) -> Encoded:
    """Encode tokens with each text encoder, and concatenate the hidden states that the denoiser uses.

    Args:
        tokens: The tokens for each text encoder.
        text_encoders: The text encoders (transformers).
        readings: The used outputs of each text encoder, see `TrainingFamily.readings`.
        keep_mean: Which mean is kept when weights are applied: none, original or abs; see `_weighted`.

    Returns:
        The concatenated hidden states (n, tokens, total width), and the pooled output of the first window.
    """
    states, pooled = [], None
    for own, encoder, reading in zip(tokens, text_encoders, readings, strict=True):
        n, chunks, length = own.ids.shape
        ids = moved(own.ids.view(-1, length), computing_device(encoder))
        output = encoder(ids, output_hidden_states=True)
        hidden = _read(encoder, output, reading)
        if reading.pooled:
            pooled = output.text_embeds.view(n, chunks, -1)[:, 0]
        hidden = join_chunks(hidden.view(n, chunks, length, -1))
        if own.weights is not None:
            hidden = _weighted(hidden, join_chunks(moved(own.weights, hidden).unsqueeze(-1)), keep_mean)
        states.append(hidden)
    return Encoded(torch.cat(states, dim=-1), pooled)


def _read(encoder: Any, output: Any, reading: Reading) -> torch.Tensor:
    if reading.layer is None:
        return output.last_hidden_state
    hidden = output.hidden_states[-reading.layer]
    return _layers(encoder).final_layer_norm(hidden) if reading.normalised else hidden


def unread_layers(text_encoders: Sequence[Any], readings: Sequence[Reading]) -> list[torch.nn.Module]:
    """The text encoders' layers whose output `encode_tokens` does not use: they never get a gradient."""
    unread: list[torch.nn.Module] = []
    for encoder, reading in zip(text_encoders, readings, strict=True):
        layers = list(_layers(encoder).encoder.layers)
        unread += layers[len(layers) - (reading.deepest - 1) :]
    return unread


def _layers(encoder: Any) -> Any:
    """The text model, which some versions of transformers wrap in another module."""
    return getattr(encoder, "text_model", encoder)


def _weighted(hidden: torch.Tensor, weights: torch.Tensor, keep_mean: str) -> torch.Tensor:
    """Multiply hidden (n, tokens, width) by weights (n, tokens, 1).

    keep_mean "original" then rescales each weighted text to its mean before weighting, "abs" to its mean absolute
    value.
    """
    product = hidden * weights
    if keep_mean == "none":
        return product
    before, after = (states.float().abs() if keep_mean == "abs" else states.float() for states in (hidden, product))
    factor = before.mean((1, 2), keepdim=True) / after.mean((1, 2), keepdim=True)
    plain = (weights == 1).all(1, keepdim=True)  # texts without weights are not rescaled
    return product * torch.where(plain | ~factor.isfinite(), 1.0, factor).to(product)
