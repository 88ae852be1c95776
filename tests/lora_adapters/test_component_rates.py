"""Learning rates of single components, against optimizers that have a group of parameters for each component."""

import copy

import pytest
import torch
from accelerate import Accelerator
from peft import inject_adapter_in_model
from torch import nn

from lora_adapters import AdapterError, DyLoraConfig, scale_component_rates, set_step
from lora_adapters.component_rates import component_rates

POWER = 0.5


def make(**options):
    torch.manual_seed(0)
    options = {"rate_power": POWER, "sort_at": 0.5, **options}
    config = DyLoraConfig(r=6, lora_alpha=6, conv_dim=6, conv_alpha=6, target_modules=["0", "2"], **options)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Flatten(), nn.Linear(16, 5, bias=False))
    model = inject_adapter_in_model(config, model)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    return model.train()


def factors(model):
    """Each trained weight with the dimension of its components."""
    return [(weight, int("lora_B" in name)) for name, weight in model.named_parameters() if weight.requires_grad]


def trained(model, optimizer, steps=5):
    """The weights after a few steps, in which every sample trains the full rank."""
    torch.manual_seed(1)
    for step in range(steps):
        set_step(model, step, total_steps=1000)
        model(torch.randn(2, 3, 4, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [weight.detach().clone() for weight, _ in factors(model)]


def trained_in_groups(model, make_optimizer, rate, rates, steps=5):
    """The same, computed with an optimizer that has each component in a group with its own rate."""
    torch.manual_seed(1)
    parts = [[part.detach().clone() for part in weight.unbind(dim)] for weight, dim in factors(model)]
    groups = [
        {"params": [of_weight[number] for of_weight in parts], "lr": rate * rates[number].item()} for number in range(6)
    ]
    optimizer = make_optimizer(groups)
    for step in range(steps):
        set_step(model, step, total_steps=1000)
        model(torch.randn(2, 3, 4, 4)).square().mean().backward()
        for (weight, dim), of_weight in zip(factors(model), parts, strict=True):
            for part, gradient in zip(of_weight, weight.grad.unbind(dim), strict=True):
                part.grad = gradient.clone()
            weight.grad = None
        optimizer.step()
        with torch.no_grad():
            for (weight, dim), of_weight in zip(factors(model), parts, strict=True):
                weight.copy_(torch.stack(of_weight, dim))
    return [weight.detach().clone() for weight, _ in factors(model)]


@pytest.mark.parametrize(
    ("make_optimizer", "rate"),
    [
        (lambda params, lr=1.0: torch.optim.SGD(params, lr=lr, momentum=0.9), 0.1),
        (lambda params, lr=1.0: torch.optim.AdamW(params, lr=lr, weight_decay=0.1), 0.01),
    ],
    ids=["sgd", "adamw"],
)
@pytest.mark.parametrize("unit", [1, 2])
def test_components_move_as_with_a_group_for_each(make_optimizer, rate, unit):
    model = make(unit=unit)
    reference = copy.deepcopy(model)
    optimizer = make_optimizer([weight for weight, _ in factors(model)], lr=rate)
    scale_component_rates(model, optimizer)
    scale_component_rates(model, optimizer)  # once is enough
    result = trained(model, optimizer)
    scale_component_rates(reference, torch.optim.SGD([weight for weight, _ in factors(reference)], lr=1.0))
    expected = trained_in_groups(reference, make_optimizer, rate, component_rates(6, POWER, unit))
    for value, other in zip(result, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)


def test_wrapped_and_half_precision_weights():
    model = make()
    plain = copy.deepcopy(model)
    weights = [weight for weight, _ in factors(model)]
    optimizer = Accelerator(cpu=True).prepare(torch.optim.SGD(weights, lr=0.1))
    scale_component_rates(model, optimizer)
    before = [weight.detach().clone() for weight in weights]
    result = trained(model, optimizer, 1)
    scale_component_rates(plain, torch.optim.SGD([weight for weight, _ in factors(plain)], lr=0.1))
    torch.manual_seed(1)
    set_step(plain, 0, total_steps=1000)
    plain(torch.randn(2, 3, 4, 4)).square().mean().backward()
    for (weight, dim), value, start in zip(factors(plain), result, before, strict=True):
        rates = component_rates(6, POWER).view(-1, *[1] * (weight.ndim - 1 - dim))
        torch.testing.assert_close(value, start - 0.1 * rates * weight.grad)

    half = make().to(torch.bfloat16)
    optimizer = torch.optim.SGD([weight for weight, _ in factors(half)], lr=0.1)
    scale_component_rates(half, optimizer)
    for weight, _ in factors(half):
        weight.grad = torch.ones_like(weight)
    before = [weight.detach().clone() for weight, _ in factors(half)]
    optimizer.step()
    for (weight, dim), start in zip(factors(half), before, strict=True):
        rates = component_rates(6, POWER).view(-1, *[1] * (weight.ndim - 1 - dim))
        torch.testing.assert_close(weight.float(), start.float() - 0.1 * rates, rtol=0.01, atol=0.01)


def test_what_does_not_fit_is_refused():
    model = make()
    with pytest.raises(AdapterError, match=r"rate_power=0.5 changes.*call scale_component_rates\(models, optimizer\)"):
        set_step(model, 0, total_steps=10)
    with pytest.raises(AdapterError, match="the optimizer does not train adapter default"):
        scale_component_rates(model, torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))
    weights = [weight for weight, _ in factors(model)]
    with pytest.raises(AdapterError, match=r"AdamWScheduleFree averages weights, .*use rate_power=0"):
        scale_component_rates(model, pytest.importorskip("schedulefree").AdamWScheduleFree(weights))
    with pytest.raises(AdapterError, match=r"rate_power 0.5 requires sort_at"):
        make(sort_at=0.0)
    with pytest.raises(AdapterError, match="rate_power is 2"):
        make(rate_power=2)


def test_nothing_is_changed_without_a_rate_power():
    model = make(rate_power=0.0, sort_at=0.0)
    optimizer = torch.optim.SGD([weight for weight, _ in factors(model)], lr=0.1)
    scale_component_rates(model, optimizer)
    scaled = make()
    scale_component_rates(scaled, optimizer, "another")  # there is no such adapter in it
    assert not optimizer._optimizer_step_pre_hooks
    set_step(model, 0, total_steps=10)
