"""Flux.1 is trained: its inputs are those of the stock pipeline, its loss falls, its files open everywhere."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline, FluxPipeline
from safetensors.torch import load_file

from lora_adapters.adapter import Adapter
from lora_adapters.convert.errors import OneLineError
from lora_adapters.train.models.base import from_pipeline
from lora_adapters.train.models.flux import FLUX, image_ids, packed, unpacked
from lora_adapters.train.options.arguments import settings
from lora_adapters.train.training.activations import activation_bytes
from lora_adapters.train.training.loop import train
from lora_adapters.train.training.setup import check, prepare

from ..transformer_files import flux_files
from ..transformers import build_flux

CACHED = {"cache_latents": True, "cache_text_encoder_outputs": True, "network_train_unet_only": True}


@pytest.fixture(scope="session")
def flux(tmp_path_factory) -> Path:
    return build_flux(tmp_path_factory.mktemp("models") / "flux")


@pytest.fixture
def options(basics, flux) -> dict:
    return {**basics, "pretrained_model_name_or_path": str(flux), "t5xxl_max_token_length": 16}


def pairs(file: Path) -> dict[str, torch.Tensor]:
    return load_file(file)


def test_latents_are_packed_as_the_pipeline_packs_them() -> None:
    latents = torch.randn(2, 4, 6, 8)
    tokens = packed(latents)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents, 2, 4, 6, 8))
    assert torch.equal(unpacked(tokens, 6, 8), latents)
    assert torch.equal(image_ids(3, 4, "cpu"), FluxPipeline._prepare_latent_image_ids(2, 3, 4, "cpu", torch.float32))


def test_text_is_encoded_as_the_pipeline_encodes_it(flux) -> None:
    pipe = FluxPipeline.from_pretrained(flux)
    models = from_pipeline(pipe, "m")
    with torch.no_grad():  # both: T5's bias of positions with a gradient makes PyTorch take another attention kernel
        found = models.encode(models.tokenize(["a red disc", "a blue square on white"]))
        states, pooled, _ = pipe.encode_prompt(["a red disc", "a blue square on white"], None, max_sequence_length=512)
    assert torch.equal(found.hidden, states)
    assert torch.equal(found.pooled, pooled)
    assert found.mask is None


def test_a_prediction_is_that_of_the_transformer_that_the_pipeline_calls(flux) -> None:
    pipe = FluxPipeline.from_pretrained(flux)
    models = from_pipeline(pipe, "m")
    text = models.encode(models.tokenize(["a red disc"]))
    latents, guidance = torch.randn(1, 4, 8, 8), torch.tensor([3.5])
    found = FLUX.predict(pipe.transformer, latents, torch.tensor([250.0]), text, guidance)
    tokens = pipe.transformer(
        hidden_states=FluxPipeline._pack_latents(latents, 1, 4, 8, 8),
        timestep=torch.tensor([250.0]) / 1000,
        guidance=guidance,
        pooled_projections=text.pooled,
        encoder_hidden_states=text.hidden,
        txt_ids=torch.zeros(512, 3),
        img_ids=FluxPipeline._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32),
    ).sample
    torch.testing.assert_close(found, FluxPipeline._unpack_latents(tokens, 64, 64, 8))


def test_with_the_mask_padding_is_not_read(options) -> None:
    run = prepare(settings(**options, apply_t5_attn_mask=True))
    models = run.models
    assert models.encode(models.tokenize(["a red disc"])).mask.sum() == 4  # three words and the end token
    noisy, t, guidance = torch.randn(1, 4, 8, 8), torch.tensor([500.0]), torch.tensor([3.5])
    text = models.encode(models.tokenize(["a red disc"]))
    with torch.no_grad():
        one = FLUX.predict(models.denoiser, noisy, t, text, guidance)
        text.hidden[:, 4:] += 1
        other = FLUX.predict(models.denoiser, noisy, t, text, guidance)
        text.mask = None
        seen = FLUX.predict(models.denoiser, noisy, t, text, guidance)
    torch.testing.assert_close(one, other)
    assert (one - seen).abs().max() > 1e-4


def test_the_loss_falls(options) -> None:
    options |= CACHED | {"max_train_steps": 60, "timestep_sampling": "uniform", "network_dim": 8, "network_alpha": 8}
    losses = train(settings(**options)).losses
    assert sum(losses[-10:]) < 0.85 * sum(losses[:10])


def test_schnell_is_told_no_guidance_and_reads_fewer_tokens(options, tmp_path) -> None:
    options |= {"pretrained_model_name_or_path": str(build_flux(tmp_path / "schnell", guidance=False))}
    run = prepare(settings(**options | {"t5xxl_max_token_length": None}))
    assert run.models.kind == "flux_schnell"
    assert [tokens.ids.shape[-1] for tokens in run.models.tokenize(["a"])] == [77, 256]
    batch = next(run.data.batches(0))
    assert FLUX.conditions(batch, run.models) is None
    assert torch.isfinite(run.loss.training(batch))


def test_the_guidance_is_what_the_transformer_is_told(options) -> None:
    run = prepare(settings(**options, guidance_scale=1.0))
    batch = next(run.data.batches(0))
    assert FLUX.conditions(batch, run.models).tolist() == [1.0, 1.0]


def test_cached_and_encoded_inputs_give_the_same_steps(options) -> None:
    options |= {"network_train_unet_only": True}
    caches = CACHED | {"cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True}
    for mask in (False, True):
        plain = prepare(settings(**options, apply_t5_attn_mask=mask))
        cached = prepare(settings(**options | caches, apply_t5_attn_mask=mask))
        batches = next(plain.data.batches(0)), next(cached.data.batches(0))
        texts = plain.plain.encode(plain.loss.text(batches[0])), cached.loss.text(batches[1])
        torch.testing.assert_close(texts[0].hidden, texts[1].hidden)
        torch.testing.assert_close(texts[0].pooled, texts[1].pooled)
        assert (texts[1].mask is not None) == mask
        means = plain.loss.latents(batches[0], None)
        spread = (cached.loss.latents(batches[1], None) - means).abs().max()
        assert spread < 6 * plain.models.vae.config.scaling_factor * _deviation(plain, batches[0])


def _deviation(run, batch) -> float:
    with torch.no_grad():
        return float(run.models.vae.encode(batch.images).latent_dist.std.max())


def test_caches_are_files_as_kohyas_trainer_has_them(options, images) -> None:
    caches = {"cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True}
    run = prepare(settings(**options | CACHED | caches))
    text = np.load(next(images.glob("*/*_flux_te.npz")))
    assert {"l_pooled", "t5_out", "txt_ids", "t5_attn_mask", "apply_t5_attn_mask"} <= set(text)
    assert text["t5_out"].shape == (16, 24)
    assert not text["apply_t5_attn_mask"]
    latents = np.load(next(images.glob("*/*_0064x0064_flux.npz")))["latents_8x8"]
    space = run.models.latent_space
    raw = torch.from_numpy(latents) / space.scale + space.shift
    assert latents.shape == (4, 8, 8)
    assert torch.allclose(space.normalised(raw), torch.from_numpy(latents), atol=1e-6)


def test_kontext_is_trained_as_dev_is(options, flux, tmp_path) -> None:
    """It has dev's transformer, and reads an initial image as further tokens, if there is one."""
    parts = FluxPipeline.from_pretrained(flux).components
    kept = {name: part for name, part in parts.items() if name not in ("image_encoder", "feature_extractor")}
    FluxKontextPipeline(**kept).save_pretrained(tmp_path / "kontext")
    losses = train(settings(**options | {"max_train_steps": 2, "output_dir": str(tmp_path / "dev")})).losses
    options |= {"pretrained_model_name_or_path": str(tmp_path / "kontext"), "max_train_steps": 2}
    assert train(settings(**options)).losses == losses
    pipe = FluxKontextPipeline.from_pretrained(tmp_path / "kontext")
    pipe.load_lora_weights(Path(options["output_dir"]) / "last.safetensors")
    assert set(pipe.get_list_adapters()) == {"transformer", "text_encoder"}


