"""Text encoding for diffusion transformers: one window of tokens for each text encoder, with a mask for T5."""

from types import SimpleNamespace
from typing import Any

import torch

from lora_adapters.train.models.text_encoding import Tokens, tokenize
from lora_adapters.train.moving import computing_device


class AbsentEncoder(torch.nn.Module):
    """Replaces a missing T5. Its output is zeros, as in diffusers' pipeline.

    Args:
        width: The width of the output.
    """

    def __init__(self, width: int):
        super().__init__()
        self.config = SimpleNamespace(hidden_size=width)
        self.place = torch.nn.Parameter(torch.zeros(0), requires_grad=False)  # for its device and dtype

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> tuple[torch.Tensor]:
        """Zeros (n, length, width) for tokens (n, length)."""
        return (self.place.new_zeros((*ids.shape, self.config.hidden_size)),)


def clip_tokens(tokenizer: Any, captions: list[str]) -> Tokens:
    """CLIP's 77 tokens of each caption; further tokens are cut off."""
    return tokenize(tokenizer, captions)


def t5_tokens(tokenizer: Any, captions: list[str], length: int, masked: bool) -> Tokens:
    """T5's tokens (n, 1, length), with a padding mask if `masked`. All ids are 0 if `tokenizer` is None."""
    if tokenizer is None:
        return Tokens(torch.zeros(len(captions), 1, length, dtype=torch.long))
    encoded = tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    mask = encoded.attention_mask.unsqueeze(1) if masked else None
    return Tokens(encoded.input_ids.unsqueeze(1), mask=mask)


def t5_states(encoder: Any, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor | None]:
    """T5's output (n, length, width), and the mask (n, length) on the same device, or None without a mask."""
    device = computing_device(encoder)
    mask = None if tokens.mask is None else tokens.mask[:, 0].to(device)
    return encoder(tokens.ids[:, 0].to(device), attention_mask=mask)[0], mask
