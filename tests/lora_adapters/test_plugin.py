"""What is changed in peft and diffusers is looked for first: one line says what a version lacks."""

from types import ModuleType

import peft
import pytest

from lora_adapters import plugin


def test_diffusers_without_what_is_changed() -> None:
    with pytest.raises(ImportError, match=r"lacks StableDiffusionLoraLoaderMixin\.load_lora_weights"):
        plugin._into_diffusers(ModuleType("lora_pipeline"))


def test_peft_that_injects_otherwise(monkeypatch) -> None:
    from peft.tuners.lora import LoraModel
    from peft.tuners.tuners_utils import BaseTuner

    monkeypatch.delattr(LoraModel, "inject_adapter")
    monkeypatch.delattr(BaseTuner, "inject_adapter")
    with pytest.raises(ImportError, match="injects its layers in another way"):
        plugin._into_peft(peft)
