"""Flux.1 and SD3 from files of single parts are the models that Diffusers folders hold."""

import inspect
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file

from lora_adapters.convert.errors import OneLineError
from lora_adapters.convert.families.registry import by_name
from lora_adapters.convert.families.transformer_tensors import from_original, to_original
from lora_adapters.train.models import part_weights
from lora_adapters.train.models.base import load_base_models
from lora_adapters.train.models.flux import FLUX
from lora_adapters.train.models.part_files import check_parts
from lora_adapters.train.models.part_weights import empty, read_weights, weight_names
from lora_adapters.train.models.sd3 import SD3
from lora_adapters.train.options.arguments import settings

from ..transformer_files import flux_files, original_transformer, original_vae, sd3_file, text, with_prefix
from ..transformers import build_flux, build_sd3


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> Path:
    return build_flux(tmp_path_factory.mktemp("models") / "flux")


@pytest.fixture(scope="module")
def sd3(tmp_path_factory) -> Path:
    return build_sd3(tmp_path_factory.mktemp("models") / "sd3", dual=(0,))


@pytest.fixture(scope="module")
def files(flux, tmp_path_factory) -> dict[str, str]:
    return flux_files(flux, tmp_path_factory.mktemp("files"))


def loaded(**options):
    return load_base_models(settings(**options))


def same(one, other) -> None:
    """All weights of two base models, and what they make of a text."""
    assert one.kind == other.kind
    assert one.schedule_config == other.schedule_config
    for mine, theirs in zip(
        (*one.text_encoders, one.vae, one.denoiser), (*other.text_encoders, other.vae, other.denoiser), strict=True
    ):
        assert type(mine) is type(theirs)
        found, expected = mine.state_dict(), theirs.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    with torch.no_grad():
        mine, theirs = (models.encode(models.tokenize(["a red disc"])) for models in (one, other))
    torch.testing.assert_close(mine.hidden, theirs.hidden)
    torch.testing.assert_close(mine.pooled, theirs.pooled)


# --- the names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "kind", "function"),
    [
        ("flux", FluxTransformer2DModel, "convert_flux_transformer_checkpoint_to_diffusers"),
        ("sd3", SD3Transformer2DModel, "convert_sd3_transformer_checkpoint_to_diffusers"),
    ],
)
def test_tensors_are_read_as_diffusers_reads_them(request, family, kind, function) -> None:
    original = original_transformer(request.getfixturevalue(family), family)
    # diffusers' function is for models 3072 wide.
    code = inspect.getsource(getattr(single_file_utils, function)).replace("inner_dim = 3072", "inner_dim = 32")
    names = dict(vars(single_file_utils))
    exec(code, names)
    expected = names[function](dict(original))
    found = from_original(by_name(family).denoiser.layout, expected, original)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert expected.keys() == kind.from_pretrained(request.getfixturevalue(family) / "transformer").state_dict().keys()


# --- the models -----------------------------------------------------------------------------------------------------


def test_flux_from_four_files(flux, files) -> None:
    models = loaded(**files)
    same(models, loaded(pretrained_model_name_or_path=str(flux)))
    t5 = models.text_encoders[1]
    assert t5.shared.weight is t5.encoder.embed_tokens.weight
    assert not any(one.is_meta for one in (*t5.buffers(), *models.text_encoders[0].buffers()))


@pytest.mark.parametrize("whole", [False, True])
def test_sd3_from_one_file(sd3, tmp_path, whole) -> None:
    options = sd3_file(sd3, tmp_path / "sd3.safetensors")
    same(
        loaded(**options, disable_mmap_load_safetensors=whole),
        loaded(pretrained_model_name_or_path=str(sd3)),
    )


def test_sd3_without_text_encoders_in_its_file(sd3, tmp_path) -> None:
    options = sd3_file(sd3, tmp_path / "sd3.safetensors", texts=())
    for name, component in (("clip_l", "text_encoder"), ("clip_g", "text_encoder_2"), ("t5xxl", "text_encoder_3")):
        save_file(text(sd3, component), tmp_path / f"{name}.safetensors")
        options[name] = str(tmp_path / f"{name}.safetensors")
    same(loaded(**options), loaded(pretrained_model_name_or_path=str(sd3)))


def test_comfyuis_whole_file_of_flux(flux, tmp_path) -> None:
    tensors = with_prefix("model.diffusion_model.", original_transformer(flux, "flux"))
    tensors |= with_prefix("vae.", original_vae(flux))
    tensors |= with_prefix("text_encoders.clip_l.transformer.", text(flux, "text_encoder"))
    tensors |= with_prefix("text_encoders.t5xxl.transformer.", text(flux, "text_encoder_2"))
    save_file(tensors, tmp_path / "all.safetensors")
    same(
        loaded(pretrained_model_name_or_path=str(tmp_path / "all.safetensors"), model_config=str(flux)),
        loaded(pretrained_model_name_or_path=str(flux)),
    )


