"""Images of families that are not trained here are those of diffusers' own pipelines."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, QwenImageEditPipeline
from PIL import Image

from lora_adapters.convert.errors import OneLineError
from lora_adapters.train.generation.options import parse
from lora_adapters.train.generation.run import generate
from lora_adapters.train.models.base import from_pipeline
from lora_adapters.train.models.drawn import DRAWN
from lora_adapters.train.models.registry import family_of_folder
from lora_adapters.train.options.arguments import settings
from lora_adapters.train.training.loop import train
from tests.train.generating import differ, draw

from ..drawn_pipelines import build_chroma, build_lumina2, build_qwen_image, build_zimage
from .test_offload import hooked  # noqa: F401  (a fixture)
from .test_transformers import adapter

SIZE = ["--W", 64, "--H", 64]
SCALE = dict.fromkeys(DRAWN, "guidance_scale") | {"qwen_image": "true_cfg_scale"}
BUILD = {"chroma": build_chroma, "lumina2": build_lumina2, "qwen_image": build_qwen_image, "zimage": build_zimage}


@pytest.fixture(scope="module", params=list(DRAWN))
def model(request, tmp_path_factory) -> Path:
    return BUILD[request.param](tmp_path_factory.mktemp("models") / request.param)


@pytest.fixture(scope="module")
def lora(model, tmp_path_factory) -> Path:
    return adapter(model, tmp_path_factory.mktemp("adapters") / "one.safetensors")


def by_diffusers(model: Path, file: Path | None = None, weight: float = 1.0, **options) -> np.ndarray:
    pipe = DiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    if file is not None:
        pipe.load_lora_weights(file, adapter_name="a")
        pipe.set_adapters(["a"], [weight])
    size = {"width": 64, "height": 64, "num_inference_steps": 3, SCALE[model.name]: 3.0, "negative_prompt": ""}
    image = pipe("a red disc", generator=torch.Generator().manual_seed(5), **size | options).images[0]
    return np.asarray(image, int)


def test_an_image_is_that_of_diffusers_pipeline(model, tmp_path) -> None:
    (mine,) = draw(model, tmp_path, "--prompt", "a red disc --w 96 --h 64 --n on white --l 4 --s 2")
    options = {SCALE[model.name]: 4.0, "width": 96, "num_inference_steps": 2, "negative_prompt": "on white"}
    assert mine.shape == (64, 96, 3)
    assert differ(mine, by_diffusers(model, **options)) <= 1
    assert differ(mine, by_diffusers(model, **options | {"negative_prompt": ""})) > 1


@pytest.mark.parametrize("more", [[], ["--network_pre_calc"], ["--network_merge"]])
def test_adapters_work_live_and_merged(model, lora, tmp_path, more) -> None:
    words = ["--prompt", "a red disc", *SIZE, "--network_weights", lora, "--network_mul", 0.5, *more]
    (mine,) = draw(model, tmp_path, *words)
    assert differ(mine, by_diffusers(model, lora, 0.5)) <= 1
    assert differ(mine, by_diffusers(model)) > 3


def test_several_at_a_time_and_a_sheet(model, lora, tmp_path) -> None:
    common = ["--network_weights", lora, *SIZE, "--prompt", "a red disc --d 5,6", "--images_per_prompt", 2]
    one = draw(model, tmp_path / "one", *common)
    two = draw(model, tmp_path / "two", *common, "--batch_size", 2)
    assert [differ(a, b) <= 1 for a, b in zip(one, two, strict=True)] == [True, True]
    assert differ(one[0], by_diffusers(model, lora)) <= 1
    (sheet,) = draw(model, tmp_path / "sheet", *common, "--sweep", "weight=0,1")
    assert sheet.shape[1] > 128


@pytest.mark.parametrize("how", ["model", "sequential"])
def test_offloaded(model, lora, tmp_path, hooked, how) -> None:  # noqa: F811
    words = ["--prompt", "a red disc", *SIZE, "--network_weights", lora]
    (mine,) = draw(model, tmp_path, *words, "--offload", how)
    assert differ(mine, by_diffusers(model, lora)) <= 1
    assert set(hooked[0]) == {"transformer", "text_encoder", "vae"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--image_path", "START"], "--image_path is not supported for .*: leave it out"),
        (["--vae", "v"], "--vae is not supported for"),
        (["--no_half_vae"], "--no_half_vae is not supported for"),
        (["--clip_l", "c"], "--clip_l is not supported for"),
        (["--clip_skip", "2"], "--clip_skip is for models with a U-Net"),
        (["--sweep", "sampler=ddim,euler"], "--sweep sampler=: .* has only one sampler"),
    ],
)
def test_what_such_a_pipeline_does_not_take_is_refused_in_a_line(model, tmp_path, words, said) -> None:
    start = tmp_path / "start.png"
    Image.new("RGB", (64, 64)).save(start)
    words = [str(start) if word == "START" else word for word in words]
    with pytest.raises(OneLineError, match=said) as caught:
        generate(parse(["--ckpt", str(model), "--prompt", "a", "--outdir", str(tmp_path), *words]))
    assert "\n" not in str(caught.value)


def test_none_is_trained(model, basics) -> None:
    options = settings(**basics | {"pretrained_model_name_or_path": str(model)})
    with pytest.raises(OneLineError, match=f"{model} is a (Chroma|Lumina2|QwenImage|ZImage)Pipeline, not SD1.x"):
        train(options)
    with pytest.raises(OneLineError, match=r"is a .*, not SD1\.x"):
        train(settings(**basics), models=from_pipeline(DiffusionPipeline.from_pretrained(model), "m"))


def test_folders_are_known_by_their_pipeline() -> None:
    """Qwen-Image-Edit's transformer is of Qwen-Image's class."""
    index = {"transformer": ["diffusers", "QwenImageTransformer2DModel"]}
    assert family_of_folder({"_class_name": "QwenImagePipeline", **index}, draws=True) is DRAWN["qwen_image"]
    with pytest.raises(OneLineError, match=r"m is a QwenImageEditPipeline, not .*Qwen-Image or Z-Image"):
        family_of_folder({"_class_name": QwenImageEditPipeline.__name__, **index}, "m", draws=True)
