"""Hashes are those of the file that the safetensors library writes, made from a tensor at a time."""

import hashlib

import pytest
import safetensors.torch
import torch

from lora_adapters.convert.formats.hashes import hashes

DTYPES = (
    "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool float8_e4m3fn float8_e5m2"
)


def written(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> dict[str, str]:
    """By the library's own bytes, held whole."""
    content = safetensors.torch.save(tensors, metadata)
    start = 8 + int.from_bytes(content[:8], "little")
    return {
        "sshs_model_hash": hashlib.sha256(content[start:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8],
    }


@pytest.mark.parametrize("metadata", [{}, {"ss_note": 'ü "quoted" \\ \n \x01'}])
def test_hashes_are_those_of_the_librarys_bytes(metadata) -> None:
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for number, name in enumerate(DTYPES.split()):
        for part in range(2):
            numbers = torch.randint(0, 2, (3 + number, 20000 // (1 + number)), generator=draw)
            tensors[f"{'zyx'[number % 3]}{number}.{part}"] = numbers.to(torch.float32).to(getattr(torch, name))
    tensors["scalar"], tensors["none"] = torch.tensor(1.5), torch.zeros(0)
    assert hashes(tensors, {**metadata, "other": "left out"}) == written(tensors, metadata)


def test_a_file_that_ends_before_its_short_hash_begins() -> None:
    assert hashes({"a": torch.ones(3)}, {}) == written({"a": torch.ones(3)}, {})
