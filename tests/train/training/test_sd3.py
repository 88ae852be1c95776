"""SD3 and SD3.5 are trained: their inputs are those of the stock pipeline, the loss falls, the files open elsewhere."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file

from lora_adapters.convert.adapter import Adapter
from lora_adapters.convert.errors import OneLineError
from lora_adapters.train.models.base import from_pipeline
from lora_adapters.train.models.sd3 import SD3
from lora_adapters.train.options.arguments import settings
from lora_adapters.train.training.loop import train
from lora_adapters.train.training.setup import prepare

from ..transformer_files import sd3_file
from ..transformers import build_sd3

CACHED = {"cache_latents": True, "cache_text_encoder_outputs": True, "network_train_unet_only": True}


@pytest.fixture(scope="session")
def sd3(tmp_path_factory) -> Path:
    return build_sd3(tmp_path_factory.mktemp("models") / "sd3")


@pytest.fixture
def options(basics, sd3) -> dict:
    return {**basics, "pretrained_model_name_or_path": str(sd3), "t5xxl_max_token_length": 16}


def test_text_is_encoded_as_the_pipeline_encodes_it(sd3) -> None:
    pipe = StableDiffusion3Pipeline.from_pretrained(sd3)
    models = from_pipeline(pipe, "m")
    prompts = ["a red disc", "a blue square on white"]
    with torch.no_grad():
        found = models.encode(models.tokenize(prompts))
        states, _, pooled, _ = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
    torch.testing.assert_close(found.hidden, states)
    torch.testing.assert_close(found.pooled, pooled)


def test_a_model_is_named_by_its_layers(sd3, tmp_path) -> None:
    def version(folder: Path) -> str:
        models = from_pipeline(StableDiffusion3Pipeline.from_pretrained(folder), "m")
        return SD3.metadata(models.kind, False)["ss_base_model_version"]

    assert version(sd3) == "medium"
    assert version(build_sd3(tmp_path / "dual", dual=(0,))) == "5-medium"


def test_without_t5_its_states_are_zeros_as_in_the_pipeline(sd3) -> None:
    pipe = StableDiffusion3Pipeline.from_pretrained(sd3, text_encoder_3=None, tokenizer_3=None)
    models = from_pipeline(pipe, "m")
    assert set(models.components) == {"transformer", "text_encoder", "text_encoder_2"}
    with torch.no_grad():
        found = models.encode(models.tokenize(["a red disc"]))
        states, _, pooled, _ = pipe.encode_prompt(["a red disc"], None, None, do_classifier_free_guidance=False)
    clip = 77
    torch.testing.assert_close(found.hidden[:, :clip], states[:, :clip])
    assert found.hidden.shape == (1, clip + 256, 72)
    assert not found.hidden[:, clip:].any()
    torch.testing.assert_close(found.pooled, pooled)
    assert models.pipeline(pipe.scheduler).text_encoder_3 is None


@pytest.mark.parametrize("more", [{}, CACHED, {"apply_t5_attn_mask": True}])
def test_it_is_trained_without_t5(options, sd3, tmp_path, more) -> None:
    files = sd3_file(sd3, tmp_path / "sd3.safetensors", texts=("clip_l", "clip_g"))
    trained = train(settings(**options | files | more | {"max_train_steps": 2}))
    assert all(map(math.isfinite, trained.losses))
    assert "text_encoder_3" not in trained.adapter.components


def test_a_model_without_clip_is_refused_in_a_line(sd3) -> None:
    pipe = StableDiffusion3Pipeline.from_pretrained(sd3, text_encoder_2=None)
    with pytest.raises(OneLineError, match="m has no text_encoder_2"):
        from_pipeline(pipe, "m")


def test_the_loss_falls(options) -> None:
    options |= CACHED | {
        "max_train_steps": 60,
        "network_dim": 8,
        "network_alpha": 8,
        "weighting_scheme": "logit_normal",
    }
    losses = train(settings(**options)).losses
    assert sum(losses[-10:]) < 0.85 * sum(losses[:10])


def test_the_loss_is_that_of_the_image(options) -> None:
    run = prepare(settings(**options))
    batch = next(run.data.batches(0))
    seen = {}

    class Wrong(torch.nn.Module):  # the velocity plus a half
        def forward(self, noisy, timesteps, text, conditions):
            seen["t"] = t = timesteps.view(-1, 1, 1, 1) / 1000
            latents = seen["latents"]
            return (noisy - latents) / t + 0.5

    seen["latents"] = run.loss.latents(batch, None)
    run.loss.latents = lambda batch, generators: seen["latents"]
    run.loss.denoiser = Wrong()
    loss = run.loss.training(batch)
    torch.testing.assert_close(loss, (0.5 * seen["t"]).square().mean(), atol=1e-4, rtol=1e-3)


def test_cached_and_encoded_text_is_the_same(options, images) -> None:
    options |= {"network_train_unet_only": True}
    caches = CACHED | {"cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True}
    plain, cached = prepare(settings(**options)), prepare(settings(**options | caches))
    batches = next(plain.data.batches(0)), next(cached.data.batches(0))
    one, other = plain.plain.encode(plain.loss.text(batches[0])), cached.loss.text(batches[1])
    torch.testing.assert_close(one.hidden, other.hidden)
    torch.testing.assert_close(one.pooled, other.pooled)
    text = np.load(next(images.glob("*/*_sd3_te.npz")))
    names = {"lg_out", "lg_pooled", "t5_out", "clip_l_attn_mask", "clip_g_attn_mask", "t5_attn_mask",
             "apply_lg_attn_mask", "apply_t5_attn_mask"}  # fmt: skip
    assert names <= set(text)
    assert (text["lg_out"].shape, text["t5_out"].shape) == ((77, 64), (16, 72))
    latents = torch.from_numpy(np.load(next(images.glob("*/*_0064x0064_sd3.npz")))["latents_8x8"])
    assert any(torch.equal(plain.models.latent_space.normalised(latents), part) for part in _all_latents(cached))


def _all_latents(run) -> list[torch.Tensor]:
    return [part for batch in run.data.batches(0) for part in run.loss.latents(batch, None)]


def test_a_run_that_was_stopped_goes_on_exactly(options, tmp_path) -> None:
    options |= {"max_train_steps": 6, "save_state": True, "save_every_n_steps": 3, "network_module": "networks.dylora"}
    whole = train(settings(**options | {"output_dir": str(tmp_path / "whole")}))
    state = tmp_path / "whole" / "at-step00000003-state"
    again = train(settings(**options | {"output_dir": str(tmp_path / "again"), "resume": str(state)}))
    assert again.losses == whole.losses[3:]
    one, other = (load_file(tmp_path / name / "last.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(one[key], other[key]) for key in one)


STOCK = """
import sys, torch
from diffusers import StableDiffusion3Pipeline
pipe = StableDiffusion3Pipeline.from_pretrained(sys.argv[1])
pipe.load_lora_weights(sys.argv[2])
assert not any(name.startswith("lora_adapters") for name in sys.modules)
draw = dict(width=64, height=64, num_inference_steps=2, max_sequence_length=16, output_type="pt")
torch.save(pipe("a red disc", generator=torch.Generator().manual_seed(0), **draw).images, sys.argv[3])
"""


@pytest.mark.slow
def test_the_file_opens_in_the_stock_pipeline_with_the_trained_images(options, sd3, tmp_path) -> None:
    """In diffusers' names: its pipeline reads no others for SD3."""
    options |= {"network_module": "networks.lora_sd3", "max_train_steps": 4, "learning_rate": 0.05}
    trained = train(settings(**options))
    file = Adapter.load(Path(options["output_dir"]) / "last.safetensors").save(
        tmp_path / "a.safetensors", format="diffusers"
    )
    script = tmp_path / "stock.py"
    script.write_text(STOCK)
    subprocess.run([sys.executable, "-P", script, sd3, file, tmp_path / "images.pt"], check=True, cwd=tmp_path)
    stock = torch.load(tmp_path / "images.pt")
    models = trained.models
    pipe = models.pipeline(SD3.sampler("", "", False, models.schedule_config))
    texts = [models.encode(models.tokenize([text])) for text in ("a red disc", "")]
    draw = {"width": 64, "height": 64, "num_inference_steps": 2, "output_type": "pt"}
    own = pipe(**SD3.prompt_arguments(*texts), generator=torch.Generator().manual_seed(0), **draw).images
    torch.testing.assert_close(own, stock, atol=1e-4, rtol=1e-4)


