"""DyLoRA's sorting step: before it the full rank is trained, after it nested ranks (see `DyLoraConfig.sort_at`)."""

import contextlib
import logging
from collections.abc import Iterator

import torch
from accelerate.utils import broadcast

from lora_adapters.optimizer_state import averages_weights
from lora_adapters.sorting import sort_components
from lora_adapters.train.training import adapters
from lora_adapters.train.training.setup import Run
from lora_adapters.types.layers import factors

log = logging.getLogger(__name__)

WARM_UP = 10  # warm-up steps of the learning rate, if the sorting restarts the optimizer


def sort_if_due(run: Run, step: int) -> None:
    """Sort the components if the sorting comes before this step. The result is the same in all processes."""
    if step != run.sort_step:
        return
    sort_components(list(run.trained.values()), run.optimizer, adapters.ADAPTER)
    for parameter in run.parameters:
        broadcast(parameter.data)
    if run.average is not None:
        run.average.restart()
    if run.accelerator.is_main_process:
        log.info("step %d: components sorted by size; from here on every rank is trained", step)


@contextlib.contextmanager
def warmed_up(run: Run, step: int) -> Iterator[None]:
    """A context in which learning rates are lower if the sorting has restarted the optimizer a few steps ago."""
    since = step - run.sort_step if run.sort_step is not None else -1
    if not (0 <= since < WARM_UP - 1 and averages_weights(run.optimizer)):
        yield
        return
    groups = [group for group in run.optimizer.param_groups if group["lr"] is not None]
    rates = [group["lr"] for group in groups]
    for group in groups:
        group["lr"] = group["lr"] * (since + 1) / WARM_UP
    try:
        yield
    finally:
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate


@contextlib.contextmanager
def before_sorting(run: Run) -> Iterator[None]:
    """A context in which DyLoRA behaves as before the sorting step: steps train the full rank.

    For trial steps, which have no step number. Without a sorting step it does nothing.

    Args:
        run: The run; its step counters are restored afterwards.

    Yields:
        None.
    """
    waiting = [(dial, dial.nested_from, dial.step, dial.unsorted) for dial in run.dials if dial.sort_at]
    for dial, _, step, _ in waiting:
        dial.nested_from = step + 1
    try:
        yield
    finally:
        for dial, dial.nested_from, dial.step, dial.unsorted in waiting:
            dial.drawn = False


@contextlib.contextmanager
def as_if_sorted(run: Run) -> Iterator[None]:
    """A context in which the components are sorted, so that low ranks can be evaluated before the sorting step."""
    unsorted = [dial for dial in run.dials if dial.unsorted]
    if not unsorted:
        yield
        return
    weights = [factor.weight for layer in run.layers for factor in factors(layer, adapters.ADAPTER)]
    before = [weight.detach().clone() for weight in weights]
    sort_components(list(run.trained.values()), adapter_name=adapters.ADAPTER)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)
        for dial in unsorted:
            dial.unsorted = True
