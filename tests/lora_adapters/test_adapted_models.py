"""The list of models with adapters of this package, which several threads read and extend at once."""

import sys
import threading

import pytest
from torch import nn

from lora_adapters import adapted_models


@pytest.fixture
def switching():
    """Threads change places as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_a_model_may_be_noted_while_another_thread_looks_at_all(switching) -> None:
    models = [nn.Identity() for _ in range(3000)]

    def note() -> None:
        for model in models:
            adapted_models.remember(model)

    thread = threading.Thread(target=note)
    thread.start()
    while thread.is_alive():
        adapted_models.remembered()
    assert set(models) <= set(adapted_models.remembered())