def test_fill_and_control_are_refused_before_their_weights_are_read(options, flux, tmp_path) -> None:
    folder = shutil.copytree(flux, tmp_path / "fill", ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "transformer" / "config.json").read_text())
    (folder / "transformer" / "config.json").write_text(json.dumps(config | {"in_channels": 40, "out_channels": 16}))
    with pytest.raises(OneLineError, match=r"with 40 input and 16 output channels \(Fill, Control\)"):
        prepare(settings(**options | {"pretrained_model_name_or_path": str(folder)}))


def test_a_run_that_was_stopped_goes_on_exactly(options, tmp_path) -> None:
    options |= {"max_train_steps": 6, "save_state": True, "save_every_n_steps": 3, "network_module": "networks.dylora"}
    whole = train(settings(**options | {"output_dir": str(tmp_path / "whole")}))
    state = tmp_path / "whole" / "at-step00000003-state"
    again = train(settings(**options | {"output_dir": str(tmp_path / "again"), "resume": str(state)}))
    assert again.losses == whole.losses[3:]
    one, other = (pairs(tmp_path / name / "last.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(one[key], other[key]) for key in one)


STOCK = """
import sys, torch
from diffusers import FluxPipeline
pipe = FluxPipeline.from_pretrained(sys.argv[1])
pipe.load_lora_weights(sys.argv[2])
assert not any(name.startswith("lora_adapters") for name in sys.modules)
draw = dict(width=64, height=64, num_inference_steps=2, max_sequence_length=16, output_type="pt")
torch.save(pipe("a red disc", generator=torch.Generator().manual_seed(0), **draw).images, sys.argv[3])
"""


@pytest.mark.slow
# Of single blocks in kohya's names diffusers' reader takes none but those of 3072 wide models.
@pytest.mark.parametrize(
    ("module", "args", "form"),
    [
        ("networks.lora_flux", ["exclude_patterns=['.*single.*']"], "kohya"),
        ("networks.lora_flux", [], "diffusers"),
        ("networks.dylora", [], "diffusers"),
    ],
)
def test_the_file_opens_in_the_stock_pipeline_with_the_trained_images(
    options, flux, tmp_path, module, args, form
) -> None:
    options |= {"network_module": module, "max_train_steps": 4, "learning_rate": 0.05, "network_args": args}
    trained = train(settings(**options))
    file = Path(options["output_dir"]) / "last.safetensors"
    if form != "kohya":
        file = Adapter.load(file).save(tmp_path / "other.safetensors", format=form)
    script = tmp_path / "stock.py"
    script.write_text(STOCK)
    subprocess.run([sys.executable, "-P", script, flux, file, tmp_path / "images.pt"], check=True, cwd=tmp_path)
    stock = torch.load(tmp_path / "images.pt")
    models = trained.models
    pipe = models.pipeline(FLUX.sampler("", "", False, models.schedule_config))
    text = models.encode(models.tokenize(["a red disc"]))
    draw = {"width": 64, "height": 64, "num_inference_steps": 2, "output_type": "pt"}
    own = pipe(**FLUX.prompt_arguments(text, text), generator=torch.Generator().manual_seed(0), **draw).images
    torch.testing.assert_close(own, stock, atol=1e-4, rtol=1e-4)
    plain = FluxPipeline.from_pretrained(flux)
    bare = plain("a red disc", generator=torch.Generator().manual_seed(0), max_sequence_length=16, **draw).images
    assert (bare - stock).abs().max() > 1e-3


@pytest.mark.parametrize("module", ["networks.lora", "networks.dylora"])
def test_a_file_in_kohyas_names_opens_here_whatever_the_width(options, flux, module) -> None:
    """With the single blocks, whose fused layers the stock reader cuts as if every model were 3072 wide."""
    options |= {"network_module": module, "max_train_steps": 2, "learning_rate": 0.05, "network_train_unet_only": True}
    trained = train(settings(**options))
    file = Path(options["output_dir"]) / "last.safetensors"
    assert any("single_blocks_0_linear1" in name for name in pairs(file))
    pipe = FluxPipeline.from_pretrained(flux)
    draw = {"width": 64, "height": 64, "num_inference_steps": 2, "max_sequence_length": 16, "output_type": "pt"}

    def images(pipe: FluxPipeline) -> torch.Tensor:
        return pipe("a red disc", generator=torch.Generator().manual_seed(0), **draw).images

    bare = images(pipe)
    pipe.load_lora_weights(file)
    loaded = images(pipe)
    models = trained.models
    torch.testing.assert_close(
        loaded, images(models.pipeline(FLUX.sampler("", "", False, models.schedule_config))), atol=1e-4, rtol=1e-4
    )
    assert (bare - loaded).abs().max() > 1e-3


def test_the_saved_file_says_what_it_is_for(options) -> None:
    train(settings(**options | {"max_train_steps": 1, "timestep_sampling": "shift"}))
    adapter = Adapter.load(Path(options["output_dir"]) / "last.safetensors")
    assert adapter.architecture == "flux"
    assert set(adapter.components) == {"transformer", "text_encoder"}
    entries = adapter.metadata
    assert entries["ss_base_model_version"] == "flux1"
    assert (entries["ss_timestep_sampling"], entries["ss_guidance_scale"]) == ("shift", "3.5")
    assert "modelspec.prediction_type" not in entries


def test_activations_are_estimated_for_a_dylora_that_is_to_be_sorted(options) -> None:
    options |= {"network_module": "networks.dylora", "network_args": ["sort_at=0.3"], "max_train_steps": 4}
    assert activation_bytes(prepare(settings(**options))) > 100_000


def test_t5_is_trained_where_that_is_asked_for(options) -> None:
    options |= {"network_args": ["train_t5xxl=True"], "max_train_steps": 2}
    assert set(train(settings(**options)).adapter.components) == {"transformer", "text_encoder", "text_encoder_2"}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"min_snr_gamma": 5.0}, "--min_snr_gamma is for noise or v prediction"),
        ({"zero_terminal_snr": True}, "--zero_terminal_snr is for noise or v prediction"),
        ({"clip_skip": 2}, "--clip_skip is for"),
        ({"max_token_length": 150}, "--max_token_length is for"),
        ({"mem_eff_attn": True}, "does not support sliced attention"),
        ({"model_prediction_type": "additive"}, "additive does not fit flow matching models"),
        ({"split_mode": True}, "--blocks_to_swap"),
        ({"t5xxl": "t5.safetensors"}, r"--t5xxl t5\.safetensors: there is no such file"),
        ({"ae": "ae.safetensors"}, r"--ae ae\.safetensors: there is no such file"),
        ({"training_shift": 2.0}, "--training_shift is for other models"),
        ({"loss_type": "huber"}, "give constant or exponential"),
        ({"resolution": "72,72", "bucket_reso_steps": 8}, "multiples of 16"),
    ],
)
def test_what_flux_has_not_is_refused_in_a_line(options, asked, said) -> None:
    with pytest.raises(OneLineError, match=said) as caught:
        prepare(settings(**options | asked))
    assert "\n" not in str(caught.value)


