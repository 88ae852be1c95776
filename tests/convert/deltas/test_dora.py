"""DoRA over LoRA, LoHa and LoKr against LyCORIS' modules, PEFT's layer and dense arithmetic."""

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

from lora_adapters.convert import AdapterError, LowRank
from lora_adapters.convert.deltas import DoRA, Full, Hadamard, read_module

from .lycoris_modules import LAYERS, check, check_written

ALGORITHMS = {"LoConModule": {}, "LohaModule": {}, "LokrModule": {"factor": 2}}


@pytest.mark.parametrize("multiplier", [1.0, 0.7, -1.5, 0.0])
@pytest.mark.parametrize("on_output", [True, False])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("layer", ["linear", "linear without bias", "conv1x1", "conv3x3"])
def test_lycoris(layer, algorithm, on_output, multiplier):
    options = {"lora_dim": 2, "alpha": 3, "weight_decompose": True, "wd_on_out": on_output, **ALGORITHMS[algorithm]}
    change = check(algorithm, LAYERS[layer](), multiplier, **options)
    assert (type(change), change.kind, change.rank, change.needs_base) == (DoRA, "DoRA", 2, True)


def test_scalar_and_tucker():
    options = {"lora_dim": 2, "weight_decompose": True, "use_scalar": True, "use_tucker": True}
    check("LoConModule", LAYERS["conv3x3"](), 0.7, **options)


def test_lycoris_reads_what_is_written():
    made = LAYERS["conv3x3"]()
    check_written(check("LoConModule", made, 1.0, lora_dim=2, alpha=3, weight_decompose=True), made)


@pytest.mark.parametrize("multiplier", [1.0, 0.5, 0.0, -1.5])
@pytest.mark.parametrize("layer", [lambda: nn.Linear(6, 4), lambda: nn.Conv2d(3, 4, 3, padding=1)])
def test_the_magnitude_vector_of_peft(layer, multiplier):
    """Also at other weights, where PEFT multiplies the change under the norm."""
    torch.manual_seed(0)
    model = nn.Sequential(layer())
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["0"], use_dora=True, init_lora_weights=False)
    model = get_peft_model(model, config)
    adapted = model.base_model.model[0]
    weight = adapted.get_base_layer().weight.detach()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.5)
    prefix = "base_model.model.0."
    tensors = {name.removeprefix(prefix): tensor for name, tensor in get_peft_model_state_dict(model).items()}
    assert any(name.startswith("lora_magnitude_vector") for name in tensors)
    change = read_module({**tensors, "alpha": torch.tensor(3.0)})
    weight = weight.clone()
    adapted.set_scale("default", multiplier)
    adapted.merge()
    merged = adapted.get_base_layer().weight.detach()
    torch.testing.assert_close(weight + change.scaled(multiplier).delta(weight), merged, rtol=1e-5, atol=1e-6)
    written = read_module(change.scaled(multiplier).tensors())  # the weight is in the pair's alpha
    torch.testing.assert_close(weight + written.delta(weight), merged, rtol=1e-5, atol=1e-6)


def test_every_row_or_column_has_the_given_length():
    torch.manual_seed(0)
    base, change = torch.randn(4, 3, 2, 2), Full(torch.randn(4, 3, 2, 2))
    rows = DoRA(change, torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(4, 1, 1, 1))
    lengths = (base + rows.delta(base)).flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    columns = DoRA(change, torch.tensor([[1.0, 2.0, 3.0]]).reshape(1, 3, 1, 1))
    lengths = (base + columns.delta(base)).transpose(0, 1).flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.tensor([1.0, 2.0, 3.0]))


def test_a_narrow_base_is_not_rounded():
    base = torch.randn(4, 3).bfloat16()
    change = DoRA(LowRank(torch.randn(2, 3), torch.randn(4, 2), 1.0), torch.rand(4, 1) + 1)
    torch.testing.assert_close(change.delta(base), change.delta(base.float()), rtol=0, atol=0)


def test_the_axis_of_a_single_channel_follows_from_the_weight():
    change = DoRA(Full(torch.ones(1, 5)), torch.full((1, 1), 2.0))
    torch.testing.assert_close((torch.ones(1, 5) + change.delta(torch.ones(1, 5))).norm(), torch.tensor(2.0))
    change = DoRA(Full(torch.ones(5, 1)), torch.full((1, 1), 2.0))
    torch.testing.assert_close((torch.ones(5, 1) + change.delta(torch.ones(5, 1))).norm(), torch.tensor(2.0))


def test_what_cannot_be_done():
    change = read_module(
        {"lora_down.weight": torch.ones(2, 3), "lora_up.weight": torch.ones(4, 2), "dora_scale": torch.ones(4, 1)}
    )
    with pytest.raises(AdapterError, match="the change of a DoRA module depends on the model's weight"):
        change.delta()
    with pytest.raises(AdapterError, match=r"a DoRA at weight 0.5 cannot be written"):
        change.scaled(0.5).tensors()
    with pytest.raises(AdapterError, match=r"\[4, 3\], but the model's weight is \[4, 5\]"):
        change.delta(torch.ones(4, 5))
    assert not change.fits((4, 5))
    wrong = DoRA(change.change, torch.ones(3, 1))
    with pytest.raises(AdapterError, match=r"dora_scale has the shape \[3, 1\], but the model's weight is \[4, 3\]"):
        wrong.delta(torch.ones(4, 3))
    for shape in ((4,), (4, 3), (4, 1, 3)):
        with pytest.raises(AdapterError, match="dora_scale has the shape"):
            DoRA(change.change, torch.ones(shape))


def test_dtypes_and_finiteness():
    parts = [torch.randn(4, 2), torch.randn(2, 3), torch.randn(4, 2), torch.randn(2, 3)]
    change = DoRA(Hadamard(*parts, 1.0), torch.ones(4, 1)).to(torch.float16)
    assert {tensor.dtype for name, tensor in change.tensors().items() if name != "alpha"} == {torch.float16}
    assert change.is_finite()
    change.magnitude[0] = float("nan")
    assert not change.is_finite()
