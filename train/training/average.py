"""The exponential moving average of the trained weights: --ema_decay."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.training_utils import EMAModel

from lora_adapters.optimizer_state import averages_weights
from lora_adapters.train.errors import OptionError
from lora_adapters.train.options.settings import Settings


def check_average(settings: Settings, optimizer: type) -> None:
    """Raise OptionError if the optimizer, a class, averages weights itself, as schedule-free ones do."""
    if settings.ema_decay and averages_weights(optimizer):
        raise OptionError(f"--ema_decay: {optimizer.__name__} saves and measures its own average of the weights")


class WeightAverage:
    """The average of weights over the steps: a ← d · a + (1 - d) · w after each, by diffusers' EMAModel.

    It begins with the weights as they are; d rises as (1 + n) / (10 + n) over n steps, up to `decay`. float32, whatever
    the weights are: in bf16 small differences would be lost.

    Args:
        weights: Parameters that are stepped; the same in every process.
        decay: The largest d, 0 to 1.
    """

    def __init__(self, weights: list[torch.nn.Parameter], decay: float):
        self.weights, self.decay = weights, decay
        self.restart()

    def restart(self) -> None:
        """Restart from the present weights, as after their components have been sorted."""
        shadows = [torch.nn.Parameter(weight.detach().float()) for weight in self.weights]
        self._model = EMAModel(shadows, decay=self.decay, foreach=True)

    def step(self) -> None:
        """Count in the weights after an optimizer step."""
        self._model.step(self.weights)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the weights are the average; afterwards they are bit for bit what they were."""
        self._model.store(self.weights)
        self._model.copy_to(self.weights)
        try:
            yield
        finally:
            self._model.restore(self.weights)

    def state_dict(self) -> dict[str, Any]:
        """The state for `load_state_dict`; it refers to the tensors, without a copy."""
        return self._model.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state, with this average's decay; ValueError if it belongs to other weights."""
        shapes = [shadow.shape for shadow in state["shadow_params"]]
        if shapes != [weight.shape for weight in self.weights]:
            raise ValueError("the average belongs to other weights")
        self._model.load_state_dict(state)
        self._model.decay = self.decay
        pairs = zip(self._model.shadow_params, self.weights, strict=True)
        self._model.shadow_params = [shadow.to(weight.device) for shadow, weight in pairs]
