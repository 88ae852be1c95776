"""The ranks of a DyLoRA where a model is called more than once a step, is copied, or has lost the adapter."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import CLIPTextModel

from lora_adapters import AdapterError, DyLoraConfig, add_adapter, set_rank, set_step
from lora_adapters.types.dylora.rank_controller import RankController

TINY = Path(__file__).parents[3] / "examples" / "tiny-sd"
IDS = torch.arange(3 * 77).view(3, 77)


def with_dylora(model, **options):
    add_adapter(model, DyLoraConfig(r=4, lora_alpha=4, **options), "d")
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    return model.train()


def unet(**options):
    return with_dylora(UNet2DConditionModel.from_pretrained(TINY / "unet").float(), **options)


def text_encoder(**options):
    return with_dylora(CLIPTextModel.from_pretrained(TINY / "text_encoder").float(), **options)


def losses(model, step):
    """A loss of one call, at that step's ranks."""
    set_step(model, step)
    if isinstance(model, CLIPTextModel):
        return model(IDS)[0].square().mean()
    generator = torch.Generator().manual_seed(step)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    states = torch.randn(2, 77, model.config.cross_attention_dim, generator=generator)
    return model(latents, torch.tensor([5, 500]), states).sample.square().mean()


def enable_adapters(model, enabled):
    """On or off in every layer: transformers' own methods ask for a PEFT that may not be there yet."""
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.enable_adapters(enabled)


def gradients(model):
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("sampling", ["spread", "uniform"])
@pytest.mark.parametrize("checkpointing", [None, False, True])  # True: the reentrant kind
@pytest.mark.parametrize("make", [unet, text_encoder])
def test_calls_between_a_call_and_its_gradient_change_nothing(make, checkpointing, sampling):
    model = make(rank_sampling=sampling)
    if checkpointing is not None:
        arguments = {"use_reentrant": checkpointing}
        if make is unet:
            model.enable_gradient_checkpointing()
        else:
            model.gradient_checkpointing_enable(arguments)
            model.enable_input_require_grads()
    losses(model, 2).backward()
    first = gradients(model)
    losses(model, 7).backward()
    second = gradients(model)
    assert any(not torch.allclose(first[name], second[name]) for name in first)

    (losses(model, 2) + losses(model, 7)).backward()
    for name, both in gradients(model).items():
        torch.testing.assert_close(both, first[name] + second[name], rtol=1e-3, atol=1e-7)

    loss = losses(model, 2)
    enable_adapters(model, False)
    with torch.no_grad():
        losses(model, 7)
    enable_adapters(model, True)
    model.eval()
    with torch.no_grad():
        losses(model, 9)
    model.train()
    loss.backward()
    for name, alone in gradients(model).items():
        torch.testing.assert_close(alone, first[name], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_a_dial_of_their_own(again):
    model = unet()
    twin = again(model)
    for one in (model, twin):
        one.eval()
    with torch.no_grad():
        whole = losses(model, 0)
        assert losses(twin, 0) == whole
        set_rank(twin, 1)
        low = losses(twin, 0)
        assert low != whole
        assert losses(model, 0) == whole
        set_rank(model, 1)
        assert losses(model, 0) == low
    assert losses(model.train(), 3) == losses(twin.train(), 3)


def dials_of(model):
    hooks = (*model._forward_pre_hooks.values(), *model._forward_hooks.values())
    return [hook for hook in hooks if isinstance(getattr(hook, "__self__", hook), RankController)]


@pytest.mark.parametrize("way", ["delete_adapters", "unload"])
def test_a_dial_goes_with_its_adapter(way):
    if way == "unload":
        model = get_peft_model(nn.Sequential(nn.Linear(6, 8)), DyLoraConfig(r=4, target_modules=["0"]))
        set_step(model, 0, samples=range(2), total=2)
        model = model.unload().train()
        model(torch.ones(3, 6))
    else:
        model = unet()
        set_step(model, 0, samples=range(3), total=3)
        model.delete_adapters("d")
        losses(model, 0)
    assert not dials_of(model)


def test_steps_and_ranks_that_are_none():
    model = inject_adapter_in_model(DyLoraConfig(r=4, target_modules=["0"]), nn.Sequential(nn.Linear(6, 8)))
    for samples, total in ((range(4, 7), 4), (range(0), 4), (None, 8)):
        with pytest.raises(AdapterError, match=r"samples"):
            set_step(model, 3, samples=samples, total=total)
    set_rank(model, torch.tensor(2))
    with pytest.raises(TypeError):
        set_rank(model, 2.0)
    assert model(torch.ones(1, 6)).shape == (1, 8)


def test_merging_convolutions_of_one_dimension():
    model = nn.Sequential(nn.Conv1d(6, 8, 3))
    model = get_peft_model(model, DyLoraConfig(r=4, lora_alpha=4, target_modules=["0"])).eval()
    nn.init.normal_(model.base_model.model[0].lora_B["default"].weight)
    set_rank(model, 2)
    x = torch.randn(2, 6, 9)
    live = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), live, rtol=1e-4, atol=1e-5)
