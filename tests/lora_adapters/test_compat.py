"""The versions that fit, and what differs between them."""

from types import SimpleNamespace

import diffusers.loaders.lora_pipeline as lora_pipeline
import peft
import pytest

from lora_adapters import compat, plugin


@pytest.mark.parametrize("package", compat.OLDEST)
def test_a_version_that_is_too_old(package, monkeypatch) -> None:
    real = compat.version
    monkeypatch.setattr(compat, "version", lambda name: "0.1.0" if name == package else real(name))
    into, module = (plugin._into_peft, peft) if package == "peft" else (plugin._into_diffusers, lora_pipeline)
    with pytest.raises(ImportError) as caught:
        into(module)
    oldest = compat.OLDEST[package]
    assert str(caught.value) == f"lora_adapters requires {package}>={oldest}; {package} 0.1.0 is too old"


def test_the_oldest_versions_are_those_of_the_requirements() -> None:
    from importlib.metadata import requires

    bounds = [line.split(";")[0].replace(" ", "") for line in requires("lora-adapters") or []]
    for package, oldest in compat.OLDEST.items():
        assert any(bound.startswith(package) and f">={oldest}" in bound for bound in bounds)


def test_layers_that_do_not_know_rslora() -> None:
    assert compat.rank_stabilized(SimpleNamespace()) == {}
    assert compat.rank_stabilized(SimpleNamespace(use_rslora={"a": True})) == {"a": True}
