"""Versions that do not fit: one line that names those that do."""

from types import ModuleType, SimpleNamespace

import diffusers.loaders.lora_pipeline as lora_pipeline
import peft
import pytest

from lora_adapters import plugin


@pytest.mark.parametrize("package", plugin.OLDEST)
def test_a_version_that_is_too_old(package, monkeypatch) -> None:
    real = plugin.version
    monkeypatch.setattr(plugin, "version", lambda name: "0.1.0" if name == package else real(name))
    into, module = (plugin._into_peft, peft) if package == "peft" else (plugin._into_diffusers, lora_pipeline)
    with pytest.raises(ImportError) as caught:
        into(module)
    oldest = plugin.OLDEST[package]
    assert str(caught.value) == (
        f"lora_adapters needs {package} {oldest} or newer, and one that it knows: {package} 0.1.0 is too old"
    )


def test_the_oldest_versions_are_those_of_the_requirements() -> None:
    from importlib.metadata import requires

    bounds = [line.split(";")[0].replace(" ", "") for line in requires("lora-adapters") or []]
    for package, oldest in plugin.OLDEST.items():
        assert any(bound.startswith(package) and f">={oldest}" in bound for bound in bounds)


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


def test_layers_that_do_not_know_rslora() -> None:
    assert plugin.rank_stabilized(SimpleNamespace()) == {}
    assert plugin.rank_stabilized(SimpleNamespace(use_rslora={"a": True})) == {"a": True}
