"""--offload: images are those without it, by diffusers' own hooks, here from the CPU to the CPU."""

import pytest
import torch
from accelerate import cpu_offload
from diffusers import DiffusionPipeline

from lora_adapters.convert.errors import OneLineError
from lora_adapters.convert.formats.metadata import DyLora
from lora_adapters.train.generation import run
from lora_adapters.train.generation.offload import check_offload
from lora_adapters.train.generation.options import parse
from lora_adapters.train.models.base import load_base_models
from lora_adapters.train.models.transformer_text import AbsentEncoder
from lora_adapters.train.moving import computing_device
from lora_adapters.train.options.arguments import settings
from tests.train.generating import adapter_for, differ, draw

from ..transformers import build_flux, build_sd3
from .test_transformers import adapter

SIZE = ["--W", 64, "--H", 64]
TWO = ["--prompt", "a red disc --d 1,2 --n on white", "--images_per_prompt", 2]


@pytest.fixture
def hooked(monkeypatch) -> list[dict]:
    """The machine's CPU counts as its accelerator; the hooks of each pipeline, by component, while it draws."""
    seen: list[dict] = []

    def offload(pipe, how, device):
        if how == "model":
            pipe.enable_model_cpu_offload(device=device)
        else:  # diffusers' function would give the CPU an index, from which accelerate cannot come back
            for part in pipe.components.values():
                if isinstance(part, torch.nn.Module):
                    cpu_offload(part, device)
        seen.append({name: part._hf_hook for name, part in pipe.components.items() if hasattr(part, "_hf_hook")})

    monkeypatch.setattr(run, "check_offload", lambda *_: None)
    monkeypatch.setattr(run, "offload", offload)
    return seen


@pytest.fixture(params=["sd1", "sdxl", "flux", "sd3"])
def model(request, tmp_path):
    build = {"flux": build_flux, "sd3": build_sd3}.get(request.param)
    return build(tmp_path / request.param) if build else request.getfixturevalue(request.param)


@pytest.mark.parametrize("how", ["model", "sequential"])
def test_pictures_are_the_same_with_an_adapter(model, tmp_path, hooked, how) -> None:
    make = adapter if model.name in ("flux", "sd3") else adapter_for
    file = make(model, tmp_path / "a.safetensors")
    words = [*SIZE, *TWO, "--network_weights", file]
    here = draw(model, tmp_path / "here", *words)
    away = draw(model, tmp_path / "away", *words, "--offload", how)
    assert max(differ(one, other) for one, other in zip(here, away, strict=True)) <= 1
    assert len(here) == 2
    assert {"vae", "text_encoder"} < set(hooked[0])


@pytest.mark.parametrize("how", ["model", "sequential"])
def test_ranks_weights_and_an_image_to_begin_with(sd1, tmp_path, hooked, how) -> None:
    file = adapter_for(sd1, tmp_path / "a.safetensors", dylora=DyLora(unit=1))
    (start,) = draw(sd1, tmp_path / "start", *SIZE, "--prompt", "a red disc", "--outdir", tmp_path / "start")
    assert start.shape == (64, 64, 3)
    begin = next((tmp_path / "start").iterdir())
    for words in (["--sweep", "rank=1,4", "weight=0.5,1"], ["--image_path", begin]):
        words = [*SIZE, *TWO, "--network_weights", file, *words]
        here = draw(sd1, tmp_path / f"here{len(words)}", *words)
        away = draw(sd1, tmp_path / f"away{len(words)}", *words, "--offload", how)
        assert max(differ(one, other) for one, other in zip(here, away, strict=True)) <= 1


def test_inputs_go_where_offloading_brings_the_weights(sd1, tmp_path) -> None:
    pipe = DiffusionPipeline.from_pretrained(sd1)
    encoder = pipe.text_encoder
    assert computing_device(encoder) == torch.device("cpu")
    pipe.enable_sequential_cpu_offload(device="cpu")
    assert next(encoder.parameters()).is_meta
    assert computing_device(encoder) == torch.device("cpu", 0)
    pipe.enable_model_cpu_offload(device=torch.device("cuda", 1))
    assert computing_device(encoder) == torch.device("cuda", 1)


def test_with_it_nothing_goes_to_the_device_beforehand_but_what_stands_for_t5(tmp_path, monkeypatch) -> None:
    folder = build_sd3(tmp_path / "m")
    models = load_base_models(settings(pretrained_model_name_or_path=str(folder)))
    models.text_encoders[-1] = AbsentEncoder(72)
    moves = []
    for name, part in {"vae": models.vae, "t5": models.text_encoders[-1], **models.components}.items():
        monkeypatch.setattr(part, "to", lambda *_, name=name, **__: moves.append(name))
    monkeypatch.setattr(run, "load_base_models", lambda *_: models)
    words = ["--ckpt", str(folder), "--prompt", "a"]
    run.load(parse([*words, "--offload", "model"]), torch.device("cpu"))
    assert moves == ["t5"]
    run.load(parse(words), torch.device("cpu"))
    assert set(moves[1:]) == {"t5", "vae", *models.components}


def test_the_call_is_diffusers_own() -> None:
    calls = []

    class Pipe:
        def enable_model_cpu_offload(self, device):
            calls.append(("model", device))

        def enable_sequential_cpu_offload(self, device):
            calls.append(("sequential", device))

    device = torch.device("cuda", 1)
    for how in ("model", "sequential"):
        run.offload(Pipe(), how, device)
    assert calls == [("model", device), ("sequential", device)]


def test_refused_in_a_line() -> None:
    words = ["--ckpt", "m", "--prompt", "a", "--offload", "model"]
    with pytest.raises(OneLineError, match="--offload needs a cuda or mps device"):
        check_offload(parse(words), torch.device("cpu"))
    check_offload(parse(words), torch.device("cuda"))
    with pytest.raises(OneLineError, match="--offload cannot be combined with --network_pre_calc"):
        check_offload(parse([*words, "--network_weights", "a", "--network_pre_calc"]), torch.device("cuda"))


def test_without_a_device_nothing_is_loaded(sd1, tmp_path) -> None:
    with pytest.raises(OneLineError, match="--offload needs a cuda or mps device"):
        run.generate(
            parse(["--ckpt", str(sd1), "--prompt", "a", "--outdir", str(tmp_path), "--offload=model", "--device=cpu"])
        )
