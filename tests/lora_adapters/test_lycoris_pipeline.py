"""Adapters of all kinds in a pipeline: each is what its changes make of the weights, and behaves as any adapter."""

import copy

import pytest
import torch
from diffusers.hooks import apply_group_offloading
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file

from lora_adapters import Adapter, AdapterError, LycorisConfig, add_adapter, injection
from lora_adapters.convert.deltas import DoRA, read_module
from lora_adapters.convert.families.names import ModuleName
from lora_adapters.types.layers import layers
from lora_adapters.types.lycoris.layer import held

from .conftest import GOLDEN, expected, needs_groups
from .golden_outputs import error, outputs

BLOCK = "mid_block.attentions.0.transformer_blocks.0"
DYLORA = GOLDEN / "sd15" / "dylora_conv.safetensors"


def models(pipe):
    return {"unet": pipe.unet, "text_encoder": pipe.text_encoder}


def base_of(pipe, module):
    model = models(pipe)[module.component]
    layer = model.get_submodule(injection.live_path(model, module.path))
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def random_change(kind, layer):
    """A change of a kind with random tensors for a layer of the pipeline."""

    def some(*shape):
        return 0.3 * torch.randn(shape)

    shape = tuple(layer.weight.shape)
    out, into = shape[0], shape[1] if len(shape) > 1 else 1
    pair = {"lora_down.weight": some(2, *shape[1:]), "lora_up.weight": some(out, 2)}
    tensors = {
        "LoRA": pair,
        "bias": {**pair, "diff_b": some(out)},
        "LoHa": {f"hada_w{n}_a": some(out, 2) for n in (1, 2)} | {f"hada_w{n}_b": some(2, into) for n in (1, 2)},
        "LoKr": {"lokr_w1": some(2, 2), "lokr_w2_a": some(out // 2, 2), "lokr_w2_b": some(2, into // 2)},
        "DoRA": {**pair, "dora_scale": layer.weight.detach().reshape(out, -1).norm(dim=1).mul(1.2)[:, None]},
        "GLoRA": {"a1.weight": some(into, 2), "a2.weight": some(2, into)}
        | {"b1.weight": some(out, 2), "b2.weight": some(2, into)},
        "IA3": {"weight": some(into), "on_input": torch.tensor(1)},
        "OFT": {"oft_blocks": some(out // 4, 4, 4), "alpha": torch.tensor(0.0)},
        "full": {"diff": some(*shape), "diff_b": some(out)},
        "norm": {"w_norm": some(out), "b_norm": some(out)},
    }[kind]
    return read_module({name: tensor for name, tensor in tensors.items() if tensor is not None})


KINDS = {
    ModuleName("unet", f"{BLOCK}.attn1.to_q"): "LoHa",
    ModuleName("unet", f"{BLOCK}.attn1.to_k"): "LoKr",
    ModuleName("unet", f"{BLOCK}.attn1.to_v"): "DoRA",
    ModuleName("unet", f"{BLOCK}.attn1.to_out.0"): "bias",
    ModuleName("unet", f"{BLOCK}.attn2.to_q"): "GLoRA",
    ModuleName("unet", f"{BLOCK}.attn2.to_k"): "IA3",
    ModuleName("unet", f"{BLOCK}.attn2.to_v"): "OFT",
    ModuleName("unet", f"{BLOCK}.attn2.to_out.0"): "LoRA",
    ModuleName("unet", f"{BLOCK}.norm1"): "norm",
    ModuleName("unet", "mid_block.resnets.0.norm1"): "norm",
    ModuleName("unet", "mid_block.resnets.0.conv1"): "full",
    ModuleName("unet", "up_blocks.1.resnets.0.conv1"): "full",
    ModuleName("text_encoder", "text_model.encoder.layers.0.mlp.fc1"): "LoHa",
    ModuleName("text_encoder", "text_model.encoder.layers.0.layer_norm1"): "norm",
}


def mixed(pipe, seed=0):
    torch.manual_seed(seed)
    return Adapter({module: random_change(kind, base_of(pipe, module)) for module, kind in KINDS.items()})


@torch.no_grad()
def by_hand(pipe, *changes):
    """The outputs of a pipeline to whose weights the (adapter, weight) are added, each made from the first weights."""
    other = copy.deepcopy(pipe)
    for adapter, weight in changes:
        for module, change in adapter.modules.items():
            layer, first = base_of(other, module), base_of(pipe, module)
            scaled = change.scaled(weight if isinstance(weight, float) else weight(module))
            layer.weight += scaled.delta(first.weight).reshape(layer.weight.shape)
            if (bias := scaled.bias()) is not None:
                layer.bias += bias
    return outputs(other, expected("sd15"))


def test_several_with_weights_and_block_weights_and_a_dylora(pipeline):
    pipe, golden = pipeline(), expected("sd15")
    one, two, three = mixed(pipe), mixed(pipe, 1), Adapter.load(DYLORA)
    base = outputs(pipe, golden)
    plain = copy.deepcopy(pipe)
    for name, adapter in (("one", one), ("two", two), ("three", three)):
        adapter.to_pipeline(pipe, name)
    pipe.set_adapters(["one", "two", "three"], [0.5, -0.3, 0.8])
    assert error(outputs(pipe, golden), by_hand(plain, (one, 0.5), (two, -0.3), (three, 0.8)), base) < 1e-4
    assert pipe.get_list_adapters() == {part: ["one", "two", "three"] for part in models(pipe)}
    pipe.set_adapters(["one"], [{"unet": {"mid": 0.4, "up": 0.0}, "text_encoder": 0.7}])

    def in_blocks(module):
        if module.component == "text_encoder":
            return 0.7
        of_part = {"up_blocks": 0.0, "mid_block": 0.4 if ".attentions." in module.path else 1.0}  # diffusers' reading
        return of_part[module.path.split(".")[0]]

    assert error(outputs(pipe, golden), by_hand(plain, (one, in_blocks)), base) < 1e-4
    pipe.set_adapters(["one", "two"], [0.0, 0.0])
    assert error(outputs(pipe, golden), base, base) < 1e-6


def test_disabled_deleted_unloaded(pipeline):
    pipe, golden = pipeline(), expected("sd15")
    base, before = outputs(pipe, golden), copy.deepcopy(pipe.unet.state_dict())
    one, two, plain = mixed(pipe), mixed(pipe, 1), copy.deepcopy(pipe)
    one.to_pipeline(pipe, "one")
    two.to_pipeline(pipe, "two")
    pipe.disable_lora()
    assert error(outputs(pipe, golden), base, base) < 1e-7
    pipe.enable_lora()
    pipe.delete_adapters("one")
    pipe.set_adapters(["two"])
    assert error(outputs(pipe, golden), by_hand(plain, (two, 1.0)), base) < 1e-4
    Adapter.load(DYLORA).to_pipeline(pipe, "one")  # the name is free, also in the layers
    pipe.set_adapters(["one"])
    assert error(outputs(pipe, golden), by_hand(plain, (Adapter.load(DYLORA), 1.0)), base) < 1e-4
    pipe.unload_lora_weights()
    after = pipe.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_dora_of_pefts_has_the_weights_that_pefts_own_layer_has(pipeline, tmp_path):
    """Where diffusers wrote it, weights scale the pair under the norm, with this package and without."""
    source, pipe, golden = pipeline(), pipeline(), expected("sd15")
    base = outputs(pipe, golden)["unet"]
    config = LoraConfig(r=3, lora_alpha=2, use_dora=True, init_lora_weights=False, target_modules=["to_q", "conv1"])
    torch.manual_seed(0)
    add_adapter(source.unet, config)
    tensors = get_peft_model_state_dict(source.unet)
    source.save_lora_weights(tmp_path, tensors, **_collate_lora_metadata({"unet": source.unet}))
    pipe.load_lora_weights(tmp_path, adapter_name="dora")
    assert {type(change) for change in Adapter.from_models({"unet": pipe.unet}, "dora").modules.values()} == {DoRA}
    for weight in (1.0, 0.5, -0.7):
        source.unet.set_adapters(["default"], [weight])
        pipe.unet.set_adapters(["dora"], [weight])
        wanted, found = (outputs(each, golden)["unet"] for each in (source, pipe))
        assert (found - wanted).norm() < 1e-4 * (wanted - base).norm()


@pytest.mark.parametrize("order", [["dylora", "one", "two"], ["one", "two", "dylora"]])
def test_fused_one_after_another(order, pipeline):
    pipe, golden = pipeline(), expected("sd15")
    adapters = {"one": mixed(pipe), "two": mixed(pipe, 1), "dylora": Adapter.load(DYLORA)}
    base, plain = outputs(pipe, golden), copy.deepcopy(pipe)
    for name, adapter in adapters.items():
        adapter.to_pipeline(pipe, name)
    pipe.set_adapters(order, [0.5] * 3)
    want = by_hand(plain, *((adapters[name], 0.5) for name in order))
    for safe in (False, True):
        pipe.fuse_lora(adapter_names=order, safe_fusing=safe)
        assert error(outputs(pipe, golden), want, base) < 1e-4
        pipe.unfuse_lora()
        assert error(outputs(pipe, golden), want, base) < 1e-4
        assert not any("before" in key for part in pipe.unet.modules() for key in getattr(part, "_caches", {}))
        for name, own in ((name, base_of(pipe, name)) for name in adapters["one"].modules):
            torch.testing.assert_close(own.weight, base_of(plain, name).weight, rtol=1e-5, atol=1e-6)
            if own.bias is not None:
                torch.testing.assert_close(own.bias, base_of(plain, name).bias, rtol=1e-6, atol=1e-6)


def test_what_was_fused_is_taken_out_whatever_the_weight_is_then(pipeline):
    pipe = pipeline()
    adapter, plain = mixed(pipe), copy.deepcopy(pipe)
    adapter = adapter.with_modules({name: one for name, one in adapter.modules.items() if one.kind != "LoRA"})
    adapter.to_pipeline(pipe, "a")
    pipe.fuse_lora(lora_scale=0.7)
    pipe.set_adapters(["a"], [0.1])
    pipe.unfuse_lora()
    for name in adapter.modules:
        torch.testing.assert_close(base_of(pipe, name).weight, base_of(plain, name).weight, rtol=1e-5, atol=1e-6)


def test_read_put_into_a_pipeline_saved_and_read(pipeline, tmp_path):
    pipe = pipeline()
    adapter = mixed(pipe)
    file = adapter.save(tmp_path / "mixed.safetensors")
    pipe.load_lora_weights(file, adapter_name="default")
    back = Adapter.from_pipeline(pipe).save(tmp_path / "back.safetensors")
    first, second = load_file(file), load_file(back)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key].flatten(), second[key].flatten()) for key in first)
    states = {f"{name}_lora_layers": get_peft_model_state_dict(model) for name, model in models(pipe).items()}
    pipe.save_lora_weights(tmp_path / "saved", **states, **_collate_lora_metadata(models(pipe)))
    third = load_file(tmp_path / "saved" / "pytorch_lora_weights.safetensors")
    assert first.keys() == third.keys()
    assert all(torch.equal(first[key].flatten(), third[key].flatten()) for key in first)
    changed = {key: tensor + 1 for key, tensor in states["unet_lora_layers"].items()}
    with pytest.raises(AdapterError, match="the unet's tensors do not belong to an adapter in memory"):
        pipe.save_lora_weights(tmp_path / "changed", unet_lora_layers=changed)
    assert not (tmp_path / "changed").exists()


def test_swapped_where_shapes_allow(pipeline):
    pipe, golden = pipeline(), expected("sd15")
    one, two, plain = mixed(pipe), mixed(pipe, 1), copy.deepcopy(pipe)
    base = outputs(pipe, golden)
    pipe.enable_lora_hotswap(target_rank=8)
    one.to_pipeline(pipe, "a")
    pipe.set_adapters(["a"], [0.5])
    places = {name: parameter.data_ptr() for name, parameter in pipe.unet.named_parameters() if "w1_a" in name}
    pipe.load_lora_weights(two, adapter_name="a", hotswap=True)
    assert error(outputs(pipe, golden), by_hand(plain, (two, 0.5)), base) < 1e-4
    assert places == {name: one.data_ptr() for name, one in pipe.unet.named_parameters() if "w1_a" in name}
    query = next(iter(KINDS))
    other = two.with_modules({**two.modules, query: random_change("LoKr", base_of(plain, query))})
    fewer = two.with_modules({name: change for name, change in two.modules.items() if name != query})
    for adapter, said in ((other, "another kind or shape"), (fewer, "a LoHa in a, which a swap would not replace")):
        with pytest.raises(AdapterError, match=said):
            pipe.load_lora_weights(adapter, adapter_name="a", hotswap=True)
    assert error(outputs(pipe, golden), by_hand(plain, (two, 0.5)), base) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, pipeline):
    pipe, golden = pipeline(), expected("sd15")
    adapter, plain, base = mixed(pipe), copy.deepcopy(pipe), outputs(pipe, golden)
    pipe.to(dtype)
    adapter.to_pipeline(pipe, "a")
    lowered = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in golden.items()}
    got = {name: tensor.float() for name, tensor in outputs(pipe, lowered).items()}
    want = by_hand(plain, (adapter, 1.0))
    fused = plain.to(dtype)
    adapter.to_pipeline(fused, "a")
    fused.fuse_lora()
    rounded = {name: tensor.float() for name, tensor in outputs(fused, lowered).items()}
    assert error(got, want, base) < 1.5 * error(rounded, want, base)
    assert error(got, want, base) < (0.03 if dtype is torch.float16 else 0.2)
    precise = {name.rsplit(".", 1)[1] for name, one in pipe.unet.named_parameters() if one.dtype == torch.float32}
    assert "magnitude" in precise
    assert "w1_a" not in precise


