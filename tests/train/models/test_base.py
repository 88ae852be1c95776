import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_adapters.train.errors import TrainingError
from lora_adapters.train.models.base import check_path, family_on_disk, load_base_models
from lora_adapters.train.models.registry import FAMILIES
from lora_adapters.train.options.arguments import settings
from tests.train.single_files import checkpoint


def test_sd1_folder(sd1) -> None:
    models = load_base_models(settings(pretrained_model_name_or_path=sd1))
    assert (models.kind, models.family.name, models.prediction_type) == ("sd1", "sd", "epsilon")
    assert set(models.components) == {"unet", "text_encoder"}
    assert not any(p.requires_grad for p in models.denoiser.parameters())
    schedule = models.noise_schedule()
    assert float(schedule.alphas_cumprod[0]) == pytest.approx(1 - 0.00085)
    assert float(models.noise_schedule(zero_terminal_snr=True).alphas_cumprod[-1]) == pytest.approx(0, abs=1e-6)


def test_sdxl_folder(sdxl) -> None:
    models = load_base_models(settings(pretrained_model_name_or_path=sdxl))
    assert (models.kind, models.family.name) == ("sdxl", "sdxl")
    assert set(models.components) == {"unet", "text_encoder", "text_encoder_2"}
    with pytest.raises(TrainingError, match="is SDXL"):
        load_base_models(settings(pretrained_model_name_or_path=sdxl, v2=True))


def test_v2_and_v_prediction(sd1) -> None:
    models = load_base_models(settings(pretrained_model_name_or_path=sd1, v2=True, v_parameterization=True))
    assert (models.kind, models.v_prediction) == ("sd2", True)
    assert models.noise_schedule().config.prediction_type == "v_prediction"


def test_another_vae(sd1, sdxl) -> None:
    own = load_base_models(settings(pretrained_model_name_or_path=sd1)).vae
    for source in (sdxl, sdxl / "vae"):  # a whole model's, or the VAE's own folder
        other = load_base_models(settings(pretrained_model_name_or_path=sd1, vae=source)).vae
        expected = load_file(sdxl / "vae" / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(value, expected[name]) for name, value in other.state_dict().items())
    assert own.dtype == torch.float32
    with pytest.raises(TrainingError, match="--vae /nowhere cannot be loaded"):
        load_base_models(settings(pretrained_model_name_or_path=sd1, vae="/nowhere"))


def test_the_family_is_known_without_loading(sd1, sdxl, tmp_path) -> None:
    found = [family_on_disk(settings(pretrained_model_name_or_path=path)) for path in (sd1, sdxl, "a/hub-id")]
    assert found == [FAMILIES["sd"], FAMILIES["sdxl"], None]
    save_file({"conditioner.embedders.1.x": torch.zeros(1)}, tmp_path / "xl.safetensors")
    assert family_on_disk(settings(pretrained_model_name_or_path=tmp_path / "xl.safetensors")) is FAMILIES["sdxl"]


def test_a_text_encoder_that_lacks_weights_is_not_filled_at_random(sd1, tmp_path) -> None:
    folder = shutil.copytree(sd1, tmp_path / "model")
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    save_file({key.replace("mlp.fc1", "mlp.first"): one for key, one in tensors.items()}, file, {"format": "pt"})
    with pytest.raises(TrainingError, match=r"text_encoder lacks .*mlp\.fc1"):
        load_base_models(settings(pretrained_model_name_or_path=folder))


def test_single_file_names_what_is_missing(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    save_file({"model.diffusion_model.x": torch.zeros(1)}, tmp_path / "m.safetensors")
    with pytest.raises(TrainingError, match="--model_config=<Diffusers folder of the same kind of model>"):
        load_base_models(settings(pretrained_model_name_or_path=tmp_path / "m.safetensors"))


def test_pickles_that_run_code_are_refused(tmp_path) -> None:
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save({"state_dict": Evil()}, tmp_path / "m.ckpt")
    with pytest.raises(TrainingError, match="cannot be read as plain weights"):
        load_base_models(settings(pretrained_model_name_or_path=tmp_path / "m.ckpt"))


def test_broken_file(tmp_path) -> None:
    (tmp_path / "m.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(TrainingError, match="is not a safetensors file"):
        load_base_models(settings(pretrained_model_name_or_path=tmp_path / "m.safetensors"))


@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_single_file_with_configs_from_a_folder(sd1, tmp_path, monkeypatch, ending) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    file = tmp_path / f"m.{ending}"
    if ending == "ckpt":
        torch.save({"state_dict": checkpoint(sd1), "global_step": 1}, file)
    else:
        save_file(checkpoint(sd1), file)
    folder = load_base_models(settings(pretrained_model_name_or_path=sd1))
    single = load_base_models(settings(pretrained_model_name_or_path=file, model_config=sd1))
    assert single.kind == "sd1"
    for name in ("unet", "text_encoder", "vae"):
        expected = getattr(folder.pipeline(None), name).state_dict()
        state = getattr(single.pipeline(None), name).state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in state.items())


@pytest.mark.parametrize("name", [r"C:\models\x", "C:/x", r".\x", r"..\x", r"models\x", "./x"])
def test_what_can_only_be_a_path_is_not_looked_for_on_the_hub(name) -> None:
    with pytest.raises(TrainingError) as caught:
        check_path(settings(pretrained_model_name_or_path=name))
    assert str(caught.value) == f"base model {name} does not exist"
    check_path(settings(pretrained_model_name_or_path="owner/name"))  # may be one of the Hub
