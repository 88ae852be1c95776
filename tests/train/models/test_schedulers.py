import pytest
import torch

from lora_adapters.train.errors import TrainingError
from lora_adapters.train.models.schedulers import check_sampler, sampler
from lora_adapters.train.options.arguments import parser
from lora_adapters.train.samplers import SAMPLERS


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_is_there_and_keeps_the_prediction(name) -> None:
    if name.endswith("lms"):
        pytest.importorskip("scipy")
    made = sampler(name, "v_prediction")
    assert made.config.prediction_type == "v_prediction"
    assert (made.config.beta_start, made.config.beta_end) == (0.00085, 0.012)
    made.set_timesteps(4)


def test_the_trainer_offers_the_same() -> None:
    offered = next(action.choices for action in parser()._actions if action.dest == "sample_sampler")
    assert list(offered) == list(SAMPLERS)


def test_zero_terminal_snr_ends_in_pure_noise_or_is_refused() -> None:
    for name in ("ddim", "euler", "k_euler_a", "dpmsolver++"):
        made = sampler(name, "v_prediction", zero_terminal_snr=True)
        made.set_timesteps(10)
        assert made.alphas_cumprod[-1] < 1e-6
        assert made.timesteps[0] == 999
    with pytest.raises(
        TrainingError, match="sampler k_lms does not support --zero_terminal_snr; use one of ddim, euler"
    ):
        sampler("k_lms", "v_prediction", zero_terminal_snr=True)


def test_an_unknown_name() -> None:
    with pytest.raises(TrainingError, match="unknown sampler fast; known are ddim, pndm"):
        check_sampler("fast")


def test_the_offset_of_steps() -> None:
    def first(offset):
        made = sampler("ddim", "epsilon", steps_offset=offset)
        made.set_timesteps(10)
        return torch.as_tensor(made.timesteps).tolist()

    assert first(None) == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
    assert first(0) == [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
