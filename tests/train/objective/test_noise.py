import math

import pytest
import torch
from diffusers import DDPMScheduler

from lora_adapters.train.objective import noise as n
from lora_adapters.train.objective.noise import NoiseOptions

SCHEDULE = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def generators(count: int) -> list[torch.Generator]:
    return [n.generator("test", i) for i in range(count)]


def test_each_sample_has_its_own_noise_whatever_the_batch() -> None:
    latents = torch.zeros(4, 4, 8, 8)
    whole = n.draw_noise(latents, generators(4), NoiseOptions())
    halves = [n.draw_noise(latents[i : i + 2], generators(4)[i : i + 2], NoiseOptions()) for i in (0, 2)]
    assert torch.equal(whole, torch.cat(halves))
    assert abs(whole.std() - 1) < 0.05


def test_timesteps_are_half_open() -> None:
    drawn = n.draw_timesteps(generators(2000), NoiseOptions(min_timestep=10, max_timestep=13))
    assert set(drawn.tolist()) == {10, 11, 12}


def test_noise_offset_shifts_whole_channels() -> None:
    latents = torch.zeros(3, 4, 8, 8)
    plain = n.draw_noise(latents, generators(3), NoiseOptions())
    shift = n.draw_noise(latents, generators(3), NoiseOptions(noise_offset=0.5)) - plain
    assert torch.allclose(shift, shift[:, :, :1, :1].expand_as(shift), atol=1e-6)
    half = n.draw_noise(latents, generators(3), NoiseOptions(noise_offset=0.25)) - plain
    assert torch.allclose(shift, 2 * half, atol=1e-6)


def test_adaptive_offset_adds_the_absolute_mean() -> None:
    latents = torch.full((1, 4, 8, 8), -2.0)
    plain = n.draw_noise(latents, generators(1), NoiseOptions())
    fixed = n.draw_noise(latents, generators(1), NoiseOptions(noise_offset=0.1)) - plain
    adaptive = n.draw_noise(latents, generators(1), NoiseOptions(noise_offset=0.1, adaptive_noise_scale=0.2)) - plain
    assert torch.allclose(adaptive, fixed * (0.1 + 0.2 * 2) / 0.1, atol=1e-5)
    gone = n.draw_noise(latents, generators(1), NoiseOptions(noise_offset=0.1, adaptive_noise_scale=-1.0)) - plain
    assert torch.count_nonzero(gone) == 0  # the strength does not become negative


def test_random_offset_strength_stays_below_the_given() -> None:
    latents = torch.zeros(64, 4, 8, 8)
    options = NoiseOptions(noise_offset=0.5, noise_offset_random_strength=True)
    strength = n._strength(options.noise_offset, True, generators(64), latents)
    assert 0 <= strength.min() < 0.1
    assert 0.4 < strength.max() <= 0.5
    assert n.draw_noise(latents, generators(64), options).shape == latents.shape


def test_multires_noise_has_deviation_one_and_coarse_parts() -> None:
    latents = torch.zeros(1, 4, 64, 64)
    made = n.draw_noise(latents, generators(1), NoiseOptions(multires_noise_iterations=6, multires_noise_discount=0.5))
    assert made.std().item() == pytest.approx(1, abs=1e-5)
    plain = n.draw_noise(latents, generators(1), NoiseOptions())
    pooled = [torch.nn.functional.avg_pool2d(x, 16).std() for x in (made, plain)]
    assert pooled[0] > 2 * pooled[1]


def test_noise_offset_and_multires_noise_add_up() -> None:
    """Plain noise, then the offset, then the layers, in the order in which they are drawn; brought to deviation 1."""
    latents, discount = torch.zeros(1, 4, 8, 8), 0.25
    options = NoiseOptions(noise_offset=0.5, multires_noise_iterations=2, multires_noise_discount=discount)
    made = n.draw_noise(latents, generators(1), options)
    (g,) = generators(1)
    expected = torch.randn(4, 8, 8, generator=g) + 0.5 * torch.randn(4, 1, 1, generator=g)
    for level in range(2):
        factor = (2 + 2 * torch.rand((), generator=g).item()) ** level
        coarse = torch.randn(1, 4, int(8 / factor), int(8 / factor), generator=g)
        expected = expected + discount**level * torch.nn.functional.interpolate(coarse, (8, 8), mode="bilinear")[0]
    torch.testing.assert_close(made[0], expected / expected.std())


def test_input_perturbation_is_not_part_of_the_target() -> None:
    latents = torch.zeros(2, 4, 8, 8)
    options = NoiseOptions(ip_noise_gamma=0.5)
    g = generators(2)
    noise = n.draw_noise(latents, g, options)
    added = n.perturbed(noise, g, options) - noise
    assert abs(added.std() - 0.5) < 0.05
    assert torch.equal(n.perturbed(noise, g, NoiseOptions()), noise)


def test_snr_of_the_schedule() -> None:
    snr = n.signal_to_noise(SCHEDULE.alphas_cumprod)
    alpha = float(SCHEDULE.alphas_cumprod[500])
    assert snr[500].item() == pytest.approx(alpha / (1 - alpha))
    ending = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True
    )
    assert n.signal_to_noise(ending.alphas_cumprod)[-1] == 0


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", lambda t, a: 0.1 * 3),
        ("exponential", lambda t, a: 3 * math.exp(math.log(0.1) / 1000 * t)),
        ("snr", lambda t, a: 0.9 / (1 + math.sqrt((1 - a) / a)) ** 2 + 0.1),
    ],
)
def test_huber_width(schedule, expected) -> None:
    timesteps = torch.tensor([0, 400, 999])
    found = n.huber_width(timesteps, SCHEDULE.alphas_cumprod, schedule, c=0.1, scale=3.0)
    for t, value in zip(timesteps.tolist(), found.tolist(), strict=True):
        assert value == pytest.approx(expected(t, float(SCHEDULE.alphas_cumprod[t])), rel=1e-6)
