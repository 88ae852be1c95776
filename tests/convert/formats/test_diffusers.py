"""Configs beside the weights: what their alpha_pattern says for each module, and which are refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lora_adapters.convert import Adapter, AdapterError

PATHS = ("mid_block.attentions.0.proj_in", "down_blocks.0.attentions.1.proj_out")


def saved(folder, pattern, **config):
    """A LoRA of rank 2 in diffusers' format, with a config in its header."""
    tensors = {f"unet.{path}.lora_{half}.weight": torch.ones(2, 2) for path in PATHS for half in "AB"}
    told = {"r": 2, "lora_alpha": 2, "rank_pattern": {}, "alpha_pattern": pattern, **config}
    metadata = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in told.items()})}
    save_file(tensors, folder / "x.safetensors", metadata)
    return folder / "x.safetensors"


def alphas(file):
    return {name.path: one.alpha for name, one in Adapter.load(file).modules.items()}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ({}, (2, 2)),
        ({"^mid_block.attentions.0.proj_in": 4}, (4, 2)),  # a plain path
        ({"attentions.0.proj_in": 8}, (8, 2)),  # the end of one
        ({"proj_(in|out)": 3}, (3, 3)),
        ({"proj_in": 5, "mid_block.*": 6}, (5, 2)),  # the first that matches
        ({"proj_i": 9}, (2, 2)),  # not the end of a name
    ],
)
def test_the_alpha_of_each_module(tmp_path, pattern, expected) -> None:
    assert alphas(saved(tmp_path, pattern)) == dict(zip(PATHS, expected, strict=True))


def test_the_scale_of_rslora_is_kept(tmp_path) -> None:
    assert alphas(saved(tmp_path, {}, use_rslora=True)) == dict.fromkeys(PATHS, pytest.approx(2 * 2**0.5))


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ({"(": 4}, "is not a pattern"),
        ({"(a+)+b": 4}, "which is too complex a regular expression"),
        ({".*.*.*": 4}, "which is too complex a regular expression"),
        ({"a?" * 9: 4}, "which is too complex a regular expression"),
        ({"x" * 501: 4}, "which is too complex a regular expression"),
        ({"mid_block": "much"}, "alpha_pattern has 'much' for mid_block"),
        (["mid_block"], "alpha_pattern is"),
    ],
)
def test_patterns_that_are_refused(tmp_path, pattern, said) -> None:
    with pytest.raises(AdapterError, match=said):
        Adapter.load(saved(tmp_path, pattern))


def test_a_name_of_several_lines_is_shown_in_one(tmp_path) -> None:
    save_file({"unet.mid\nblock.lora_A.weight": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(AdapterError) as caught:
        Adapter.load(tmp_path / "x.safetensors")
    assert "unet.mid block" in str(caught.value)