def test_offloaded(pipeline):
    pipe, golden = pipeline(), expected("sd15")
    adapter, plain, base = mixed(pipe), copy.deepcopy(pipe), outputs(pipe, golden)
    pipe.enable_model_cpu_offload(device="cpu")
    adapter.to_pipeline(pipe, "a")
    assert error(outputs(pipe, golden), by_hand(plain, (adapter, 1.0)), base) < 1e-4


@pytest.mark.parametrize("fault", ["shape", "bias", "norm", "late"])
def test_a_failed_load_changes_nothing(fault, pipeline, monkeypatch):
    pipe = pipeline()
    first, plain = mixed(pipe), copy.deepcopy(pipe)
    first.to_pipeline(pipe, "first")
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    query, norm = next(iter(KINDS)), ModuleName("unet", f"{BLOCK}.norm1")
    if fault == "late":
        monkeypatch.setattr(injection, "hold", lambda *args: (_ for _ in ()).throw(MemoryError))
        bad = mixed(plain, 1)
    elif fault == "shape":
        bad = first.with_modules({**first.modules, query: random_change("LoHa", plain.unet.conv_in)})
    elif fault == "bias":
        bad = first.with_modules({**first.modules, query: random_change("full", base_of(plain, query))})
    else:
        loha = random_change("LoHa", base_of(plain, query))
        bad = first.with_modules({**first.modules, norm: loha})
    with pytest.raises(MemoryError if fault == "late" else AdapterError) as caught:
        bad.to_pipeline(pipe, "second")
    assert "\n" not in str(caught.value)
    after = pipe.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert pipe.get_list_adapters() == {part: ["first"] for part in models(pipe)}
    assert pipe.unet.active_adapters() == ["first"]


