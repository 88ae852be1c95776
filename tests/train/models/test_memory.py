"""Frozen weights in float8: the numbers are those of rounded weights, the adapter is as precise as ever."""

import pytest
import torch
from torch import nn

from lora_adapters.train.errors import OptionError
from lora_adapters.train.options.arguments import settings
from lora_adapters.train.training.loop import train
from lora_adapters.train.training.setup import prepare

from ..transformers import build_flux

FP8 = torch.float8_e4m3fn


@pytest.fixture
def options(basics, tmp_path) -> dict:
    flux = {"pretrained_model_name_or_path": str(build_flux(tmp_path / "m")), "t5xxl_max_token_length": 16}
    return {**basics, **flux, "network_train_unet_only": True}


def grads(run) -> list[torch.Tensor]:
    torch.manual_seed(0)
    loss = run.loss.training(next(run.data.batches(0)))
    loss.backward()
    return [loss.detach(), *(p.grad for p in run.parameters)]


def test_a_step_is_that_of_weights_rounded_to_float8(options) -> None:
    small = prepare(settings(**options, fp8_base=True))
    plain = prepare(settings(**options))
    kept = {name: p for name, p in small.models.denoiser.named_parameters() if p.dtype == FP8}
    assert len(kept) > 40
    assert not any("lora_" in name or "norm" in name for name in kept)
    rounded = 0
    for name, parameter in plain.models.denoiser.named_parameters():
        if name in kept:
            rounded += int((parameter.data != parameter.data.to(FP8).float()).any())
            parameter.data = parameter.data.to(FP8).float()
    assert rounded > 20
    for one, other in zip(grads(small), grads(plain), strict=True):
        torch.testing.assert_close(one, other)
    assert all(p.dtype == torch.float32 for p in small.parameters)
    assert all(p.dtype == FP8 for p in kept.values())


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training_and_samples(options, tmp_path, precision) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red disc --w 64 --h 64 --s 1\n")
    options |= {"sample_prompts": str(prompts), "sample_every_n_steps": 2, "max_train_steps": 2}
    trained = train(settings(**options, fp8_base_unet=True, mixed_precision=precision, gradient_checkpointing=True))
    assert all(loss == loss for loss in trained.losses)
    assert (tmp_path / "out" / "sample" / "sample-step00000002.png").exists()


def test_a_unet_too(basics) -> None:
    run = prepare(settings(**basics, fp8_base=True))
    kept = [p for p in run.models.denoiser.parameters() if p.dtype == FP8]
    assert len(kept) > 50
    assert all(torch.isfinite(part).all() for part in grads(run))
    assert isinstance(run.models.denoiser, nn.Module)


def test_kinds_that_read_the_base_weights_are_refused(options) -> None:
    args = [r"exclude_patterns=['.*attn\\..*', '.*proj_mlp']"]
    with pytest.raises(OptionError, match="--fp8_base works with LoRA"):
        prepare(
            settings(
                **options
                | {
                    "network_module": "networks.loha",
                    "network_args": args,
                },
                fp8_base=True,
            )
        )