def test_files_in_place_of_a_folders_parts(flux, files, tmp_path) -> None:
    weights = {name: one + 1 for name, one in load_file(files["t5xxl"]).items()}
    save_file(weights, tmp_path / "t5.safetensors")
    vae = {name: one + 1 for name, one in load_file(flux / "vae" / "diffusion_pytorch_model.safetensors").items()}
    save_file(vae, tmp_path / "vae.safetensors")
    options = {"t5xxl": str(tmp_path / "t5.safetensors"), "vae": str(tmp_path / "vae.safetensors")}
    models = loaded(pretrained_model_name_or_path=str(flux), **options)
    assert torch.equal(models.text_encoders[1].shared.weight, weights["shared.weight"])
    assert torch.equal(models.vae.decoder.conv_in.weight, vae["decoder.conv_in.weight"])
    plain = loaded(pretrained_model_name_or_path=str(flux))
    assert torch.equal(models.denoiser.x_embedder.weight, plain.denoiser.x_embedder.weight)


def test_float8_files_with_scales_and_without(flux, files, tmp_path) -> None:
    for name in ("pretrained_model_name_or_path", "t5xxl"):
        tensors = {}
        for key, weight in load_file(files[name]).items():
            scaled = name == "t5xxl" and key.endswith("weight") and weight.ndim == 2
            scale = weight.abs().max() / 448 if scaled else torch.tensor(1.0)
            tensors[key] = (weight / scale).to(torch.float8_e4m3fn)
            if scaled:
                tensors[key.removesuffix("weight") + "scale_weight"] = scale
        save_file(tensors, tmp_path / Path(files[name]).name)
        files = {**files, name: str(tmp_path / Path(files[name]).name)}
    models, exact = loaded(**files), loaded(pretrained_model_name_or_path=str(flux))
    for mine, theirs in ((models.denoiser, exact.denoiser), (models.text_encoders[1], exact.text_encoders[1])):
        for name, weight in theirs.state_dict().items():
            found = mine.state_dict()[name]
            assert found.dtype == torch.float32
            assert (found - weight).abs().max() <= 0.0625 * weight.abs().max() + 0.002


def test_checking_for_parts_converts_no_weight(files, tmp_path, monkeypatch) -> None:
    """Those of a scaled float8 file would take 24 GB at Flux.1's size."""
    tensors = {}
    for key, weight in load_file(files["pretrained_model_name_or_path"]).items():
        tensors[key] = weight.to(torch.float8_e4m3fn)
        if key.endswith("weight") and weight.ndim == 2:
            tensors[key.removesuffix("weight") + "scale_weight"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "flux.safetensors")
    assert weight_names(tmp_path / "flux.safetensors") == list(read_weights(tmp_path / "flux.safetensors", False))

    def convert(*_):
        raise AssertionError("a weight is converted")

    monkeypatch.setattr(part_weights, "dequantised", convert)
    files = {**files, "pretrained_model_name_or_path": str(tmp_path / "flux.safetensors")}
    check_parts(settings(**files), FLUX)
    with pytest.raises(OneLineError, match=r"lacks parts of the model: name their files with --t5xxl \(T5-XXL\)"):
        check_parts(settings(**{**files, "t5xxl": None}), FLUX)


# --- the configs of the released models -----------------------------------------------------------------------------


def released(kind, layout, **config) -> dict[str, tuple[int, ...]]:
    """The shapes of an original file of diffusers' model with that config."""
    shapes = {name: tuple(one.shape) for name, one in empty(lambda: kind(**config)).state_dict().items()}
    made = {}
    for name, origin in to_original(layout, shapes).items():
        first, *rest = (shapes[key] for key in origin.keys)
        made[name] = (first[0] + sum(shape[0] for shape in rest), *first[1:])
    return made


@pytest.mark.parametrize("dev", [True, False])
def test_flux_is_told_by_its_shapes(dev) -> None:
    config = {
        "num_layers": 2, "num_single_layers": 3, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
        "guidance_embeds": dev,
    }  # fmt: skip
    shapes = released(FluxTransformer2DModel, by_name("flux").denoiser.layout, **config)
    expected = empty(lambda: FluxTransformer2DModel(**config)).config
    made = empty(lambda: FluxTransformer2DModel.from_config(FLUX.denoiser_config(shapes))).config
    assert {name: made[name] for name in made if name[0] != "_"} == {
        name: expected[name] for name in made if name[0] != "_"
    }
    denoiser = SimpleNamespace(config=SimpleNamespace(guidance_embeds=dev))
    assert FLUX.scheduler_config(denoiser) == {"shift": 3.0 if dev else 1.0, "use_dynamic_shifting": dev}