def test_a_component_alone_and_loaded_without_low_memory(pipeline):
    pipe, golden = pipeline(), expected("sd15")
    adapter, plain, base = mixed(pipe), copy.deepcopy(pipe), outputs(pipe, golden)
    text = adapter.with_modules({name: one for name, one in adapter.modules.items() if name.component != "unet"})
    pipe.load_lora_weights(text, adapter_name="a", low_cpu_mem_usage=False)
    assert error(outputs(pipe, golden), by_hand(plain, (text, 1.0)), base) < 1e-4
    assert all(held(layer, "a") for _, layer in layers(pipe.text_encoder, "a"))
    assert not hasattr(pipe.unet, "peft_config")


def test_combining_needs_pairs(pipeline):
    pipe = pipeline()
    adapter = mixed(pipe)
    adapter.to_pipeline(pipe, "a")
    adapter.to_pipeline(pipe, "b")
    from peft.tuners.lora import LoraModel

    with pytest.raises(AdapterError, match="which is not a low-rank pair"):
        LoraModel(pipe.unet, pipe.unet.peft_config, "a").add_weighted_adapter(["a", "b"], [1.0, 1.0], "c", "cat")


def test_what_peft_saves_has_no_place_for_other_kinds(pipeline, tmp_path):
    pipe = pipeline()
    mixed(pipe).to_pipeline(pipe, "default")
    model = PeftModel(pipe.unet, LycorisConfig(r=1, target_modules=["conv_in"]), "more")
    with pytest.raises(AdapterError, match=r"has an? \w+ in .*, which PEFT's files cannot store"):
        model.save_pretrained(tmp_path, selected_adapters=["default"])
    with pytest.raises(AdapterError, match=r"has an? \w+ in .*, which save_lora_adapter's files cannot store"):
        pipe.unet.save_lora_adapter(tmp_path / "unet")
    assert not list(tmp_path.rglob("*.safetensors"))
    pipe.unet.save_lora_adapter(tmp_path / "unet", "more", weight_name="more.safetensors")  # a plain one, as before
    assert (tmp_path / "unet" / "more.safetensors").is_file()


