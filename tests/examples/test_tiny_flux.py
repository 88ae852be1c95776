"""examples/tiny-flux: a FluxPipeline that draws what it is asked for, in a folder as small as it says."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

TINY = Path(__file__).parents[2] / "examples" / "tiny-flux"
SIZE = {"height": 64, "width": 64, "max_sequence_length": 32}


@pytest.fixture(scope="module")
def pipe():
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(TINY, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def script(monkeypatch):
    """style.py as a module; what it puts on the path is taken off again."""
    monkeypatch.setattr(sys, "path", [str(TINY), *sys.path])
    before = set(sys.modules)
    yield importlib.import_module("style")
    for name in {"style", "quickstart"} - before:
        sys.modules.pop(name, None)


def colour(image):
    """Mean red, green and blue of what is not white paper."""
    pixels = np.asarray(image).reshape(-1, 3).astype(float)
    return pixels[pixels.min(axis=1) < 200].mean(axis=0)


def test_it_is_small():
    assert sum(file.stat().st_size for file in TINY.rglob("*.safetensors")) < 25e6


def test_its_configs_name_no_folder_of_the_machine_that_made_it():
    assert [file for file in TINY.glob("**/*.json") if '": "/' in file.read_text(encoding="utf-8")] == []


def test_it_draws_what_is_asked_for(pipe):
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    apple, cactus = pipe(["a red apple", "a cactus"], num_inference_steps=8, generator=generators, **SIZE).images
    assert apple.size == (64, 64)
    assert colour(apple)[0] > colour(apple)[1:].max() + 50
    assert colour(cactus)[1] > colour(cactus)[[0, 2]].max() + 20


def test_padding_means_nothing(pipe):
    """The same image, nearly, whatever the length of the text."""
    drawn = []
    for length in (24, 96):
        size = {**SIZE, "max_sequence_length": length}
        drawn.append(
            pipe("a red apple", num_inference_steps=4, generator=torch.Generator().manual_seed(0), **size).images[0]
        )
    apart = np.abs(np.asarray(drawn[0], dtype=float) - np.asarray(drawn[1], dtype=float)).mean()
    assert apart < 16


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "dylora"])
def test_a_few_steps_of_the_recipe_lower_the_held_out_loss(name, script, pipe, tmp_path):
    data, file = TINY.parent / "images" / "delft", tmp_path / f"{name}.safetensors"
    held_out = script.examples(pipe, data / "held_out")
    base = script.held_out_loss(pipe, held_out)
    script.train_adapter(TINY, data, file, 20, script.MODULES[name])
    pipe.load_lora_weights(file, adapter_name="a")
    assert script.held_out_loss(pipe, held_out) < 0.9 * base
    pipe.unload_lora_weights()
    assert script.held_out_loss(pipe, held_out) == base
