"""Fusing and unfusing: the weights come back bit by bit, and what is fused is what PEFT computes."""

import copy
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from lora_adapters import DyLoraConfig
from tests.lora_adapters.pipelines import make

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    pipe = make("StableDiffusion", tmp_path_factory.mktemp("models"))
    attention, convolutions = r".*(mid|down_blocks\.0).*attn1\.to_[qkv]", r"mid.*\.conv[12]|mid.*\.proj_in"
    add(pipe.unet, "a", LoraConfig(r=4, lora_alpha=3, target_modules=f"{attention}|{convolutions}"))
    add(pipe.unet, "b", LoraConfig(r=3, lora_alpha=2, target_modules=attention))
    add(pipe.text_encoder, "a", LoraConfig(r=4, target_modules=["q_proj"]))
    pipe.unet._hf_peft_config_loaded = pipe.text_encoder._hf_peft_config_loaded = True
    return pipe


@pytest.fixture
def pipe(made):
    pipe = type(made)(**copy.deepcopy(made.components), requires_safety_checker=False)
    pipe.set_adapters(["a", "b"], [0.7, -1.3])
    return pipe


def add(model: nn.Module, name: str, config: LoraConfig) -> None:
    torch.manual_seed(len(name) + ord(name[0]))
    inject_adapter_in_model(config, model, adapter_name=name)
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and name in layer.lora_B:
            for parameter in layer.lora_B[name].parameters():
                nn.init.normal_(parameter.data, std=0.1)


def weights(pipe) -> dict[str, torch.Tensor]:
    both = {**pipe.unet.state_dict(), **{f"text.{key}": one for key, one in pipe.text_encoder.state_dict().items()}}
    return {key: one.clone() for key, one in both.items() if "lora_" not in key}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unfused_weights_are_those_from_before(pipe, dtype) -> None:
    pipe.unet.to(dtype)
    pipe.text_encoder.to(dtype)
    before = weights(pipe)
    for scale in (1.0, 0.6):
        pipe.fuse_lora(lora_scale=scale)
        assert not equal(weights(pipe), before)
        pipe.unfuse_lora()
        assert equal(weights(pipe), before)
        assert not any(layer.merged for layer in pipe.unet.modules() if isinstance(layer, LoraLayer))


