"""Layers that are trained compute what LyCORIS' modules with the same weights do: outputs and gradients."""

import copy

import pytest
import torch
from peft import inject_adapter_in_model
from torch import nn

from lora_adapters import LycorisConfig, param_groups
from lora_adapters.convert.deltas import Hadamard, Kronecker, read_module
from lora_adapters.convert.errors import AdapterError
from lora_adapters.kohya_options import network_options, without_effect
from lora_adapters.types.layers import layers
from lora_adapters.types.registry import delta_of
from tests.lora_adapters.conftest import make_pipeline
from tests.lora_adapters.types.test_initial import CASES as ALL_CASES
from tests.lora_adapters.types.test_initial import LAYERS, lycoris_module

CASES = {name: case for name, case in ALL_CASES.items() if "train_on_input" not in case[1]}  # a preset says where

# The parameter of LyCORIS' module that a tensor is, by the tensor's name and the algorithm.
PREFIXES = {"loha": "hada_", "lokr": "lokr_"}
NAMES = {
    "magnitude": "dora_scale",
    "blocks": "oft_blocks",
    "vector": "weight",
    "diff": "weight",
    "diff_b": "bias",
    **{name: f"lora_{name}.weight" for name in ("down", "mid", "up")},
    **{name: f"{name}.weight" for name in ("a1", "a2", "b1", "b2")},
}
INPUTS = {"linear": (5, 48), "conv1x1": (2, 32, 6, 6), "conv3x3": (2, 32, 6, 6)}


def parameters(layer, algo: str) -> dict[str, nn.Parameter]:
    """The adapter's parameters by LyCORIS' names."""
    if isinstance(layer.lora_B["default"], (nn.Linear, nn.Conv2d)):
        parts = {"lora_down.weight": layer.lora_A["default"], "lora_up.weight": layer.lora_B["default"]}
        return {name: part.weight for name, part in parts.items()}
    ours = {}
    for name, parameter in layer.lora_A["default"].named_parameters():
        own = name.replace("change_", "")
        own = NAMES.get(own) or (PREFIXES.get(algo, "") if own not in ("scalar", "rescale") else "") + own
        ours[own] = parameter
    return ours


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_lycoris_own(case, kind) -> None:
    algo, options = CASES[case]
    torch.manual_seed(0)
    base = LAYERS[kind]()
    theirs = lycoris_module(base, algo, 4, 2.0, options)
    model = nn.Sequential(copy.deepcopy(base))
    inject_adapter_in_model(LycorisConfig(r=4, lora_alpha=2, target_modules=["0"], algo=algo, **options), model)
    own, known = parameters(model[0], algo), dict(theirs.named_parameters())
    assert own.keys() == known.keys()
    with torch.no_grad():
        for name, parameter in own.items():
            change = 0.2 * torch.randn(parameter.shape)
            known[name].add_(change)
            diff = name in ("weight", "bias") and algo == "full"  # LyCORIS trains the whole weight, not the difference
            parameter.copy_(change if diff else known[name])
    inputs = torch.randn(INPUTS[kind])
    ours, expected = model(inputs), theirs(inputs)
    assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    wanted = torch.randn(ours.shape)
    (ours * wanted).sum().backward()
    (expected * wanted).sum().backward()
    for name, parameter in own.items():
        gradient = known[name].grad
        assert gradient.abs().max() > 0, name
        largest = float(gradient.abs().max())
        assert torch.allclose(parameter.grad, gradient, rtol=1e-5, atol=1e-5 * largest), name
    # and what a file has means the same
    written = delta_of(model[0], "default", stabilized=options.get("rs_lora", False)).tensors()
    read = read_module({name: tensor.detach() for name, tensor in written.items()})
    weight = base.weight.detach()
    again = read.delta(weight)
    live = ours.detach() - nn.Sequential(copy.deepcopy(base))(inputs)
    bias = read.bias()
    applied = type(base).forward(_with(base, again, bias), inputs).detach()
    assert torch.allclose(applied, live, rtol=1e-4, atol=1e-4 * float(live.abs().max()))


def _with(base: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    layer = copy.deepcopy(base)
    layer.weight = nn.Parameter(weight)
    layer.bias = None if bias is None else nn.Parameter(bias)
    return layer


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("case", CASES)
def test_nothing_changes_before_the_first_step(case, kind) -> None:
    algo, options = CASES[case]
    base = LAYERS[kind]()
    model = nn.Sequential(copy.deepcopy(base))
    inject_adapter_in_model(LycorisConfig(r=4, lora_alpha=2, target_modules=["0"], algo=algo, **options), model)
    inputs = torch.randn(INPUTS[kind])
    assert torch.allclose(model(inputs), base(inputs), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "plus"),
    [
        ({"algo": "loha"}, {"w2_a"}),
        ({"algo": "loha", "dora_wd": True, "use_scalar": True}, {"change_change_w2_a"}),
        ({"algo": "lokr", "factor": 4}, {"w1"}),
        ({"algo": "lokr", "decompose_both": True, "dora_wd": True}, {"change_w1_a", "change_w1_b"}),
        ({"algo": "lora", "dora_wd": True}, {"change_up"}),
    ],
)
def test_loraplus_raises_the_rate_of_those_that_kohya_names(options, plus) -> None:
    model = nn.Sequential(nn.Linear(48, 48))
    inject_adapter_in_model(LycorisConfig(r=2, target_modules=["0"], **options), model)
    groups = {group["name"]: group for group in param_groups(model, lr=1.0, loraplus_lr_ratio=4.0)}
    names = {id(parameter): name for name, parameter in model[0].lora_A["default"].named_parameters()}
    assert {names[id(parameter)] for parameter in groups["unet plus"]["params"]} == plus
    assert {names[id(parameter)] for group in groups.values() for parameter in group["params"]} == set(names.values())
    assert groups["unet plus"]["lr"] == 4.0


