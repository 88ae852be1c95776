"""Images of Flux.1 and SD3 are those of diffusers' own pipelines, from folders and from files of parts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FluxImg2ImgPipeline,
    StableDiffusion3Img2ImgPipeline,
)
from PIL import Image
from safetensors.torch import load_file, save_file

from lora_adapters.adapter import Adapter
from lora_adapters.convert.deltas.low_rank import LowRank
from lora_adapters.convert.families.names import ModuleName
from lora_adapters.train.gen_img_diffusers import main
from tests.train.generating import differ, draw, web_ui_reads

from ..transformer_files import flux_files
from ..transformers import build_flux, build_sd3

SIZE = ["--W", 64, "--H", 64]


@pytest.fixture(scope="module", params=["flux", "sd3"])
def model(request, tmp_path_factory) -> Path:
    build = {"flux": build_flux, "sd3": build_sd3}[request.param]
    return build(tmp_path_factory.mktemp("models") / request.param)


@pytest.fixture(scope="module")
def lora(model, tmp_path_factory) -> Path:
    return adapter(model, tmp_path_factory.mktemp("adapters") / "one.safetensors")


ENDINGS = {
    "transformer": tuple(f"{name}.{layer}" for name in ("attn", "attention") for layer in ("to_v", "to_q", "to_k")),
    "text_encoder": ("fc1",),
}


def adapter(model: Path, file: Path) -> Path:
    pipe = DiffusionPipeline.from_pretrained(model)
    numbers, modules = torch.Generator().manual_seed(0), {}
    for component, endings in ENDINGS.items():
        for path, layer in getattr(pipe, component).named_modules():
            if path.endswith(endings):
                out, into = layer.weight.shape
                full = path if component == "transformer" or path.startswith("text_model.") else f"text_model.{path}"
                down = torch.randn(2, into, generator=numbers) / into**0.5
                modules[ModuleName(component, full)] = LowRank(down, torch.randn(out, 2, generator=numbers), 4.0)
    return Adapter(modules, {"ss_base_model_version": model.name.replace("flux", "flux1")}).save(file)


def by_diffusers(model: Path, prompt: str, adapter: Path | None = None, kind=None, weight=1.0, **options) -> np.ndarray:
    pipe = (kind or DiffusionPipeline).from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    if adapter:
        pipe.load_lora_weights(adapter, adapter_name="a")
        pipe.set_adapters(["a"], [weight])
    options = {"num_inference_steps": 3, "guidance_scale": 3.0, "width": 64, "height": 64, **options}
    image = pipe(prompt, generator=torch.Generator().manual_seed(5), **options).images[0]
    return np.asarray(image, int)


def negative(model: Path) -> tuple[str, dict]:
    return (" --n on white", {"negative_prompt": "on white"}) if model.name == "sd3" else ("", {})


def test_an_image_is_that_of_diffusers_pipeline(model, tmp_path) -> None:
    words, options = negative(model)
    mine = draw(model, tmp_path, "--prompt", f"a red disc --w 96 --h 64{words}")
    assert mine[0].shape == (64, 96, 3)
    assert differ(mine[0], by_diffusers(model, "a red disc", width=96, **options)) <= 1


@pytest.mark.parametrize("more", [[], ["--network_pre_calc"], ["--network_merge"]])
def test_adapters_work_live_and_merged(model, lora, tmp_path, more) -> None:
    mine = draw(
        model, tmp_path, "--prompt", "a red disc", *SIZE, "--network_weights", lora, "--network_mul", 0.5, *more
    )
    assert differ(mine[0], by_diffusers(model, "a red disc", lora, weight=0.5)) <= 1
    assert differ(mine[0], by_diffusers(model, "a red disc")) > 3


def test_a_file_that_does_not_say_what_it_is_for_is_drawn_with_a_model_that_has_its_layers(
    model, lora, tmp_path
) -> None:
    """Its names are Flux.1's and SD3's."""
    silent = tmp_path / "silent.safetensors"
    tensors = load_file(Adapter.load(lora).save(tmp_path / "a.safetensors", format="diffusers"))
    save_file({key: value for key, value in tensors.items() if ".single_transformer_blocks." not in key}, silent)
    assert {"flux", "sd3"} <= {family.name for family in Adapter.load(silent).candidates}
    told = Adapter.load(silent, base_model=model.name).save(tmp_path / "told.safetensors")
    images = [
        draw(model, tmp_path / name, "--prompt", "a red disc", *SIZE, "--network_weights", file)[0]
        for name, file in (("told", told), ("silent", silent))
    ]
    assert differ(*images) <= 1


def test_several_at_a_time_are_those_drawn_alone(model, lora, tmp_path) -> None:
    common = ["--network_weights", lora, *SIZE, "--prompt", "a red disc --d 1,2"]
    one = draw(model, tmp_path / "one", *common, "--images_per_prompt", 2)
    two = draw(model, tmp_path / "two", *common, "--images_per_prompt", 2, "--batch_size", 2)
    assert [differ(a, b) <= 1 for a, b in zip(one, two, strict=True)] == [True, True]
    assert differ(*one) > 3


def test_an_image_from_an_initial_image(model, tmp_path) -> None:
    start = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 60, 3), np.uint8))
    start.save(tmp_path / "start.png")
    options = ["--image_path", tmp_path / "start.png", "--strength", 0.7, "--prompt", "a red disc"]
    mine = draw(model, tmp_path / "out", *options)
    assert mine[0].shape == (64, 64, 3)  # the nearest multiples of 16
    kind = FluxImg2ImgPipeline if model.name == "flux" else StableDiffusion3Img2ImgPipeline
    pipe = kind.from_pretrained(model)
    pixels = pipe.image_processor.preprocess(start.resize((64, 64), Image.Resampling.LANCZOS))
    vae = pipe.vae
    latents = (vae.encode(pixels).latent_dist.mean - vae.config.shift_factor) * vae.config.scaling_factor
    theirs = by_diffusers(model, "a red disc", kind=kind, image=latents.detach(), strength=0.7)
    assert differ(mine[0], theirs) <= 1


def test_the_settings_in_the_file_are_those_of_the_family(model, tmp_path) -> None:
    assert (
        main(["--ckpt", str(model), "--outdir", str(tmp_path), "--prompt", "a", "--steps", "2", *map(str, SIZE)]) == 0
    )
    with Image.open(next(tmp_path.iterdir())) as image:
        found = web_ui_reads(image.text["parameters"])
    assert (found["Sampler"], found["CFG scale"]) == ("Euler", "3.5" if model.name == "flux" else "7.5")


def test_sweeps_have_weights_and_no_samplers(model, lora, tmp_path, capsys) -> None:
    common = ["--network_weights", lora, *SIZE, "--prompt", "a red disc", "--sweep"]
    assert len(draw(model, tmp_path, *common, "weight=0,1", "steps=1,2")) == 1
    words = ["--ckpt", str(model), *map(str, common), "sampler=ddim,euler"]
    assert main(words) == 2
    assert "has only one sampler, flow matching Euler" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--clip_skip", "2"], "--clip_skip is for models with a U-Net"),
        (["--zero_terminal_snr"], "--zero_terminal_snr is for models with a U-Net"),
        (["--ow", "64"], "(original_width) is for"),
        (["--sdxl"], "--sdxl"),
        (["--t5xxl", "none.safetensors"], "there is no such file"),
    ],
)
def test_what_they_have_not_is_refused_in_a_line(model, words, said, capsys) -> None:
    prompt = "a" if words[0] != "--ow" else "a --ow 64"
    words = [] if words[0] == "--ow" else words
    assert main(["--ckpt", str(model), "--prompt", prompt, *words]) != 0
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line


def test_what_is_not_read_is_said(tmp_path, caplog) -> None:
    model = build_flux(tmp_path / "flux")
    draw(model, tmp_path / "out", "--prompt", "a --n bad --w 72 --h 64 --ss euler", "--steps", 1)
    text = caplog.text
    assert "the sampler euler is ignored" in text
    assert "negative prompts are ignored" in text
    assert "sides must be multiples of 16; 64x64 is used" in text


def test_files_of_parts_are_drawn_with(tmp_path) -> None:
    model = build_flux(tmp_path / "flux")
    files = flux_files(model, tmp_path / "files")
    words = [f"--{name}={file}" for name, file in files.items() if name != "pretrained_model_name_or_path"]
    base = files["pretrained_model_name_or_path"]
    mine = draw(Path(base), tmp_path / "out", "--prompt", "a red disc", *SIZE, *words)
    assert differ(mine[0], by_diffusers(model, "a red disc")) <= 1


def test_a_model_of_another_pipeline_is_refused_before_it_is_read(tmp_path, capsys) -> None:
    index = {"_class_name": "QwenImageEditPipeline", "transformer": ["diffusers", "QwenImageTransformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert main(["--ckpt", str(tmp_path), "--prompt", "a"]) == 1
    error = capsys.readouterr().err
    assert "is a QwenImageEditPipeline, not SD1.x" in error
    assert "generate with its pipeline in diffusers, which can load adapters (import lora_adapters" in error


def test_parts_are_refused_for_a_unet(sd1, capsys) -> None:
    assert main(["--ckpt", str(sd1), "--prompt", "a", "--clip_l", "x.safetensors"]) == 2
    assert "--clip_l is for Flux.1 and SD3, and the model is SD1.x" in capsys.readouterr().err
