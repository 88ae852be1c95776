"""Changes that are applied by their factors: what comes out, and every gradient, is that of ΔW."""

import copy

import pytest
import torch
from peft import inject_adapter_in_model
from torch import nn

from lora_adapters import LycorisConfig
from lora_adapters.convert.deltas import read_module
from lora_adapters.convert.deltas.base import with_tensors
from lora_adapters.convert.deltas.with_scalar import WithScalar
from lora_adapters.train.training.regularization import add_dropouts
from lora_adapters.types.lycoris.factored import applied_in_factors
from lora_adapters.types.lycoris.operations import applied

LAYERS = {
    "linear": (lambda: nn.Linear(48, 96), (2, 5, 48)),
    "a vector": (lambda: nn.Linear(48, 96), (48,)),
    "conv1x1": (lambda: nn.Conv2d(48, 96, 1), (2, 48, 6, 5)),
    "conv3x3": (lambda: nn.Conv2d(48, 96, 3, padding=1), (2, 48, 6, 5)),
    "strided": (lambda: nn.Conv2d(48, 96, 3, stride=2, padding=2, dilation=2), (2, 48, 9, 7)),
}


def some(*shape):
    return 0.3 * torch.randn(shape, dtype=torch.float64)


def tensors(kind, kernel):
    flat = 12 * (kernel[0] * kernel[1] if kernel else 1)
    return {
        "LoHa": {f"hada_w{n}_a": some(96, 2) for n in (1, 2)}
        | {f"hada_w{n}_b": some(2, 4 * flat) for n in (1, 2)}
        | {"alpha": torch.tensor(1.5)},
        "LoKr": {"lokr_w1": some(3, 4), "lokr_w2": some(32, 12, *kernel)},
        "LoKr, a tall w1": {"lokr_w1": some(24, 4), "lokr_w2": some(4, 12, *kernel)},
        "LoKr of pairs": {"lokr_w1_a": some(8, 2), "lokr_w1_b": some(2, 4), "alpha": torch.tensor(3.0)}
        | {"lokr_w2_a": some(12, 2), "lokr_w2_b": some(2, flat)},
        "LoKr, Tucker": {"lokr_w1": some(8, 4), "lokr_t2": some(2, 2, *(kernel or (1, 1)))}
        | {"lokr_w2_a": some(2, 12), "lokr_w2_b": some(2, 12), "alpha": torch.tensor(1.0)},
    }[kind]


@pytest.mark.parametrize("scalar", [None, 0.7])
@pytest.mark.parametrize("kind", ["LoHa", "LoKr", "LoKr, a tall w1", "LoKr of pairs", "LoKr, Tucker"])
@pytest.mark.parametrize("layer", LAYERS)
def test_outputs_and_gradients(layer, kind, scalar) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[layer]
    base = make().double()
    change = read_module(tensors(kind, base.weight.shape[2:])).scaled(0.8)
    if scalar is not None:
        change = WithScalar(change, torch.tensor(scalar, dtype=torch.float64))
    wanted = None
    found = []
    for quick in (True, False):
        parameters = {}

        def take(name, tensor, parameters=parameters):
            return parameters.setdefault(name, tensor.clone().requires_grad_())

        own = with_tensors(change, take)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
        if quick:
            out = applied_in_factors(base, x, own)
        else:
            out = applied(base, x, own.delta(dtype=torch.float64).reshape(base.weight.shape), None)
        wanted = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        (out * wanted).sum().backward()
        found.append({"out": out.detach(), "x": x.grad, **{name: one.grad for name, one in parameters.items()}})
    for name, one in found[0].items():
        torch.testing.assert_close(one, found[1][name], rtol=1e-9, atol=1e-9)
        assert one.norm() > 0


def test_where_the_weight_is_quicker() -> None:
    x, layer = torch.randn(3, 16), nn.Linear(16, 16)
    hada = {f"hada_w{n}_a": torch.randn(16, 4) for n in (1, 2)} | {f"hada_w{n}_b": torch.randn(4, 16) for n in (1, 2)}
    assert applied_in_factors(layer, x, read_module(hada)) is None
    kron = read_module({"lokr_w1": torch.ones(1, 1), "lokr_w2": torch.randn(16, 16)})
    assert applied_in_factors(layer, x, kron) is None
    half = read_module({"lokr_w1": torch.randn(4, 4), "lokr_w2": torch.randn(4, 4)})
    assert applied_in_factors(layer, x, half) is not None
    assert applied_in_factors(layer.half(), x.half(), half) is None
    grouped = nn.Conv2d(16, 16, 1, groups=1, padding_mode="circular")
    assert applied_in_factors(grouped, torch.randn(1, 16, 4, 4), half) is None


@pytest.mark.parametrize("algo", ["loha", "lokr"])
def test_dropouts_act_on_the_weight(algo) -> None:
    torch.manual_seed(0)
    base = nn.Linear(64, 64)
    model = nn.Sequential(copy.deepcopy(base))
    inject_adapter_in_model(LycorisConfig(r=2, target_modules=["0"], algo=algo), model)
    with torch.no_grad():
        for parameter in model[0].lora_A.parameters():
            parameter.normal_()
    x = torch.randn(5, 64)
    whole = model(x) - base(x)
    assert whole.abs().min(dim=0).values.gt(0).all()
    add_dropouts([model[0]], "default", None, 0.5, None)
    dropped = (model.train()(x) - base(x)).detach()
    columns = dropped.abs().amax(dim=0) < 1e-5
    assert 0 < columns.sum() < 64
    torch.testing.assert_close(dropped[:, ~columns], 2 * whole[:, ~columns].detach(), rtol=1e-3, atol=1e-3)
