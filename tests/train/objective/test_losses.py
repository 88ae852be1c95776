import math

import pytest
import torch
from diffusers import DDPMScheduler

from lora_adapters.train.errors import TrainingError
from lora_adapters.train.objective.losses import (
    LossOptions,
    TimestepTables,
    elementwise,
    loss_per_sample,
    timestep_weights,
)
from lora_adapters.train.options.arguments import settings

ALPHAS = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod


def snr_of(timestep: int) -> float:
    return float(ALPHAS[timestep] / (1 - ALPHAS[timestep]))


def weight(snr: float, **options) -> float:
    return timestep_weights(torch.tensor([snr], dtype=torch.float64), LossOptions(**options)).item()


def test_min_snr() -> None:
    assert weight(20.0, min_snr_gamma=5) == pytest.approx(5 / 20)
    assert weight(2.0, min_snr_gamma=5) == 1
    assert weight(0.0, min_snr_gamma=5) == 1  # zero terminal SNR
    assert weight(20.0, min_snr_gamma=5, v_prediction=True) == pytest.approx(5 / 21)
    assert weight(2.0, min_snr_gamma=5, v_prediction=True) == pytest.approx(2 / 3)


def test_debiased_estimation() -> None:
    assert weight(4.0, debiased_estimation_loss=True) == pytest.approx(0.5)
    assert weight(4.0, debiased_estimation_loss=True, v_prediction=True) == pytest.approx(0.2)
    assert weight(1e6, debiased_estimation_loss=True) == pytest.approx(1 / math.sqrt(1000))
    assert math.isfinite(weight(0.0, debiased_estimation_loss=True))


def test_losses_of_v_and_noise() -> None:
    assert weight(3.0, scale_v_pred_loss_like_noise_pred=True, v_prediction=True) == pytest.approx(0.75)
    assert weight(3.0, v_pred_like_loss=0.5) == pytest.approx(1 + 0.5 / 0.75)
    assert math.isfinite(weight(0.0, v_pred_like_loss=0.5))


def test_weights_multiply() -> None:
    both = weight(3.0, v_prediction=True, min_snr_gamma=2, scale_v_pred_loss_like_noise_pred=True)
    assert both == pytest.approx(2 / 4 * 0.75)


def test_shapes_of_the_loss() -> None:
    predicted, target, c = torch.tensor([3.0]), torch.tensor([1.0]), torch.tensor([0.5])
    root = math.sqrt(2**2 + 0.5**2)
    assert elementwise(predicted, target, "l2", None).item() == 4
    assert elementwise(predicted, target, "l1", None).item() == 2
    assert elementwise(predicted, target, "huber", c).item() == pytest.approx(2 * 0.5 * (root - 0.5))
    assert elementwise(predicted, target, "smooth_l1", c).item() == pytest.approx(2 * (root - 0.5))


def test_huber_uses_the_width_of_each_timestep() -> None:
    predicted, target = torch.full((2, 1, 1, 1), 2.0), torch.zeros(2, 1, 1, 1)
    options = LossOptions(loss_type="huber", huber_schedule="snr", huber_c=0.1)
    tables = TimestepTables.of(ALPHAS, options)
    found = loss_per_sample(predicted, target, torch.tensor([10, 900]), tables, options.loss_type)
    for value, timestep in zip(found.tolist(), (10, 900), strict=True):
        c = 0.9 / (1 + 1 / math.sqrt(snr_of(timestep))) ** 2 + 0.1
        assert value == pytest.approx(2 * c * (math.sqrt(4 + c * c) - c), rel=1e-5)


def test_mask_is_resized_by_area_and_not_renormalised() -> None:
    predicted, target = torch.ones(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2, :1] = 1  # half of the upper left quarter
    timestep, tables = torch.tensor([500]), TimestepTables.of(ALPHAS, LossOptions())
    masked = loss_per_sample(predicted, target, timestep, tables, mask=mask)
    assert masked.item() == pytest.approx(0.5 / 4)
    assert loss_per_sample(predicted, target, timestep, tables).item() == 1


def test_contradicting_options() -> None:
    with pytest.raises(TrainingError, match="v_pred_like_loss"):
        LossOptions.of(settings(v_pred_like_loss=1.0), v_prediction=True)
    with pytest.raises(TrainingError, match="scale_v_pred"):
        LossOptions.of(settings(scale_v_pred_loss_like_noise_pred=True), v_prediction=False)
