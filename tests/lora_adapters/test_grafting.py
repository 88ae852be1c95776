"""Layers that are grafted are those that PEFT's injection makes: every attribute, in every state a model may be in."""

import copy

import pytest
import torch
from peft import LoHaConfig, LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from lora_adapters import C3LierConfig, DyLoraConfig, LierLaConfig, LowRank, grafting
from lora_adapters.convert.deltas.norm import Norm
from lora_adapters.injection import place
from lora_adapters.target_modules import base_layers
from lora_adapters.types.lycoris.norm_layer import NormLayer
from lora_adapters.types.lycoris.operations import NORMS
from tests.lora_adapters.pipelines import make

ATTENTION = r".*attn1\.to_(q|v)|.*self_attn\.(q|v)_proj"


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return make("StableDiffusion", tmp_path_factory.mktemp("models"))


def pairs(model: nn.Module, conv: bool = False) -> dict[str, LowRank]:
    """Pairs for the layers of attention, and for all convolutions; ranks and alphas differ."""
    torch.manual_seed(0)
    found = {}
    for path, _, layer in base_layers(model):
        if not (conv and isinstance(layer, nn.Conv2d)) and "attn" not in path:
            continue
        rank, shape = len(found) % 3 + 1, layer.weight.shape
        up = torch.randn(shape[0], rank, *(1 for _ in shape[2:]))
        found[path] = LowRank(torch.randn(rank, *shape[1:]), up, float(len(found) % 5))
    return found


def norms(model: nn.Module) -> dict[str, Norm]:
    """Changes of all normalisations."""
    found = {}
    for path, layer in model.named_modules():
        if isinstance(layer, NORMS):
            found[path] = Norm(torch.ones(layer.weight.shape), torch.zeros(layer.weight.shape))
    return found


def facts_of(value: object) -> object:
    """What can be compared of an attribute."""
    if isinstance(value, torch.Tensor):
        return (
            type(value),
            value.dtype,
            value.device,
            value.requires_grad,
            value.shape,
            value.detach().numpy().tobytes(),
        )
    if isinstance(value, nn.Module):
        return type(value), {name: facts_of(one) for name, one in vars(value).items()}
    if isinstance(value, dict):
        return type(value), [(key, facts_of(one)) for key, one in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value), [facts_of(one) for one in value]
    return value if isinstance(value, (str, int, float, set, type(None))) else type(value)


def add(model: nn.Module, name: str, config: LoraConfig) -> None:
    """An adapter that PEFT puts there, drawn from the same numbers each time."""
    torch.manual_seed(1)
    inject_adapter_in_model(config, model, adapter_name=name)


STATES = {
    "nothing": lambda model: None,
    "trained": lambda model: next(model.parameters()).requires_grad_(True),
    "plain": lambda model: add(model, "old", LierLaConfig(r=2)),
    "everywhere": lambda model: add(model, "old", C3LierConfig(r=2, conv_dim=2)),
    "dylora": lambda model: add(model, "old", DyLoraConfig(r=4)),
    "several": lambda model: (
        add(model, "dora", LoraConfig(r=2, use_dora=True, target_modules=ATTENTION)),
        add(model, "stable", LoraConfig(r=4, use_rslora=True, lora_dropout=0.1, target_modules=ATTENTION)),
        model.requires_grad_(True),
    ),
    "frozen": lambda model: add(model, "old", LoraConfig(inference_mode=True, target_modules=ATTENTION)),
    "disabled": lambda model: (
        add(model, "old", LierLaConfig(r=2)),
        [layer.enable_adapters(False) for layer in model.modules() if isinstance(layer, LoraLayer)],
    ),
}


@pytest.mark.parametrize("facts", [{"type": "LierLa"}, {"type": "DyLora", "unit": 1, "rank_sampling": "uniform"}])
@pytest.mark.parametrize("component", ["unet", "text_encoder"])
@pytest.mark.parametrize("state", STATES)
def test_grafted_is_what_peft_makes(pipe, component, state, facts, monkeypatch) -> None:
    if facts["type"] == "DyLora" and state not in ("nothing", "plain"):
        pytest.skip("the type has no say in where layers go")
    facts = {**facts, **({"rank_scaling": "sqrt", "freeze_lower": False} if facts["type"] == "DyLora" else {})}
    ours, stock = (copy.deepcopy(getattr(pipe, component)).eval() for _ in range(2))
    for model in (ours, stock):
        STATES[state](model)
    check_equal_to_pefts(ours, stock, pairs(ours, conv=True), facts, monkeypatch)


