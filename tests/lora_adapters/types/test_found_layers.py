"""PEFT's layers are found once, and anew as soon as the model is another."""

import copy
import gc
import re
import weakref

import pytest
from peft import LoHaConfig, LoraConfig, inject_adapter_in_model
from torch import nn

from lora_adapters.types import found_layers
from lora_adapters.types.found_layers import lora_layers, outer_modules, tuner_layers


def model(*paths: str) -> nn.Module:
    made = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Conv2d(2, 2, 1)), nn.Sequential())
    return add(made, *paths)


def add(made: nn.Module, *paths: str, name: str = "default", kind: type = LoraConfig) -> nn.Module:
    return inject_adapter_in_model(kind(target_modules="|".join(map(re.escape, paths))), made, name)


def named(one: nn.Module) -> list[str]:
    return [path for path, _ in lora_layers(one)]


def test_the_modules_are_those_of_named_modules_without_the_inside_of_layers() -> None:
    one = model("0", "1.1")
    add(one, "0", name="b")
    one.again = one[1]  # shared: it counts once
    inside = (".lora_", ".lora_A", ".lora_B")
    wanted = [path for path, _ in one.named_modules() if not any(part in f".{path}" for part in inside)]
    assert [path for path, _ in outer_modules(one)] == wanted
    assert "0.base_layer" in wanted


def test_layers_are_found_once(monkeypatch) -> None:
    one = model("0", "1.0")
    assert named(one) == ["0", "1.0"]
    monkeypatch.setattr(found_layers, "outer_modules", lambda _: pytest.fail("the model is searched again"))
    assert named(one) == ["0", "1.0"]
    assert [layer for _, layer in lora_layers(one)] == [one[0], one[1][0]]


CHANGES = {
    "another adapter": (
        lambda one: inject_adapter_in_model(LoraConfig(target_modules=["1.1"]), one, "b"),
        ["0", "1.1"],
    ),
    "a layer taken out": (lambda one: setattr(one, "0", one[0].base_layer), []),
    "a layer put elsewhere": (lambda one: one[2].append(model("0")[0]), ["0", "2.0"]),
    "a block replaced": (lambda one: setattr(one, "1", model("1.0")[1]), ["0", "1.0"]),
    "a block replaced by a layer": (lambda one: setattr(one, "1", model("0")[0]), ["0", "1"]),
    "another type": (lambda one: add(one, "1.0", name="b", kind=LoHaConfig), ["0"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_model_is_seen(change) -> None:
    one, (act, wanted) = model("0"), CHANGES[change]
    assert named(one) == ["0"]
    act(one)
    assert named(one) == wanted
    assert [path for path, _ in tuner_layers(one)] == (["0", "1.0"] if change == "another type" else wanted)


def test_a_copy_has_layers_of_its_own() -> None:
    one = model("0")
    assert named(one) == ["0"]
    assert next(iter(lora_layers(copy.deepcopy(one))))[1] is not one[0]


def test_a_model_is_not_kept_alive() -> None:
    one = model("0")
    assert named(one) == ["0"]
    one[0].root = [one]  # a layer that knows its model
    gone = weakref.ref(one)
    del one
    gc.collect()
    assert gone() is None
