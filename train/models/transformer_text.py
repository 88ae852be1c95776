"""Text for diffusion transformers: one window of tokens for each of their text encoders, T5's with a mask."""

from typing import Any

import torch

from lora_adapters.train.models.text_encoding import Tokens, tokenize


def clip_tokens(tokenizer: Any, captions: list[str]) -> Tokens:
    """CLIP's 77 tokens of each caption; words beyond them are cut off."""
    return tokenize(tokenizer, captions)


def t5_tokens(tokenizer: Any, captions: list[str], length: int, masked: bool) -> Tokens:
    """T5's tokens of each caption, (n, 1, length), and with `masked` the mask of its padding."""
    encoded = tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    mask = encoded.attention_mask.unsqueeze(1) if masked else None
    return Tokens(encoded.input_ids.unsqueeze(1), mask=mask)


def t5_states(encoder: Any, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor | None]:
    """T5's output (n, length, width), and the mask (n, length) on its device; None without one."""
    device = next(encoder.parameters()).device
    mask = None if tokens.mask is None else tokens.mask[:, 0].to(device)
    return encoder(tokens.ids[:, 0].to(device), attention_mask=mask)[0], mask