@pytest.mark.parametrize(
    ("heads", "size", "dual", "norm"),
    [(24, 192, (), None), (24, 384, (0, 1), "rms_norm"), (38, 192, (), "rms_norm")],  # 3 medium, 3.5 medium, 3.5 large
)
def test_sd3_is_told_by_its_shapes(heads, size, dual, norm) -> None:
    config = {
        "sample_size": 128, "patch_size": 2, "in_channels": 16, "num_layers": 3, "attention_head_dim": 64,
        "num_attention_heads": heads, "joint_attention_dim": 4096, "caption_projection_dim": 64 * heads,
        "pooled_projection_dim": 2048, "out_channels": 16, "pos_embed_max_size": size, "dual_attention_layers": dual,
        "qk_norm": norm,
    }  # fmt: skip
    shapes = released(SD3Transformer2DModel, by_name("sd3").denoiser.layout, **config)
    assert math.isqrt(shapes["pos_embed"][1]) == size
    assert SD3.denoiser_config(shapes) == config


def test_text_encoders_and_vaes_have_the_released_sizes() -> None:
    """Millions of weights: those of the released models."""
    sizes = {}
    for part in SD3.text_parts.values():
        with torch.device("meta"):
            model = part.model(part.model.config_class(**part.config))
        sizes[part.option] = round(sum(one.numel() for one in model.parameters()) / 1e6)
    assert sizes == {"clip_l": 124, "clip_g": 695, "t5xxl": 4762}
    vae = empty(lambda: AutoencoderKL.from_config(dict(FLUX.vae_config)))
    assert round(sum(one.numel() for one in vae.parameters()) / 1e6) == 84


# --- tokenizers -----------------------------------------------------------------------------------------------------


def test_tokenizers_as_kohyas_trainers_keep_them(flux, tmp_path, monkeypatch) -> None:
    from transformers import AutoTokenizer

    from lora_adapters.train.models.part_files import _tokenizers

    for component, name in (("tokenizer", "openai_clip-vit-large-patch14"), ("tokenizer_2", "google_t5-v1_1-xxl")):
        AutoTokenizer.from_pretrained(flux, subfolder=component).save_pretrained(tmp_path / name)
    found = _tokenizers(FLUX, settings(tokenizer_cache_dir=str(tmp_path)))
    plain = loaded(pretrained_model_name_or_path=str(flux)).tokenizers
    for mine, theirs in zip(found.values(), plain, strict=True):
        assert mine("a red disc").input_ids == theirs("a red disc").input_ids


# --- what is wrong is said in a line --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"clip_l": None, "ae": None}, r"name their files with --clip_l \(CLIP-L\), --ae \(the VAE\)"),
        ({"t5xxl": "none.safetensors"}, "--t5xxl none.safetensors: there is no such file"),
        ({"vae": "x"}, "--ae and --vae both name the VAE"),
        ({"model_config": None}, "give --model_config=<Diffusers folder"),
    ],
)
def test_what_is_missing_is_said(files, changed, said) -> None:
    with pytest.raises(OneLineError, match=said) as caught:
        loaded(**{name: value for name, value in (files | changed).items() if value})
    assert "\n" not in str(caught.value)


def test_a_file_of_another_model_is_named(files, flux, sd3, tmp_path) -> None:
    for option, other, said in (
        ("clip_l", files["t5xxl"], "it lacks"),
        ("ae", files["clip_l"], "it lacks"),
    ):
        with pytest.raises(OneLineError, match=said) as caught:
            loaded(**files | {option: other})
        assert other in str(caught.value)
    whole = load_file(files["pretrained_model_name_or_path"])
    whole["img_in.weight"] = torch.zeros(32, 4)
    save_file(whole, tmp_path / "thin.safetensors")
    with pytest.raises(OneLineError, match=r"x_embedder.weight is \[32, 4\], not \[32, 16\]"):
        loaded(**files | {"pretrained_model_name_or_path": str(tmp_path / "thin.safetensors")})
    del whole["img_in.weight"]
    save_file(whole, tmp_path / "part.safetensors")
    with pytest.raises(OneLineError, match=r"it lacks img_in\.weight"):
        loaded(**files | {"pretrained_model_name_or_path": str(tmp_path / "part.safetensors")})


def test_fill_and_control_are_refused() -> None:
    shapes = released(FluxTransformer2DModel, by_name("flux").denoiser.layout, num_layers=1, num_single_layers=1,
                      in_channels=384, out_channels=64)  # fmt: skip
    with pytest.raises(OneLineError, match="with 384 input and 64 output channels"):
        FLUX.denoiser_config(shapes)