def test_options_of_flow_matching_are_refused_for_a_unet(basics) -> None:
    with pytest.raises(OneLineError, match="--timestep_sampling is for flow matching"):
        prepare(settings(**basics, timestep_sampling="uniform"))


@pytest.mark.parametrize("module", ["networks.loha", "networks.lokr"])
def test_other_kinds_are_trained_whose_files_have_parts_of_fused_layers_apart(options, flux, module) -> None:
    options |= {"network_module": module, "max_train_steps": 2, "learning_rate": 0.1, "network_train_unet_only": True}
    trained = train(settings(**options))
    file = Path(options["output_dir"]) / "last.safetensors"
    names = {key.partition(".")[0] for key in pairs(file)}
    assert {"lora_unet_double_blocks_0_img_mlp_0", "lora_transformer_transformer_blocks_0_attn_to_q"} <= names
    again = Adapter.load(file)
    assert set(again.modules) == set(trained.adapter.modules)
    for name, change in trained.adapter.modules.items():
        torch.testing.assert_close(again.modules[name].delta(), change.delta(), atol=1e-6, rtol=1e-4)
    pipe = FluxPipeline.from_pretrained(flux)
    pipe.load_lora_weights(file, adapter_name="a")
    for name, change in Adapter.from_pipeline(pipe, "a").modules.items():
        torch.testing.assert_close(change.delta(), again.modules[name].delta(), atol=1e-6, rtol=1e-4)


def test_files_of_parts_train_as_their_folder_does(options, flux, tmp_path) -> None:
    options |= {"max_train_steps": 2}
    files = options | flux_files(flux, tmp_path / "files") | {"output_dir": str(tmp_path / "other")}
    assert train(settings(**files)).losses == train(settings(**options)).losses
    metadata = Adapter.load(tmp_path / "other" / "last.safetensors").metadata
    assert (metadata["ss_sd_model_name"], metadata["ss_vae_name"]) == ("flux.safetensors", "ae.safetensors")


def test_a_transformer_alone_is_refused_before_anything_is_read(options, flux, tmp_path) -> None:
    file = flux_files(flux, tmp_path)["pretrained_model_name_or_path"]
    with pytest.raises(OneLineError, match=r"name their files with --clip_l \(CLIP-L\), --t5xxl \(T5-XXL\), --ae"):
        check(settings(**options | {"pretrained_model_name_or_path": file}))