def test_the_saved_file_says_what_it_is_for(options) -> None:
    trained = train(settings(**options | {"max_train_steps": 1, "training_shift": 3.0}))
    adapter = Adapter.load(Path(options["output_dir"]) / "last.safetensors")
    assert adapter.architecture == "sd3"
    assert set(trained.adapter.components) == {"transformer", "text_encoder", "text_encoder_2"}
    assert adapter.metadata["ss_base_model_version"] == "medium"
    assert adapter.metadata["ss_training_shift"] == "3.0"
    assert "modelspec.prediction_type" not in adapter.metadata


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"timestep_sampling": "shift"}, "--timestep_sampling is for other models"),
        ({"guidance_scale": 1.0}, "--guidance_scale is for other models"),
        ({"apply_lg_attn_mask": True}, "CLIP's padding is read"),
        ({"t5_dropout_rate": 0.1}, "caption_dropout_rate"),
        ({"enable_scaled_pos_embed": True}, "positions are those"),
    ],
)
def test_what_sd3_has_not_is_refused_in_a_line(options, asked, said) -> None:
    with pytest.raises(OneLineError, match=said):
        prepare(settings(**options | asked))


def test_samples_are_drawn_while_training(options, tmp_path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red disc --w 64 --h 64 --s 2 --n blue\n")
    train(settings(**options | {"max_train_steps": 1, "sample_prompts": str(prompts), "sample_every_n_steps": 1}))
    assert (Path(options["output_dir"]) / "sample" / "sample-step00000001.png").exists()
