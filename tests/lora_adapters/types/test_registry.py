"""Each adapter type is found by its line in the registry, whatever it is asked for by."""

from dataclasses import dataclass

import pytest
from peft import LoraConfig

import lora_adapters
from lora_adapters import C3LierConfig, DyLoraConfig, LierLaConfig, network_options
from lora_adapters.convert.formats.metadata import dylora_of
from lora_adapters.types import PUBLIC, registry


def test_what_a_type_exports_is_public() -> None:
    assert set(PUBLIC) < set(lora_adapters.__all__)
    assert all(getattr(lora_adapters, name).__name__ == name for name in PUBLIC)


@pytest.mark.parametrize("kind", registry.types(), ids=lambda kind: kind.name)
def test_a_type_is_found_by_its_name_its_config_and_its_network_module(kind) -> None:
    assert registry.type_named(kind.name) is kind
    assert registry.type_of(kind.config()) is kind
    assert all(type(network_options(name).config) is kind.config for name in kind.network_modules)


@pytest.mark.parametrize("config", [LierLaConfig(r=2), C3LierConfig(r=2, conv_dim=3), DyLoraConfig(r=4, unit=2)])
def test_a_config_comes_back_from_what_peft_saves(config) -> None:
    saved = config.to_dict()
    back = registry.restored(LoraConfig(**{name: value for name, value in saved.items() if name != "peft_type"}))
    assert type(back) is type(config)
    assert back.to_dict() == saved


def test_subclasses_and_peft_s_configs() -> None:
    @dataclass
    class Mine(DyLoraConfig):
        pass

    assert registry.type_of(Mine()).name == "DyLora"
    assert registry.type_of(LoraConfig()) is registry.plain()


def test_facts_in_metadata_and_back() -> None:
    config = DyLoraConfig(r=4, unit=2, rank_scaling="rank")
    metadata = registry.metadata_of(config, {})
    assert dylora_of(metadata) == config.dylora
    assert registry.facts_of_metadata(metadata) == registry.facts_of_config(config)
    assert registry.facts_of_metadata({}) == registry.facts_of_config(LierLaConfig()) == {"type": "LierLa"}


def test_given_facts_win_over_those_of_the_file() -> None:
    of_file = registry.metadata_of(DyLoraConfig(r=4, unit=4, rank_scaling="rank"), {})
    facts = registry.facts_for(DyLoraConfig(r=4, unit=2), of_file, ["unit"])
    assert (facts["type"], facts["unit"], facts["rank_scaling"]) == ("DyLora", 2, "rank")
