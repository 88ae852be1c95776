"""The base model's own noise schedule is trained on and drawn with."""

import json
import logging
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from safetensors.torch import save_file

from lora_adapters.train.errors import TrainingError
from lora_adapters.train.models.base import BaseModels, load_base_models
from lora_adapters.train.models.schedulers import sampler
from lora_adapters.train.options.arguments import settings
from lora_adapters.train.training.loop import train
from lora_adapters.train.training.setup import prepare
from tests.train.single_files import checkpoint


@pytest.fixture
def model(sd1, tmp_path):
    """Makes a copy of the tiny model with another scheduler config."""

    def make(**changes) -> str:
        folder = shutil.copytree(sd1, tmp_path / "model")
        file = folder / "scheduler" / "scheduler_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        if "_class_name" in changes:
            index = folder / "model_index.json"
            entries = json.loads(index.read_text())
            entries["scheduler"][1] = changes["_class_name"]
            index.write_text(json.dumps(entries))
        return str(folder)

    return make


OWN = {"beta_start": 0.001, "beta_end": 0.02, "beta_schedule": "linear"}


def loaded(path: str, **options) -> BaseModels:
    return load_base_models(settings(pretrained_model_name_or_path=path, **options))


def test_betas_of_the_scheduler_config(model, caplog) -> None:
    caplog.set_level(logging.INFO)
    models = loaded(model(**OWN))
    expected = torch.cumprod(1 - torch.linspace(0.001, 0.02, 1000), 0)
    torch.testing.assert_close(models.noise_schedule().alphas_cumprod, expected)
    torch.testing.assert_close(sampler("ddim", "epsilon", base=models.schedule_config).alphas_cumprod, expected)
    assert "beta_start=0.001, beta_end=0.02, beta_schedule=linear" in caplog.text


def test_betas_one_by_one(model) -> None:
    trained = torch.linspace(0.002, 0.01, 1000)
    models = loaded(model(trained_betas=trained.tolist()))
    torch.testing.assert_close(models.noise_schedule().alphas_cumprod, torch.cumprod(1 - trained, 0))


def test_zero_terminal_snr_and_v_prediction(model, basics, tmp_path) -> None:
    path = model(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    options = settings(**{**basics, "pretrained_model_name_or_path": path, "min_snr_gamma": 5.0})
    run = prepare(options)
    assert run.loss.objective.schedule.alphas_cumprod[-1] == 0
    assert run.loss.options.loss.v_prediction
    assert run.loss.tables.weights[-1] == 0  # min(snr, gamma) / (snr + 1) at an SNR of 0
    asked = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True}
    torch.testing.assert_close(run.loss.objective.schedule.alphas_cumprod, DDPMScheduler(**asked).alphas_cumprod)
    made = sampler("ddim", "v_prediction", base=run.models.schedule_config)
    assert (made.alphas_cumprod[-1], made.config.timestep_spacing) == (0, "trailing")
    assert train(options).adapter.metadata["ss_zero_terminal_snr"] == "True"


def test_a_sampler_that_cannot_start_from_noise_is_named_before_training(model, basics, tmp_path) -> None:
    (tmp_path / "prompts.txt").write_text("a red disc --w 64 --h 64 --s 2 --ss lms")
    path = model(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    options = {**basics, "pretrained_model_name_or_path": path, "sample_every_n_steps": 2}
    with pytest.raises(
        TrainingError, match=r"was trained with zero terminal SNR, and the sampler lms does not support"
    ):
        prepare(settings(**options, sample_prompts=tmp_path / "prompts.txt"))


def test_trailing_timesteps_are_kept() -> None:
    for name in ("ddim", "euler", "dpmsolver++", "heun"):
        assert sampler(name, "epsilon", base={"timestep_spacing": "trailing"}).config.timestep_spacing == "trailing"
    assert sampler("ddim", "epsilon", base={"timestep_spacing": "leading"}).config.timestep_spacing == "leading"


def test_the_usual_schedule_is_not_mentioned(sd1, caplog) -> None:
    caplog.set_level(logging.INFO)
    models = loaded(str(sd1))
    assert "noise schedule" not in caplog.text
    same = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    torch.testing.assert_close(models.noise_schedule().alphas_cumprod, same.alphas_cumprod)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "EDMEulerScheduler"}, r"was trained with EDM's continuous noise levels \(EDMEulerScheduler\)"),
        ({"num_train_timesteps": 500}, "has 500 timesteps in its scheduler config; 1000 are supported"),
        ({"_class_name": "DDPMScheduler", "beta_schedule": "sigmoid"}, "has the beta_schedule sigmoid"),
        ({"prediction_type": "sample"}, "has the prediction_type sample in its scheduler config"),
    ],
)
def test_what_cannot_be_made_is_refused(model, changes, message) -> None:
    with pytest.raises(TrainingError, match=message):
        loaded(model(**changes))


def test_marks_of_a_single_file(sd1, tmp_path) -> None:
    """Checkpoints of v-prediction models carry empty keys, which say what no config beside the file can."""
    weights = checkpoint(sd1)
    save_file({**weights, "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, tmp_path / "marked.safetensors")
    models = loaded(str(tmp_path / "marked.safetensors"), model_config=str(sd1))
    assert (models.v_prediction, models.zero_terminal_snr) == (True, True)
    save_file(weights, tmp_path / "plain.safetensors")
    models = loaded(str(tmp_path / "plain.safetensors"), model_config=str(sd1))
    assert (models.v_prediction, models.zero_terminal_snr) == (False, False)
