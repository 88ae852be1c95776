import pytest
import torch

from lora_adapters.train.objective.losses import LossOptions
from lora_adapters.train.objective.noise import NoiseOptions
from lora_adapters.train.objective.step_loss import Denoiser, StepLoss, StepOptions
from lora_adapters.train.options.arguments import settings
from lora_adapters.train.training.setup import prepare
from lora_adapters.train.training.validation import fixed_timesteps, held_out_losses


def test_timesteps_are_the_middles_of_equal_parts() -> None:
    assert fixed_timesteps(0, 1000) == [125, 375, 625, 875]
    assert fixed_timesteps(100, 108) == [101, 103, 105, 107]


def test_the_same_again_and_untouched_by_random_state(basics) -> None:
    run = prepare(settings(**{**basics, "network_module": "networks.dylora", "validation_split": 0.25}))
    run.training_mode(False)
    models = list(run.trained.values())
    first = held_out_losses(run.loss, run.data.validation, models, 0, run.accelerator, None)
    torch.randn(5)
    assert held_out_losses(run.loss, run.data.validation, models, 0, run.accelerator, None) == first
    assert [one.rank for one in first] == [1, 2]
    with torch.no_grad():
        for layer in run.layers:
            layer.lora_B["default"].weight[:, 1:] = 1
    changed = held_out_losses(run.loss, run.data.validation, models, 0, run.accelerator, None)
    assert changed[0].loss == pytest.approx(first[0].loss)  # rank 1 does not see the second component
    assert changed[1].loss != first[1].loss


def test_the_held_out_loss_is_the_mean_over_timesteps(sd1, fake_batch) -> None:
    from lora_adapters.train.models.base import load_base_models

    models = load_base_models(settings(pretrained_model_name_or_path=sd1))
    denoiser = Denoiser(models, None, train_text=False)
    options = StepOptions(NoiseOptions(), LossOptions())
    loss = StepLoss(models, denoiser, models.noise_schedule(), options, torch.device("cpu"))
    batch = fake_batch(3)
    parts = [loss.held_out(batch, [timestep]) for timestep in (100, 500)]
    torch.testing.assert_close(loss.held_out(batch, [100, 500]), (parts[0] + parts[1]) / 2)
    one = fake_batch(3, **{name: getattr(batch, name)[1:2] for name in vars(batch) if getattr(batch, name) is not None})
    torch.testing.assert_close(loss.held_out(one, [100])[0], parts[0][1], rtol=1e-4, atol=1e-5)
