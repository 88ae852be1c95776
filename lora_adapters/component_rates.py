"""Learning rates of single components: the first components of a DyLoRA learn faster than the last ones."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lora_adapters.convert.errors import AdapterError
from lora_adapters.optimizer_state import averages_weights, unwrapped
from lora_adapters.types.dylora.rank_controller import RankController, controllers, models_of
from lora_adapters.types.layers import factors, layers

UNCHANGED = 4  # the component that learns at the optimizer's own rate


def component_rates(length: int, power: float, unit: int = 1) -> torch.Tensor:
    """The factors of the learning rate: (4/k)**power for component k.

    Args:
        length: The number of components.
        power: 0 gives every component the same rate.
        unit: Components that are trained together have the rate of the first of them.

    Returns:
        One factor for each component: (length,), float32.

    >>> component_rates(4, 0.5).tolist()
    [2.0, 1.4142135381698608, 1.154700517654419, 1.0]
    >>> component_rates(4, 0.5, unit=2).tolist()
    [2.0, 2.0, 1.154700517654419, 1.154700517654419]
    """
    first = torch.arange(length) // unit * unit + 1
    return (UNCHANGED / first) ** power


def scale_component_rates(target: Any, optimizer: Any, adapter_name: str | None = None) -> None:
    """Give the components of DyLoRAs with a `rate_power` learning rates of their own, with any optimizer.

    After each step of the optimizer, component k of a module has moved (4/k)**rate_power times as far as the optimizer
    moved it. Call it once, when the optimizer has been created, before the training or its resumption. Adapters without
    a `rate_power` are left alone.

    Args:
        target: A pipeline, a model, or a list of models.
        optimizer: The torch optimizer that trains them, also wrapped by accelerate.
        adapter_name: The adapter; None for all DyLoRAs of the target.

    Raises:
        AdapterError: The optimizer does not train an adapter that has a `rate_power`, or it averages weights in its
            steps (schedule-free). Then nothing is changed.
    """
    inner = unwrapped(optimizer)
    scaled = [dial for dial in controllers(target, adapter_name) if dial.rate_power and dial.rates_of is not inner]
    if not scaled:
        return
    trained = {id(weight) for group in inner.param_groups for weight in group["params"]}
    pairs = [pair for dial in scaled for pair in _weights(target, dial) if id(pair[0]) in trained]
    if not pairs:
        raise AdapterError(f"the optimizer does not train adapter {scaled[0].adapter_name}: give the one that does")
    if averages_weights(inner):
        raise AdapterError(
            f"{type(inner).__name__} averages weights in its steps, which cannot be scaled: take rate_power=0"
        )
    steps = _ScaledSteps(pairs)
    inner.register_step_pre_hook(steps.before)
    inner.register_step_post_hook(steps.after)
    for dial in scaled:
        dial.rates_of = inner


def _weights(target: Any, dial: RankController) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
    """Each factor of an adapter with the rates of its components, in the shape that multiplies it."""
    for model in models_of(target):
        for _, layer in layers(model, dial.adapter_name):
            if getattr(layer.lora_variant.get(dial.adapter_name), "controller", None) is dial:
                down, up = (factor.weight for factor in factors(layer, dial.adapter_name))
                rates = component_rates(len(down), dial.rate_power, dial.dylora.unit)
                yield down, rates.view(-1, *[1] * (down.ndim - 1))
                yield up, rates.view(-1, *[1] * (up.ndim - 2))


class _ScaledSteps:
    """Hooks around an optimizer's step, which multiply what the step adds to each weight."""

    def __init__(self, weights: list[tuple[nn.Parameter, torch.Tensor]]):
        self.weights = weights
        self.previous: list[torch.Tensor] = []

    @torch.no_grad()
    def before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Keep the values before the step."""
        self.previous = [weight.detach().clone() for weight, _ in self.weights]

    @torch.no_grad()
    def after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Scale the way from there to the values after the step."""
        # Moved once: a copy to a GPU in each step would wait for it.
        self.weights = [(weight, rates.to(weight.device)) for weight, rates in self.weights]
        for (weight, rates), start in zip(self.weights, self.previous, strict=True):
            weight.copy_(torch.lerp(start.float(), weight.float(), rates.expand_as(weight)))
        self.previous = []
