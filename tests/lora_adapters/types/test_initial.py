"""What a training begins with: LyCORIS' own tensors by name and shape, drawn in the same way, and no change."""

import copy
import itertools

import pytest
import torch
from torch import nn

from lora_adapters.convert.deltas import DoRA, Norm
from lora_adapters.convert.errors import AdapterError
from lora_adapters.types.lycoris.initial import (
    AlgorithmOptions,
    butterfly_factors,
    factorization,
    initial_change,
    initial_magnitude,
)

modules = pytest.importorskip("lycoris.modules")

LAYERS = {
    "linear": lambda: nn.Linear(48, 64),
    "conv1x1": lambda: nn.Conv2d(32, 64, 1),
    "conv3x3": lambda: nn.Conv2d(32, 64, 3, padding=1),
}
CLASSES = {
    "lora": modules.LoConModule,
    "loha": modules.LohaModule,
    "lokr": modules.LokrModule,
    "full": modules.FullModule,
    "ia3": modules.IA3Module,
    "glora": modules.GLoRAModule,
    "diag-oft": modules.DiagOFTModule,
    "boft": modules.ButterflyOFTModule,
}
CASES = {
    **{algo: (algo, {}) for algo in CLASSES},
    "lora, Tucker": ("lora", {"use_tucker": True}),
    "lora, scalar": ("lora", {"use_scalar": True}),
    "lora, DoRA": ("lora", {"dora_wd": True}),
    "lora, rs-LoRA": ("lora", {"rs_lora": True}),
    "loha, Tucker": ("loha", {"use_tucker": True}),
    "loha, Tucker, scalar": ("loha", {"use_tucker": True, "use_scalar": True}),
    "loha, DoRA on the input": ("loha", {"dora_wd": True, "wd_on_output": False}),
    "lokr, factor": ("lokr", {"factor": 4}),
    "lokr, unbalanced": ("lokr", {"factor": 4, "unbalanced_factorization": True}),
    "lokr, both": ("lokr", {"decompose_both": True}),
    "lokr, Tucker": ("lokr", {"use_tucker": True}),
    "lokr, full matrix": ("lokr", {"full_matrix": True}),
    "lokr, scalar": ("lokr", {"use_scalar": True}),
    "lokr, DoRA, rs-LoRA": ("lokr", {"dora_wd": True, "rs_lora": True, "factor": 2}),
    "glora, scalar": ("glora", {"use_scalar": True}),
    "ia3 on the input": ("ia3", {"train_on_input": True}),
    "diag-oft, constraint": ("diag-oft", {"constraint": 0.5, "rescaled": True}),
    "boft, constraint": ("boft", {"constraint": 0.5, "rescaled": True}),
}
THEIRS = {"dora_wd": "weight_decompose", "wd_on_output": "wd_on_out"}


def lycoris_module(layer: nn.Module, algo: str, rank: int, alpha: float, options: dict):
    own = {THEIRS.get(name, name): value for name, value in options.items()}
    module = CLASSES[algo]("x", copy.deepcopy(layer), 1.0, rank, alpha, **own)
    if algo == "full":
        module.apply_to()  # from here on it holds the whole weight, and writes the difference
    return module


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("case", CASES)
def test_it_begins_as_lycoris_does(case, kind) -> None:
    algo, options = CASES[case]
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    theirs = lycoris_module(layer, algo, 4, 2.0, options).state_dict()
    theirs = {name: tensor.detach() for name, tensor in theirs.items()}
    change = initial_change(layer, 4, 2.0, AlgorithmOptions(algo, **options))
    ours = change.tensors()
    alpha = {} if algo in ("full", "ia3") else {"alpha": ()}
    assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == {
        **{name: tuple(tensor.shape) for name, tensor in theirs.items()},
        **alpha,
    }
    if alpha and not options.get("use_scalar"):  # a scalar of 0 is written as a matrix of zeros
        assert float(ours["alpha"]) == pytest.approx(float(theirs["alpha"]))
    for name, tensor in ours.items():
        if name == "dora_scale":
            assert torch.allclose(tensor, theirs[name], rtol=1e-6)
        elif name not in ("alpha", "on_input") and tensor.numel() > 60 and not options.get("use_scalar"):
            assert float(tensor.float().std()) == pytest.approx(float(theirs[name].float().std()), rel=0.5, abs=1e-9)
    delta = change.delta(layer.weight.detach())
    assert delta.shape == layer.weight.shape
    assert float(delta.abs().max()) < 1e-6
    bias = change.bias()
    assert bias is None or not bias.any()


@pytest.mark.parametrize("layer", [nn.LayerNorm(8), nn.GroupNorm(2, 8), nn.LayerNorm(8, bias=False)])
def test_norms_are_trained_in_full(layer) -> None:
    change = initial_change(layer, 4, 1.0, AlgorithmOptions("loha"))
    assert isinstance(change, Norm)
    shapes = {name: tuple(tensor.shape) for name, tensor in change.tensors().items()}
    assert shapes == {"w_norm": (8,), **({} if layer.bias is None else {"b_norm": (8,)})}


def test_factors_are_lycoris_own() -> None:
    from lycoris.functional import factorization as theirs
    from lycoris.functional import power2factorization

    for size, factor in itertools.product((1, 7, 127, 128, 250, 320, 360, 512, 640, 1280), (-1, 1, 2, 4, 8, 16, 64)):
        assert factorization(size, factor) == theirs(size, factor), (size, factor)
        if factor > 0:
            block, count = power2factorization(size, factor)
            assert butterfly_factors(size, factor) == ((block, count) if count else None), (size, factor)


def test_a_magnitude_is_the_base_weight_s_norm() -> None:
    layer = nn.Conv2d(4, 6, 3)
    weight = layer.weight.detach()
    assert torch.allclose(initial_magnitude(layer, True).flatten(), weight.flatten(1).norm(dim=1))
    assert torch.allclose(initial_magnitude(layer, False).flatten(), weight.transpose(0, 1).flatten(1).norm(dim=1))
    change = initial_change(layer.half(), 2, 1, AlgorithmOptions(dora_wd=True))
    assert isinstance(change, DoRA)
    assert change.magnitude.dtype == torch.float32


def test_an_alpha_of_0_is_the_rank() -> None:
    assert initial_change(nn.Linear(8, 8), 4, 0, AlgorithmOptions("loha")).alpha == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algo": "loah"}, "unknown algo loah"),
        ({"algo": "loha", "factor": 4}, "factor: algo loha has no such option"),
        ({"algo": "full", "dora_wd": True}, "dora_wd: algo full has no such option; it has none"),
        ({"algo": "lokr", "factor": 0}, "factor is 0"),
        ({"algo": "boft", "constraint": -1.0}, "constraint is -1"),
    ],
)
def test_options_that_an_algorithm_has_not(options, message) -> None:
    with pytest.raises(AdapterError, match=message):
        AlgorithmOptions(**options)


def test_channels_without_a_butterfly() -> None:
    with pytest.raises(AdapterError, match="algo boft with rank 4: 36 output channels"):
        initial_change(nn.Linear(4, 36), 4, 1, AlgorithmOptions("boft"))
