"""Random generators seeded by explicit keys, so that results do not depend on call order, workers or processes."""

import hashlib
import random

import torch


def derive(*parts: int | str) -> int:
    """A number in [0, 2^63) that depends only on `parts`."""
    text = "\0".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def python_random(*parts: int | str) -> random.Random:
    """A generator whose seed depends only on `parts`."""
    return random.Random(derive(*parts))


def normal_noise(shape: torch.Size, *parts: int | str) -> torch.Tensor:
    """Standard normal noise on the CPU, float32, that depends only on `shape` and `parts`."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(derive(*parts)))