def test_loraplus_where_nothing_is_up() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    inject_adapter_in_model(LycorisConfig(r=2, target_modules=["0"], algo="full"), model)
    with pytest.raises(AdapterError, match=r"LoRA[+]'s ratio has no effect: no module of the adapter has an `up`"):
        param_groups(model, lr=1.0, loraplus_lr_ratio=4.0)


def test_the_preset_of_ia3_says_which_sides_are_scaled() -> None:
    unet = make_pipeline("sd15").unet
    unet.add_adapter(LycorisConfig(algo="ia3", preset="ia3"), adapter_name="default")
    sides = {path.rpartition(".")[2]: delta_of(layer, "default").on_input for path, layer in layers(unet, "default")}
    assert sides == {"to_k": False, "to_v": False, "2": True}


def test_a_preset_s_file_gives_parts_algorithms_of_their_own(tmp_path) -> None:
    file = tmp_path / "mixed.toml"
    file.write_text(
        'unet_target_module = ["Transformer2DModel", "ResnetBlock2D"]\nunet_target_name = ["conv_in"]\n'
        '[module_algo_map.ResnetBlock2D]\nalgo = "lokr"\ndim = 3\nfactor = 2\n'
        '[module_algo_map.FeedForward]\nalgo = "lora"\ndim = 3\nalpha = 6.0\n'
        '[name_algo_map.conv_in]\nalgo = "full"\n'
    )
    unet = make_pipeline("sd15").unet
    config = LycorisConfig(r=2, algo="loha", dora_wd=True, train_norm=True, preset=str(file))
    unet.add_adapter(config, adapter_name="default")
    kinds = {path: delta_of(layer, "default") for path, layer in layers(unet, "default")}
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    found = {name: kinds[path].kind for name, path in {
        "attention": f"{block}.attn1.to_q",
        "feed-forward": f"{block}.ff.net.2",
        "resnet": "down_blocks.0.resnets.0.conv1",
        "norm": f"{block}.norm1",
        "outer": "conv_in",
    }.items()}  # fmt: skip
    expected = {"attention": "DoRA", "feed-forward": "DoRA", "resnet": "DoRA", "norm": "norm", "outer": "full"}
    assert found == expected
    assert type(kinds[f"{block}.attn1.to_q"].change) is Hadamard
    low_rank = kinds[f"{block}.ff.net.2"].change
    assert (low_rank.rank, low_rank.alpha) == (3, 6.0)
    assert type(kinds["down_blocks.0.resnets.0.conv1"].change) is Kronecker


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[module_algo_map.X]\nalgo = "lhoa"', "X: unknown algo lhoa"),
        ('[module_algo_map.X]\nalgo = "loha"\nfactor = 4', "X: factor: algo loha has no such option"),
        ("[module_algo_map.X]\nfactr = 4", "X: unknown option factr; the nearest known name is factor"),
    ],
)
def test_presets_whose_options_there_are_not(tmp_path, text, message) -> None:
    file = tmp_path / "mixed.toml"
    file.write_text(text)
    with pytest.raises(AdapterError, match=message):
        LycorisConfig(algo="loha", preset=str(file))


LOKR = {"algo": "lokr", "factor": 4, "conv_dim": 8, "conv_alpha": None}
LOHA = {"algo": "loha", "preset": "full", "dora_wd": True, "conv_alpha": 2.0, "conv_dim": None}
NETWORKS = {
    "networks.loha": ({}, {"algo": "loha", "preset": None, "conv_dim": None}),
    "networks.lokr": ({"factor": "4", "conv_dim": "8"}, LOKR),
    "lycoris.kohya": ({"algo": "LoHa", "dora_wd": "True"}, LOHA),
    "lycoris": ({"algo": "ia3"}, {"algo": "ia3", "preset": "ia3"}),
}


@pytest.mark.parametrize("module", NETWORKS)
def test_network_modules(module) -> None:
    args, expected = NETWORKS[module]
    config = network_options(module, 4, 2.0, args).config
    assert isinstance(config, LycorisConfig)
    assert {name: getattr(config, name) for name in expected} == expected


def test_an_old_name_of_an_option() -> None:
    assert network_options("networks.loha", network_args={"use_cp": "True"}).config.use_tucker
    assert without_effect("networks.lora", {"use_cp": "True"}).keys() == {"use_cp"}


def test_options_without_effect_are_said() -> None:
    reasons = without_effect("networks.loha", {"factor": "4", "bypass_mode": "True", "rank_dropout": "0.1"})
    assert reasons == {
        "factor": "algo loha has no such option",
        "bypass_mode": "it only changes how the same result is computed",
    }
    assert without_effect("lycoris.kohya", {"algo": "lokr", "factor": "4", "preset": "full"}) == {}
    reasons = without_effect("networks.lora", {"dora_wd": "True"})
    assert reasons == {"dora_wd": "it is for LyCORIS: give network_module lycoris.kohya"}


@pytest.mark.parametrize(
    ("module", "args", "message"),
    [
        ("networks.loha", {"algo": "lokr"}, "algo=lokr: it goes with network_module lycoris.kohya"),
        ("lycoris.kohya", {"algo": "dylora"}, "give network_module networks.dylora"),
        ("lycoris.kohya", {"algo": "lhoa"}, "unknown algo lhoa"),
        ("networks.loha", {"train_norm": "True"}, "train_norm needs a preset"),
        ("networks.oft", {}, "give lycoris.kohya with algo=diag-oft"),
    ],
)
def test_network_options_that_cannot_be_meant(module, args, message) -> None:
    with pytest.raises(AdapterError, match=message):
        network_options(module, network_args=args)
