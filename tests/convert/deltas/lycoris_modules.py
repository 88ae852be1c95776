"""LyCORIS' own modules with random weights: their outputs, and the tensors that they write."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional

from lora_adapters.convert.deltas import read_module

modules = pytest.importorskip("lycoris.modules")

LAYERS = {
    "linear": lambda: nn.Linear(24, 16),
    "linear without bias": lambda: nn.Linear(12, 32, bias=False),
    "conv1x1": lambda: nn.Conv2d(12, 16, 1),
    "conv3x3": lambda: nn.Conv2d(12, 16, 3, padding=1),
    "conv3x3 strided": lambda: nn.Conv2d(16, 8, 3, stride=2, padding=1),
}
INPUTS = {nn.Linear: lambda layer: (5, layer.in_features), nn.Conv2d: lambda layer: (2, layer.in_channels, 6, 6)}


def make(algorithm, layer, multiplier=1.0, **options):
    """A LyCORIS module (such as `LohaModule`) for a copy of a layer, with random numbers in all parameters."""
    module = getattr(modules, algorithm)("name", deepcopy(layer), multiplier, **options).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name in ("dora_scale", "rescale"):
                parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    if algorithm == "FullModule":
        module.apply_to()  # now it contains the whole weight, and writes the difference
    return module


def written(module):
    """The tensors of the module as LyCORIS writes them: key suffix -> tensor."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


@torch.no_grad()
def changed(layer, change, inputs):
    """The layer's output with a delta added to its weight and bias."""
    weight = layer.weight + change.delta(layer.weight)
    bias = layer.bias
    if (difference := change.bias()) is not None:
        bias = difference if bias is None else bias + difference
    if isinstance(layer, nn.Conv2d):
        return functional.conv2d(inputs, weight, bias, layer.stride, layer.padding)
    if isinstance(layer, nn.Linear):
        return functional.linear(inputs, weight, bias)
    if isinstance(layer, nn.LayerNorm):
        return functional.layer_norm(inputs, layer.normalized_shape, weight, bias, layer.eps)
    return functional.group_norm(inputs, layer.num_groups, weight, bias, layer.eps)


def check(algorithm, layer, multiplier, inputs=None, **options):
    """Check that a delta and LyCORIS' module give the same output of a layer. Returns the delta at weight 1.0."""
    torch.manual_seed(sum(map(ord, algorithm)))
    module = make(algorithm, layer, multiplier, **options)
    change = read_module(written(module))
    if inputs is None:
        inputs = torch.randn(INPUTS[type(layer)](layer))
    with torch.no_grad():
        before, expected = layer(inputs), module(inputs)
    assert change.fits(tuple(layer.weight.shape))
    got = changed(layer, change.scaled(multiplier), inputs)
    size = float((expected - before).norm())
    assert size > 0.05, "the module changes nothing"
    assert float((got - expected).norm()) < 2e-5 * size
    return change


@torch.no_grad()
def read_by_lycoris(change, layer, inputs):
    """The layer's output with a delta whose tensors LyCORIS reads as from a file."""
    tensors = {f"name.{suffix}": tensor for suffix, tensor in change.tensors().items()}
    kind, parameters = modules.get_module(tensors, "name")
    module = modules.make_module(kind, parameters, "name", layer)
    return module.eval()(inputs)


def check_written(change, layer, inputs=None):
    """Check that LyCORIS reads a delta's tensors as the same delta."""
    if inputs is None:
        inputs = torch.randn(INPUTS[type(layer)](layer))
    expected = read_by_lycoris(change, layer, inputs)
    with torch.no_grad():
        size = float((expected - layer(inputs)).norm())
    assert float((changed(layer, change, inputs) - expected).norm()) < 2e-5 * size