@pytest.mark.parametrize("state", ["nothing", "trained", "plain", "norms"])
@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_so_are_layers_of_normalisations(pipe, component, state, monkeypatch) -> None:
    changes = norms(getattr(pipe, component))
    states = {**STATES, "norms": lambda model: place(model, changes, "old", {})}
    ours, stock = (copy.deepcopy(getattr(pipe, component)).eval() for _ in range(2))
    for model in (ours, stock):
        states[state](model)
    check_equal_to_pefts(ours, stock, {**pairs(ours), **changes}, {}, monkeypatch)
    assert all(isinstance(ours.get_submodule(path), NormLayer) for path in changes)
    assert len(changes) > 3


def check_equal_to_pefts(ours, stock, matched, facts, monkeypatch) -> None:
    """Place an adapter in one model and let PEFT inject it in the other; every attribute is the same then."""
    grafted, places = [], grafting.places
    monkeypatch.setattr(grafting, "places", lambda *args: grafted.append(places(*args)) or grafted[-1])
    place(ours, matched, "new", facts)
    assert len(grafted) == 1
    assert grafted[0] is not None
    monkeypatch.setattr(grafting, "places", lambda *_: None)
    place(stock, matched, "new", facts)
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in stock.named_modules()]
    for (name, mine), (_, theirs) in zip(ours.named_modules(), stock.named_modules(), strict=True):
        assert type(mine) is type(theirs)
        for key in vars(mine).keys() | vars(theirs).keys():
            if key not in ("_modules", "peft_config", "lora_variant") and not (name == "" and "_hooks" in key):
                assert facts_of(vars(mine)[key]) == facts_of(vars(theirs)[key]), (name, key)
    assert list(ours.peft_config) == list(stock.peft_config)
    for name, config in ours.peft_config.items():
        assert type(config) is type(stock.peft_config[name])
        assert vars(config).keys() == vars(stock.peft_config[name]).keys()
        assert config.to_dict() == stock.peft_config[name].to_dict()
    assert len(ours._forward_pre_hooks) == len(stock._forward_pre_hooks)


def test_grafted_layers_have_nothing_in_common(pipe) -> None:
    model = copy.deepcopy(pipe.unet)
    place(model, pairs(model), "a", {"type": "LierLa"})
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    seen: dict[int, str] = {}
    for layer in layers:
        for part in layer.modules():
            for key, value in vars(part).items():
                if isinstance(value, (dict, list, set)) and key != "_active_adapter":
                    assert seen.setdefault(id(value), f"{id(part)}.{key}") == f"{id(part)}.{key}"


def test_an_adapter_trains_as_one_of_pefts(pipe) -> None:
    model = copy.deepcopy(pipe.unet)
    place(model, pairs(model), "a", {"type": "LierLa"})
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".lora_" in name}


def fused(model: nn.Module) -> None:
    add(model, "old", LierLaConfig(r=2))
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.merge()


class Packed(nn.Parameter):
    """A weight that is none of torch's own."""


UNUSUAL = {
    "fused": fused,
    "another type": lambda model: inject_adapter_in_model(LoHaConfig(target_modules=["to_q"]), model),
    "whole modules": lambda model: add(
        model, "old", LoraConfig(target_modules=["to_q"], modules_to_save=["conv_norm_out"])
    ),
    "packed": lambda model: setattr(
        model.mid_block.attentions[0].transformer_blocks[0].attn1.to_q,
        "weight",
        Packed(model.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.data),
    ),
    "quantised": lambda model: setattr(model, "is_loaded_in_8bit", True),
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_the_unusual_is_left_to_peft(pipe, kind) -> None:
    model = copy.deepcopy(pipe.unet)
    UNUSUAL[kind](model)
    assert grafting.places(model, pairs(copy.deepcopy(pipe.unet))) is None


def test_a_layer_that_is_not_there_is_left_to_peft(pipe) -> None:
    assert grafting.places(pipe.unet, ["mid_block.attentions.7"]) is None