OTHERS = {
    "dora": LoraConfig(r=2, use_dora=True, target_modules=r"mid.*to_q|mid.*conv1"),
    "dylora": DyLoraConfig(r=4, target_modules=r"mid.*to_q|mid.*proj_in"),
    "biases": LoraConfig(r=2, lora_bias=True, target_modules=r"mid.*to_out\.0"),
    "rslora": LoraConfig(r=4, use_rslora=True, target_modules=r"mid.*to_k"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_whatever_peft_fuses_is_unfused_whole(pipe, kind) -> None:
    add(pipe.unet, "other", OTHERS[kind])
    pipe.unet.set_adapters(["a", "other"], [0.7, 0.4])
    before, stock = weights(pipe), copy.deepcopy(pipe.unet)
    pipe.fuse_lora()
    for layer in stock.modules():
        if isinstance(layer, LoraLayer):
            type(layer).merge.stock(layer)
    torch.testing.assert_close(dict(pipe.unet.state_dict()), dict(stock.state_dict()))
    pipe.unfuse_lora()
    assert equal(weights(pipe), before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_addition_is_at_least_as_exact_as_pefts(pipe, dtype) -> None:
    exact, stock = copy.deepcopy(pipe.unet).double(), copy.deepcopy(pipe.unet.to(dtype))
    exact.load_state_dict(pipe.unet.state_dict())
    for model in (exact, stock):
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                type(layer).merge.stock(layer)
    pipe.unet.fuse_lora()
    wanted, errors = exact.state_dict(), []
    for model in (pipe.unet, stock):
        errors.append(sum(float((one - wanted[name]).square().sum()) for name, one in model.state_dict().items()))
    assert errors[0] <= errors[1] * 1.01
    merged = {tuple(layer.merged_adapters) for layer in pipe.unet.modules() if isinstance(layer, LoraLayer)}
    assert merged == {("a",), ("a", "b")}


def test_layers_in_other_memory_formats_are_fused(pipe) -> None:
    stock = copy.deepcopy(pipe)
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.fuse_lora()
    stock.fuse_lora()
    torch.testing.assert_close(dict(pipe.unet.state_dict()), dict(stock.unet.state_dict()))


def test_adapters_fused_one_after_another_are_unfused_whole(pipe) -> None:
    before = weights(pipe)
    pipe.fuse_lora(adapter_names=["a"])
    pipe.fuse_lora(adapter_names=["b"])
    assert pipe.num_fused_loras == 2
    pipe.unfuse_lora()
    assert pipe.num_fused_loras == 0
    assert equal(weights(pipe), before)


def test_what_is_kept_goes_with_the_layers(pipe) -> None:
    pipe.fuse_lora()
    layers = [layer for layer in pipe.unet.modules() if isinstance(layer, LoraLayer)]
    assert all("_lora_adapters_kept" in vars(layer) for layer in layers)
    assert not any("kept" in key for key in pipe.unet.state_dict())
    pipe.unfuse_lora()
    assert not any("_lora_adapters_kept" in vars(layer) for layer in layers)


def test_nothing_is_kept_where_nothing_is_to_be(pipe) -> None:
    before = weights(pipe)
    pipe.fuse_lora(keep_weights=False)
    assert not any("_lora_adapters_kept" in vars(layer) for layer in pipe.unet.modules())
    pipe.unfuse_lora()
    torch.testing.assert_close(weights(pipe), before)


def test_a_fused_model_s_pickle_opens_without_this_package(pipe, tmp_path) -> None:
    before = weights(pipe)
    pipe.fuse_lora()
    torch.save(pipe.unet, tmp_path / "unet.pt")
    code = "import sys, torch; torch.load(sys.argv[1], weights_only=False); print('lora_adapters' in sys.modules)"
    command = [sys.executable, "-c", code, str(tmp_path / "unet.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "False"
    copied = copy.deepcopy(pipe.unet)
    copied.unfuse_lora()
    after = {key: one for key, one in copied.state_dict().items() if "lora_" not in key}
    torch.testing.assert_close(after, {key: before[key] for key in after})
    pipe.unfuse_lora()
    assert equal(weights(pipe), before)


def test_pefts_own_merging_is_pefts(pipe) -> None:
    ours, stock = (copy.deepcopy(pipe.unet) for _ in range(2))
    for model, method in ((ours, "__call__"), (stock, "stock")):
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                getattr(type(layer).merge, method)(layer)
                assert "_lora_adapters_kept" not in vars(layer)
    assert equal(ours.state_dict(), stock.state_dict())


def test_weights_changed_while_fused_are_not_lost(pipe) -> None:
    layer = next(layer for layer in pipe.unet.modules() if isinstance(layer, LoraLayer))
    before = layer.base_layer.weight.clone()
    pipe.fuse_lora()
    with torch.no_grad():
        layer.base_layer.weight += 1
    pipe.unfuse_lora()
    torch.testing.assert_close(layer.base_layer.weight, before + 1)


def test_a_model_that_has_been_moved_is_unfused_whole(pipe) -> None:
    before = weights(pipe)
    pipe.fuse_lora()
    pipe.unet.to(torch.bfloat16)
    pipe.unfuse_lora()
    after = weights(pipe)
    assert all(torch.equal(after[key], one.to(after[key].dtype)) for key, one in before.items())


def test_a_load_that_fails_leaves_what_is_kept(pipe, monkeypatch) -> None:
    before = weights(pipe)
    pipe.fuse_lora()
    fused = weights(pipe)
    from lora_adapters import Adapter, injection

    monkeypatch.setattr(injection, "put", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pipe.load_lora_weights(Adapter.from_pipeline(pipe, "a"), adapter_name="c")
    assert equal(weights(pipe), fused)
    pipe.unfuse_lora()
    assert equal(weights(pipe), before)
