"""PEFT's own interface with this package's configs, on every sort of model."""

import copy

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftMixedModel, PeftModel, get_peft_model

from lora_adapters import Adapter, AdapterError, DyLoraConfig, set_rank
from lora_adapters.types.dylora.rank_controller import controllers
from lora_adapters.types.layers import layers

from .hub_server import TOKEN
from .peft_models import CONFIGS, MODELS, Custom, changed_by_hand, config, fill

pytestmark = pytest.mark.slow

every = pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in MODELS for kind in CONFIGS])
close = {"rtol": 1e-4, "atol": 1e-5}


@torch.no_grad()
def run(call, model):
    return call(model.eval())


@every
def test_trained_saved_and_loaded(name, kind, tmp_path) -> None:
    model, call = MODELS[name]()
    base = copy.deepcopy(model)
    peft_model = get_peft_model(copy.deepcopy(model), config(kind, name))
    torch.testing.assert_close(run(call, peft_model), run(call, base), rtol=0, atol=0)
    assert all(("lora_" in key) is one.requires_grad for key, one in peft_model.named_parameters())
    peft_model.train()
    optimizer = torch.optim.Adam([one for one in peft_model.parameters() if one.requires_grad], lr=0.02)
    for _ in range(4):  # the first moves `up` alone
        call(peft_model).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = run(call, peft_model)
    assert (trained - run(call, base)).abs().max() > 1e-4
    torch.testing.assert_close(
        trained, run(call, changed_by_hand(copy.deepcopy(base), peft_model, {"default": 1})), **close
    )

    peft_model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(run(call, again), trained, rtol=0, atol=0)
    assert type(again.peft_config["default"]) is CONFIGS[kind][0]
    if kind == "dylora":
        assert again.peft_config["default"].unit == 2
        set_rank(again, 2)
        assert (run(call, again) - trained).abs().max() > 1e-6
    state = base.state_dict()
    for key, value in again.unload().state_dict().items():
        assert torch.equal(value, state[key])


@every
def test_merged_and_taken_out_again(name, kind) -> None:
    model, call = MODELS[name]()
    base = run(call, model)
    peft_model = fill(get_peft_model(model, config(kind, name)))
    if kind == "dylora":
        set_rank(peft_model, 2)
    wanted = run(call, peft_model)
    with peft_model.disable_adapter():
        torch.testing.assert_close(run(call, peft_model), base, rtol=0, atol=0)
    peft_model.merge_adapter()
    torch.testing.assert_close(run(call, peft_model), wanted, **close)
    peft_model.unmerge_adapter()
    torch.testing.assert_close(run(call, peft_model), wanted, **close)
    merged = peft_model.merge_and_unload()
    assert not hasattr(merged, "peft_config")
    torch.testing.assert_close(run(call, merged), wanted, **close)


@every
def test_several_adapters(name, kind, tmp_path) -> None:
    model, call = MODELS[name]()
    base = copy.deepcopy(model)
    peft_model = fill(get_peft_model(model, config(kind, name), adapter_name="a"), "a", seed=1)
    peft_model.add_adapter("b", config(kind, name, r=6, lora_alpha=1))
    fill(peft_model, "b", seed=2)
    peft_model.add_adapter("plain", LoraConfig(r=3, target_modules=sorted(peft_model.peft_config["a"].target_modules)))
    fill(peft_model, "plain", seed=3)

    def by_hand(**weights):
        return run(call, changed_by_hand(copy.deepcopy(base), peft_model, weights))

    for one in ("a", "b", "plain"):
        peft_model.set_adapter(one)
        torch.testing.assert_close(run(call, peft_model), by_hand(**{one: 1}), **close)
    peft_model.base_model.set_adapter(["a", "b", "plain"])
    torch.testing.assert_close(run(call, peft_model), by_hand(a=1, b=1, plain=1), **close)
    peft_model.base_model.set_adapter("b")

    for combination, options in (("cat", {}), ("svd", {"svd_rank": 13})):
        peft_model.add_weighted_adapter(["a", "b", "plain"], [0.5, -0.7, 0.25], combination, combination, **options)
        peft_model.set_adapter(combination)
        torch.testing.assert_close(run(call, peft_model), by_hand(a=0.5, b=-0.7, plain=0.25), rtol=1e-3, atol=1e-4)
        assert not isinstance(peft_model.peft_config[combination], DyLoraConfig)
    assert isinstance(peft_model.peft_config["a"], CONFIGS[kind][0])
    assert len(controllers(peft_model)) == (2 if kind == "dylora" else 0)

    peft_model.save_pretrained(tmp_path)
    other = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a", adapter_name="a")
    other.load_adapter(tmp_path / "cat", adapter_name="cat")
    for one, weights in (("a", {"a": 1}), ("cat", {"a": 0.5, "b": -0.7, "plain": 0.25})):
        other.set_adapter(one)
        torch.testing.assert_close(run(call, other), by_hand(**weights), rtol=1e-3, atol=1e-4)
    peft_model.delete_adapter("a")
    assert "a" not in peft_model.peft_config
    peft_model.set_adapter("b")
    torch.testing.assert_close(run(call, peft_model), by_hand(b=1), **close)


