"""Which model an adapter is for where its file does not say it."""

import pytest
import torch

from lora_adapters.convert import Adapter
from lora_adapters.convert.families.detection import base_model_of

ATTENTION = "lora_unet_middle_block_1_transformer_blocks_0"


def pair(name: str, out_features: int, in_features: int) -> dict[str, torch.Tensor]:
    return {
        f"{name}.lora_down.weight": torch.ones(2, in_features),
        f"{name}.lora_up.weight": torch.ones(out_features, 2),
    }


def loha(name: str, out_features: int, in_features: int) -> dict[str, torch.Tensor]:
    parts = {"w1_a": (out_features, 2), "w1_b": (2, in_features), "w2_a": (out_features, 2), "w2_b": (2, in_features)}
    return {f"{name}.hada_{part}": torch.ones(shape) for part, shape in parts.items()}


@pytest.mark.parametrize("made", [pair, loha])
@pytest.mark.parametrize(("width", "title"), [(768, "SD1.x"), (1024, "SD2.x"), (2048, "SDXL")])
def test_the_original_codes_names_are_not_only_sdxls(made, width, title) -> None:
    tensors = made(f"{ATTENTION}_attn1_to_q", 1280, 1280) | made(f"{ATTENTION}_attn2_to_k", 1280, width)
    adapter = Adapter.from_tensors(tensors, {})
    assert base_model_of(adapter.modules, adapter.metadata).title == title


def test_they_are_sdxls_where_no_width_tells() -> None:
    adapter = Adapter.from_tensors(pair(f"{ATTENTION}_attn1_to_q", 1280, 1280), {})
    assert base_model_of(adapter.modules, adapter.metadata).title == "SDXL"
