"""Which kind a module's tensors are, and what is said of those that are none."""

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

from lora_adapters.convert import AdapterError
from lora_adapters.convert.deltas import DoRA, WithBias, read_module

from .lycoris_modules import changed

PAIR = {"lora_down.weight": torch.ones(2, 3), "lora_up.weight": torch.ones(4, 2)}


def test_a_missing_alpha_or_one_of_0_is_the_rank():
    for alpha in ({}, {"alpha": torch.tensor(0.0)}, {"alpha": torch.tensor([2.0])}):
        assert read_module({**PAIR, **alpha}).alpha == 2


def test_names_of_peft():
    pair = {"lora_A.weight": PAIR["lora_down.weight"], "lora_B.weight": PAIR["lora_up.weight"]}
    assert torch.equal(read_module(pair).delta(), read_module(PAIR).delta())


def test_the_bias_of_pefts_second_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4))
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["0"], lora_bias=True, init_lora_weights=False)
    model = get_peft_model(model, config)
    tensors = get_peft_model_state_dict(model)
    own = {name.removeprefix("base_model.model.0."): tensor for name, tensor in tensors.items()}
    assert set(own) == {"lora_A.weight", "lora_B.weight", "lora_B.bias"}
    layer = model.base_model.model[0].get_base_layer()
    change, inputs = read_module({**own, "alpha": torch.tensor(3.0)}), torch.randn(5, 6)
    with torch.no_grad():
        torch.testing.assert_close(changed(layer, change, inputs), model(inputs))


def test_all_that_may_stand_beside_a_kind():
    extra = {"dora_scale": torch.ones(4, 1), "diff_b": torch.ones(4), "scalar": torch.tensor(0.5)}
    change = read_module({**PAIR, **extra})
    assert isinstance(change, WithBias)
    assert isinstance(change.change, DoRA)
    torch.testing.assert_close(change.change.change.delta(), torch.ones(4, 3))  # 2 without the scalar
    assert set(change.tensors()) == {*PAIR, "alpha", "dora_scale", "diff_b"}


@pytest.mark.parametrize(
    "tensors",
    [
        PAIR,
        {"hada_w1_a": torch.ones(4, 2), "hada_w1_b": torch.ones(2, 3)}
        | {"hada_w2_a": torch.ones(4, 2), "hada_w2_b": torch.ones(2, 3)},
        {"lokr_w1": torch.ones(2, 3), "lokr_w2": torch.ones(2, 1)},
        {"diff": torch.ones(4, 3)},
        {"w_norm": torch.ones(4), "b_norm": torch.ones(4)},
        {"on_input": torch.tensor(0), "weight": torch.ones(4)},
        {"oft_blocks": torch.ones(2, 2, 2), "alpha": torch.tensor(0.5)},
        {"oft_blocks": torch.ones(2, 2, 2, 2), "rescale": torch.ones(4, 1)},
    ],
    ids=lambda tensors: next(iter(tensors)),
)
def test_tensors_are_those_that_were_read(tensors):
    again = read_module(tensors).tensors()
    assert set(tensors) <= set(again) <= {*tensors, "alpha"}
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({}, "tensors match no known kind of adapter: none"),
        ({"alpha": 1.0}, "tensors match no known kind of adapter: alpha"),
        ({"p_layer.weight": 1.0, "lambda_layer": 1.0}, "of adapter: lambda_layer, p_layer.weight"),
        ({"lora_down.weight": PAIR["lora_down.weight"]}, "a LoRA module lacks lora_up.weight"),
        ({**PAIR, "hada_w1_a": 1.0}, "unexpected tensors in a LoRA module: hada_w1_a"),
        ({**PAIR, "reshape_weight": 1.0}, "unexpected tensors in a LoRA module: reshape_weight"),
        ({"hada_w1_a": 1.0, "hada_w2_a": 1.0}, "a LoHa module lacks hada_w1_b, hada_w2_b"),
        ({"lokr_w1": torch.ones(2, 2)}, "either lokr_w2 or both"),
        ({"a1.weight": 1.0}, "a GLoRA module lacks a2.weight, b1.weight, b2.weight"),
        ({"on_input": 1.0}, "an IA3 module lacks weight"),
        ({"dora_scale": 1.0}, "tensors match no known kind of adapter: dora_scale"),
        ({**PAIR, "lora_A.weight": 1.0}, "lora_A.weight and lora_down.weight stand for the same tensor"),
        ({**PAIR, "dora_scale": 1.0, "lora_magnitude_vector": 1.0}, "stand for the same tensor"),
        ({**PAIR, "lora_magnitude_vector": torch.ones(4, 3)}, r"lora_magnitude_vector has the shape \[4, 3\]"),
        ({**PAIR, "alpha": torch.arange(2)}, r"alpha has the shape \[2\], expected one number"),
        ({**PAIR, "alpha": float("nan")}, "alpha is nan"),
        ({**PAIR, "lora_B.bias": torch.ones(4), "diff_b": torch.ones(4)}, "has both diff_b and another bias"),
        ({"diff": torch.ones(4, 3), "lora_up.bias": torch.ones(4)}, "unexpected tensor in a full module: lora_up.bias"),
        ({**PAIR, "diff_b": torch.ones(4, 1)}, r"diff_b has the shape \[4, 1\]"),
        ({"lora_down.weight": 1.0, "lora_up.weight": 1.0}, "lora_down.weight is a scalar"),
    ],
)
def test_what_cannot_be_read(tensors, said):
    with pytest.raises(AdapterError, match=said) as caught:
        read_module({name: torch.as_tensor(value) for name, value in tensors.items()})
    assert len(str(caught.value).splitlines()) == 1
