"""Flow matching against closed form: noised latents, targets, how t is drawn, weights of the loss."""

import math

import pytest
import torch

from lora_adapters.train.objective.flow_matching import FlowMatching, FlowOptions, draw, flux_shift, shifted
from lora_adapters.train.objective.losses import LossOptions, loss_per_sample
from lora_adapters.train.objective.noise import NoiseOptions, generator

SIZE = torch.Size((1, 16, 8, 8))
COUNT = 4000


def drawn(**options) -> torch.Tensor:
    generators = [generator("t", number) for number in range(COUNT)]
    return draw(generators, FlowOptions(**options), SIZE).double()


def quantiles(values: torch.Tensor) -> list[float]:
    return torch.quantile(values, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()


def near(found: list[float], wanted: list[float]) -> bool:
    return found == pytest.approx(wanted, abs=0.03)


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


NORMAL = (-1.2816, 0.0, 1.2816)  # 10, 50 and 90 %


def test_shift_and_its_value_for_flux() -> None:
    assert shifted(torch.tensor([0.0, 0.5, 1.0]), 3.0).tolist() == [0.0, 0.75, 1.0]
    assert math.log(flux_shift(256)) == pytest.approx(0.5)
    assert math.log(flux_shift(4096)) == pytest.approx(1.15)
    mu, t = math.log(flux_shift(1024)), 0.3
    assert shifted(torch.tensor(t), flux_shift(1024)).item() == pytest.approx(
        math.exp(mu) / (math.exp(mu) + (1 / t - 1))
    )


def test_how_t_is_drawn() -> None:
    assert near(quantiles(drawn(timestep_sampling="uniform")), [0.1, 0.5, 0.9])
    assert near(quantiles(drawn(timestep_sampling="sigmoid")), [logistic(z) for z in NORMAL])
    assert near(quantiles(drawn(timestep_sampling="sigmoid", sigmoid_scale=2.0)), [logistic(2 * z) for z in NORMAL])
    moved = [3 * logistic(z) / (1 + 2 * logistic(z)) for z in NORMAL]
    assert near(quantiles(drawn(timestep_sampling="shift", shift=3.0)), moved)
    s = flux_shift(16)
    assert near(quantiles(drawn(timestep_sampling="flux_shift")), [logistic(z + math.log(s)) for z in NORMAL])


def test_sigma_draws_one_of_1000_steps_shifted() -> None:
    found = drawn(timestep_sampling="sigma", shift=3.0)
    assert near(quantiles(found), [3 * q / (1 + 2 * q) for q in (0.1, 0.5, 0.9)])
    plain = drawn(timestep_sampling="sigma", shift=1.0) * 1000
    assert torch.allclose(plain, plain.round(), atol=1e-3)
    assert 1 <= plain.min() <= plain.max() <= 1000
    normal = {"timestep_sampling": "sigma", "shift": 1.0, "weighting_scheme": "logit_normal"}
    assert near(quantiles(drawn(**normal, logit_mean=1.0, logit_std=0.5)), [1 - logistic(1 - z / 2) for z in NORMAL])
    mode = [1 - u - 1.29 * (math.cos(math.pi * u / 2) ** 2 - 1 + u) for u in (0.9, 0.5, 0.1)]
    found = drawn(timestep_sampling="sigma", shift=1.0, weighting_scheme="mode")
    assert near(quantiles(found), sorted(1 - u for u in mode))


def test_the_density_of_sd3_is_over_t_itself() -> None:
    found = drawn(timestep_sampling="density", shift=3.0, weighting_scheme="logit_normal", logit_mean=1.0)
    wanted = [3 * logistic(1 + z) / (1 + 2 * logistic(1 + z)) for z in NORMAL]
    assert near(quantiles(found), wanted)


def test_a_sample_has_the_same_t_in_any_batch() -> None:
    options = FlowOptions(timestep_sampling="sigma", weighting_scheme="logit_normal")
    both = draw([generator("t", 1), generator("t", 2)], options, SIZE)
    assert draw([generator("t", 2)], options, SIZE)[0] == both[1]


def test_timesteps_stay_within_their_limits() -> None:
    flow = FlowMatching(FlowOptions(timestep_sampling="uniform"))
    limits = NoiseOptions(min_timestep=200, max_timestep=300)
    found = flow.draw([generator("t", number) for number in range(COUNT)], limits, torch.zeros(SIZE))
    assert 200 <= found.min() < 205
    assert 295 < found.max() < 300


@pytest.fixture
def tensors() -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 4, 4, 4, generator=g), torch.randn(2, 4, 4, 4, generator=g)
    return latents, noise, torch.tensor([250.0, 800.0])


def test_noised_latents_and_the_velocity(tensors) -> None:
    latents, noise, timesteps = tensors
    flow = FlowMatching(FlowOptions())
    noisy = flow.noised(latents, noise, timesteps)
    torch.testing.assert_close(noisy[0], 0.75 * latents[0] + 0.25 * noise[0])
    torch.testing.assert_close(noisy[1], 0.2 * latents[1] + 0.8 * noise[1])
    assert torch.equal(flow.target(latents, noise, timesteps), noise - latents)
    assert flow.compared(noise, noisy, timesteps) is noise


@pytest.mark.parametrize(
    ("scheme", "weight"),
    [
        ("none", lambda t: 1.0),
        ("sigma_sqrt", lambda t: t**-2),
        ("cosmap", lambda t: 2 / (math.pi * (1 - 2 * t + 2 * t * t))),
    ],
)
def test_the_loss_of_the_image_is_that_of_the_velocity_times_t_squared(tensors, scheme, weight) -> None:
    latents, noise, timesteps = tensors
    flow = FlowMatching(FlowOptions(sigma_scaled=True, weighting_scheme=scheme))
    noisy, wrong = flow.noised(latents, noise, timesteps), noise - latents + 0.5
    found = loss_per_sample(
        flow.compared(wrong, noisy, timesteps),
        flow.target(latents, noise, timesteps),
        timesteps,
        flow.tables(LossOptions(), "cpu"),
    )
    wanted = torch.tensor([weight(t) * (0.5 * t) ** 2 for t in (0.25, 0.8)])
    torch.testing.assert_close(found, wanted)


def test_hubers_c() -> None:
    timesteps = torch.tensor([0.0, 500.0, 1000.0])
    options = LossOptions(loss_type="huber", huber_schedule="exponential", huber_c=0.1, huber_scale=2.0)
    tables = FlowMatching(FlowOptions()).tables(options, "cpu")
    torch.testing.assert_close(tables.width_at(timesteps), torch.tensor([2.0, 2 * 0.1**0.5, 0.2]))
    constant = LossOptions(loss_type="smooth_l1", huber_schedule="constant", huber_c=0.3)
    assert FlowMatching(FlowOptions()).tables(constant, "cpu").width_at(timesteps).tolist() == pytest.approx([0.3] * 3)
