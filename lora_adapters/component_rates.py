"""Learning rates of single components: the first components of a DyLoRA learn faster than the last ones."""

from collections.abc import Iterator
from typing import Any

import torch

from lora_adapters.component_steps import Components, components_of, steps_of
from lora_adapters.convert.errors import AdapterError
from lora_adapters.optimizer_state import averages_weights, unwrapped
from lora_adapters.types.dylora.rank_controller import RankController, controllers, models_of
from lora_adapters.types.layers import layers

UNCHANGED = 4  # the component that learns at the optimizer's own rate


def component_rates(length: int, power: float, unit: int = 1) -> torch.Tensor:
    """The factors of the learning rate, (4/k)**power for component k.

    Args:
        length: The number of components.
        power: The exponent; 0 gives all components the same rate.
        unit: The number of components that are trained together; all of them have the rate of the first.

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
    """Scale the learning rate of each component of DyLoRAs with a `rate_power`. Works with any optimizer.

    In each optimizer step, component k of a module moves (4/k)**rate_power times as far as without scaling. After
    `sort_components`, this applies to the original components. Call it once after creating the optimizer, before
    training starts or resumes, even without `rate_power`: an optimizer that resumes after the sorting step needs it to
    step as before. Adapters without `sort_at` are not changed.

    Args:
        target: A pipeline, a model, or a list of models.
        optimizer: The torch optimizer that trains them; it may be wrapped by accelerate.
        adapter_name: The adapter; None for all DyLoRAs of the target.

    Raises:
        AdapterError: The optimizer does not train an adapter with a `rate_power`, or it averages weights
            (schedule-free). Nothing is changed then.
    """
    inner = unwrapped(optimizer)
    dials = [dial for dial in controllers(target, adapter_name) if dial.sort_at and dial.rates_of is not inner]
    scaled = [dial for dial in dials if dial.rate_power]
    if averages_weights(inner):
        if scaled:
            raise AdapterError(
                f"{type(inner).__name__} averages weights, so that its steps cannot be scaled: use rate_power=0"
            )
        return
    trained = {id(weight) for group in inner.param_groups for weight in group["params"]}
    found = {id(dial): [part for part in _parts(target, dial) if id(part.weight) in trained] for dial in dials}
    if scaled and not any(found[id(dial)] for dial in scaled):
        raise AdapterError(f"the optimizer does not train adapter {scaled[0].adapter_name}: pass the one that does")
    for dial in dials:
        if found[id(dial)]:
            steps_of(inner).add(found[id(dial)])
            dial.rates_of = inner


def _parts(target: Any, dial: RankController) -> Iterator[Components]:
    """The factors of adapters, each with the rates of its components."""
    for model in models_of(target):
        for _, layer in layers(model, dial.adapter_name):
            if getattr(layer.lora_variant.get(dial.adapter_name), "controller", None) is dial:
                for part in components_of(layer, dial.adapter_name):
                    rates = component_rates(part.weight.shape[part.dim], dial.rate_power, dial.dylora.unit)
                    yield part._replace(rates=rates if dial.rate_power else None)