def test_a_load_that_fails_leaves_what_is_fused(pipeline, monkeypatch):
    pipe, golden = pipeline(), expected("sd15")
    adapter = mixed(pipe)
    base = outputs(pipe, golden)
    adapter.to_pipeline(pipe, "a")
    pipe.fuse_lora()
    fused = outputs(pipe, golden)
    monkeypatch.setattr(injection, "hold", lambda *args: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        adapter.to_pipeline(pipe, "b")
    assert error(outputs(pipe, golden), fused, base) < 1e-6


@needs_groups
@pytest.mark.parametrize("first", ["offloaded", "loaded"])
@pytest.mark.parametrize("groups", [{"offload_type": "leaf_level"},
                                    {"offload_type": "block_level", "num_blocks_per_group": 1}])  # fmt: skip
def test_offloaded_in_groups(groups, first, pipeline):
    """Whatever comes first, the images are the same, and so is the model without the adapter."""
    golden, pipe, plain = expected("sd15"), pipeline(), pipeline()
    adapter = mixed(pipe)
    base = outputs(plain, golden)
    adapter.to_pipeline(plain, "a")
    wanted = outputs(plain, golden)
    if first == "loaded":
        adapter.to_pipeline(pipe, "a")
    for model in (pipe.unet, pipe.text_encoder):
        apply_group_offloading(model, torch.device("cpu"), torch.device("cpu"), **groups)
    if first == "offloaded":
        adapter.to_pipeline(pipe, "a")
    assert all(torch.equal(part, wanted[name]) for name, part in outputs(pipe, golden).items())
    pipe.delete_adapters("a")
    assert all(torch.equal(part, base[name]) for name, part in outputs(pipe, golden).items())