@pytest.mark.parametrize("combination", ["cat", "svd", "linear"])
def test_a_dylora_is_combined_as_it_is_used(combination) -> None:
    model, call = MODELS["custom"]()
    peft_model = fill(get_peft_model(model, config("dylora", "custom", conv_dim=4, rank_scaling="sqrt"), "a"), "a")
    set_rank(peft_model, 2)
    wanted = run(call, peft_model)
    peft_model.add_weighted_adapter(["a"], [1.0], "one", combination)
    peft_model.set_adapter("one")
    torch.testing.assert_close(run(call, peft_model), wanted, **close)
    peft_model.set_adapter("a")
    set_rank(peft_model, 4)
    assert (run(call, peft_model) - wanted).abs().max() > 1e-4
    with pytest.raises(AdapterError, match="one is not a DyLoRA"):
        set_rank(peft_model, 2, "one")


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("first", [True, False], ids=["first", "second"])
def test_mixed_with_another_method(kind, first, tmp_path) -> None:
    model, call = MODELS["custom"]()
    base = copy.deepcopy(model)
    ours, loha = config(kind, "custom"), LoHaConfig(r=2, target_modules=["body.0", "head"], init_weights=False)
    torch.manual_seed(3)
    mixed = get_peft_model(model, ours if first else loha, adapter_name="one", mixed=True)
    mixed.add_adapter("two", loha if first else ours)
    mine, other = ("one", "two") if first else ("two", "one")
    fill(mixed, mine)
    assert isinstance(mixed, PeftMixedModel)
    mixed.set_adapter(mine)
    wanted = run(call, mixed)
    paths = {path for path, _ in layers(mixed, mine)}  # the names of the base model, wrapped or not
    assert {path.removeprefix("base_model.model.") for path in paths} == {"conv", "point", "body.0", "body.2"}
    torch.testing.assert_close(wanted, run(call, changed_alone(base, mixed, mine)), **close)
    if kind == "dylora":
        set_rank(mixed, 2)
        assert (run(call, mixed) - wanted).abs().max() > 1e-5
    mixed.set_adapter([mine, other])
    both = run(call, mixed)
    assert (both - wanted).abs().max() > 1e-4
    torch.testing.assert_close(run(call, mixed.merge_and_unload()), both, **close)


def changed_alone(base, mixed, adapter_name):
    """As changed_by_hand, of layers that may be inside another method's."""
    base = copy.deepcopy(base)
    with torch.no_grad():
        for path, layer in layers(mixed, adapter_name):
            weight = base.get_submodule(path.removeprefix("base_model.model.")).weight
            down, up = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
            delta = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
            weight += layer.lora_alpha[adapter_name] / layer.r[adapter_name] * delta
    return base


def test_a_model_without_known_blocks_wants_to_be_told() -> None:
    with pytest.raises(AdapterError, match=r"Custom has none of the blocks .*: give target_modules"):
        get_peft_model(Custom(), CONFIGS["c3lier"][0]())


def test_what_is_no_linear_layer_is_refused() -> None:
    for layer in (torch.nn.Embedding(5, 8), torch.nn.MultiheadAttention(8, 2)):
        model = torch.nn.Sequential(layer, torch.nn.Linear(8, 8))
        with pytest.raises(AdapterError, match=rf"0 is {type(layer).__name__}: DyLoraConfig is for linear layers"):
            get_peft_model(model, DyLoraConfig(r=2, target_modules=["0", "1"]))
        assert not any(hasattr(one, "lora_A") for one in model.modules())
    with pytest.raises(AdapterError, match="use_dora"):
        DyLoraConfig(use_dora=True)


def test_a_linear_layer_of_images_is_cut_in_its_last_dimension() -> None:
    model = fill(get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 5)), DyLoraConfig(r=4, target_modules=["0"])))
    model.eval()  # in training each call would draw a rank
    set_rank(model, 2)
    x = torch.randn(2, 7, 4, 3)
    torch.testing.assert_close(model(x).flatten(0, 2), model(x.flatten(0, 2)))


def test_pushed_and_loaded_with_pefts_own_calls(hub, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    model, call = MODELS["clip"]()
    base = copy.deepcopy(model)
    peft_model = fill(get_peft_model(model, config("dylora", "clip")))
    peft_model.push_to_hub("me/clip")
    files = hub.repos["me/clip"].files()
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(files)
    again = PeftModel.from_pretrained(copy.deepcopy(base), "me/clip")
    torch.testing.assert_close(run(call, again), run(call, peft_model), rtol=0, atol=0)
    assert isinstance(again.peft_config["default"], DyLoraConfig)
    adapter = Adapter.load("me/clip")
    assert adapter.components == ("text_encoder",)
    assert adapter.dylora.unit == 2
