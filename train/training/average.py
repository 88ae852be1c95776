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
    """Raise OptionError for --ema_decay with an optimizer class that averages weights itself (schedule-free)."""
    if settings.ema_decay and averages_weights(optimizer):
        raise OptionError(f"--ema_decay: {optimizer.__name__} already averages the weights; leave --ema_decay out")


class WeightAverage:
    """The moving average of weights: a ← d · a + (1 - d) · w after each step, computed by diffusers' EMAModel.

    It starts from the present weights. At step n, d is (1 + n) / (10 + n), but at most `decay`. The average is float32
    for every dtype of the weights: bf16 would lose small differences.

    Args:
        weights: The trained parameters; the same in every process.
        decay: The largest d, 0 to 1.
    """

    def __init__(self, weights: list[torch.nn.Parameter], decay: float):
        self.weights, self.decay = weights, decay
        self.restart()

    def restart(self) -> None:
        """Restart from the present weights, for example after the components of a DyLoRA have been sorted."""
        shadows = [torch.nn.Parameter(weight.detach().float()) for weight in self.weights]
        self._model = EMAModel(shadows, decay=self.decay, foreach=True)

    def step(self) -> None:
        """Update the average after an optimizer step."""
        self._model.step(self.weights)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """A context in which the parameters hold the average; afterwards they have exactly their previous values."""
        self._model.store(self.weights)
        self._model.copy_to(self.weights)
        try:
            yield
        finally:
            self._model.restore(self.weights)

    def state_dict(self) -> dict[str, Any]:
        """The state for `load_state_dict`; the tensors are not copied."""
        return self._model.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state, but keep this average's decay. ValueError if the shapes of the weights differ."""
        shapes = [shadow.shape for shadow in state["shadow_params"]]
        if shapes != [weight.shape for weight in self.weights]:
            raise ValueError("the average belongs to other weights")
        self._model.load_state_dict(state)
        self._model.decay = self.decay
        pairs = zip(self._model.shadow_params, self.weights, strict=True)
        self._model.shadow_params = [shadow.to(weight.device) for shadow, weight in pairs]
