"""A step waits for its device once: numbers come back together, at its end."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler
from torch.utils._python_dispatch import TorchDispatchMode

from lora_adapters.train.models.latents import LatentSpace
from lora_adapters.train.models.sd import SD
from lora_adapters.train.objective.losses import LossOptions
from lora_adapters.train.objective.noise import NoiseOptions
from lora_adapters.train.objective.step_loss import StepLoss, StepOptions
from lora_adapters.train.options.arguments import settings
from lora_adapters.train.stopping import StopSignals
from lora_adapters.train.training import loop
from lora_adapters.train.training.setup import prepare


class Waits(TorchDispatchMode):
    """Counts what makes the CPU wait for a device: numbers read out, and copies from a device or waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers, self.copies = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._local_scalar_dense.default:
            self.numbers += 1
        if function is torch.ops.aten._to_copy.default:
            source, target = args[0].device.type, torch.device(kwargs.get("device") or args[0].device).type
            self.copies += source != target and (target == "cpu" or not kwargs.get("non_blocking"))
        return function(*args, **kwargs)


OPTIONS = {
    "optimizer_type": "torch.optim.SGD",  # Adam counts its steps in tensors on the CPU
    "max_grad_norm": 1.0,
    "scale_weight_norms": 1.0,
    "loss_type": "huber",
    "min_snr_gamma": 5.0,
    "noise_offset": 0.1,
    "noise_offset_random_strength": True,
    "ip_noise_gamma": 0.1,
    "max_train_steps": 1,
}


@pytest.mark.parametrize("logging", [False, True])
def test_no_number_is_read_one_by_one(basics, logging) -> None:
    run = prepare(settings(**{**basics, **OPTIONS}))
    batch = next(run.data.batches(0))
    with StopSignals() as signals, Waits() as waits:
        values = loop._step(run, 0, [batch], logging, signals)
    assert waits.numbers == 0  # `tolist` reads all of them at once
    names = {"norm/gradient", "norm/limited_modules"} | ({"norm/average", "norm/largest"} if logging else set())
    assert values.others.keys() == names


@pytest.mark.parametrize("loss_type", ["l2", "huber"])
def test_the_loss_leaves_everything_on_the_device(fake_batch, loss_type) -> None:
    """On the device `meta`, which has shapes and no values: reading one would be an error."""
    loss_options = LossOptions(loss_type=loss_type, min_snr_gamma=5.0)
    noise_options = NoiseOptions(
        noise_offset=0.1, noise_offset_random_strength=True, adaptive_noise_scale=0.1, ip_noise_gamma=0.1
    )
    batch = fake_batch(2, masks=torch.ones(2, 1, 8, 8), text={"hidden_state": torch.ones(2, 77, 32)})
    schedule = DDPMScheduler(beta_schedule="scaled_linear")
    models = SimpleNamespace(family=SD, latent_space=LatentSpace(4, 8, 0.18))

    def denoiser(noisy, timesteps, text, time_ids):
        assert text.hidden.is_meta
        assert noisy.is_meta
        assert timesteps.is_meta
        return noisy * 0.5

    loss = StepLoss(models, denoiser, schedule, StepOptions(noise_options, loss_options), torch.device("meta"))
    schedule.alphas_cumprod = schedule.alphas_cumprod.to("meta")  # moved to the device once, by the first call
    with Waits() as waits:
        found = loss.training(batch)
    assert found.is_meta
    assert (waits.numbers, waits.copies) == (0, 0)
