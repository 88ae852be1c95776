"""What diffusers does with adapters, in every pipeline of SD and SDXL, against the same change added by hand."""

import copy

import pytest
import torch

from lora_adapters import Adapter, AdapterError, DyLoraConfig, set_rank

from .conftest import needs_groups
from .pipelines import KINDS, adapter, architecture, by_hand, latents_of, make, models, state

pytestmark = pytest.mark.slow

NEAR = {"rtol": 1e-3, "atol": 1e-3}
TEXT_TO_IMAGE = ("StableDiffusion", "StableDiffusionXL")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the models and the adapters' files are."""
    place = tmp_path_factory.mktemp("pipelines")
    for arch in ("sd", "sdxl"):
        for name in ("style", "dial"):
            adapter(name, arch, place).save(place / f"{name}-{arch}.safetensors")
            adapter(name, arch, place).save(place / f"{name}-{arch}-diffusers.safetensors", "diffusers")
    return place


def file(folder, name, kind, ending=""):
    return folder / f"{name}-{architecture(kind)}{ending}.safetensors"


def both(folder, kind):
    return adapter("style", architecture(kind), folder), adapter("dial", architecture(kind), folder)


@pytest.mark.parametrize("kind", KINDS)
def test_the_life_of_two_adapters(kind, folder) -> None:
    style, dial = both(folder, kind)
    pipe = make(kind, folder)
    before, base = state(pipe), latents_of(pipe)
    pipe.load_lora_weights(file(folder, "style", kind), adapter_name="style")
    torch.testing.assert_close(latents_of(pipe), by_hand(kind, folder, (style, 1.0)), **NEAR)
    assert (latents_of(pipe) - base).abs().max() > 0.05
    pipe.load_lora_weights(file(folder, "dial", kind), adapter_name="dial")
    pipe.set_adapters(["style", "dial"], [0.5, 0.7])
    mixed = latents_of(pipe)
    torch.testing.assert_close(mixed, by_hand(kind, folder, (style, 0.5), (dial, 0.7)), **NEAR)
    assert all(isinstance(model.peft_config["dial"], DyLoraConfig) for model in models(pipe).values())

    other = "sd" if architecture(kind) == "sdxl" else "sdxl"
    present = pipe.get_list_adapters()
    with pytest.raises(AdapterError, match="style-"):
        pipe.load_lora_weights(folder / f"style-{other}.safetensors", adapter_name="wrong")
    assert pipe.get_list_adapters() == present
    assert torch.equal(latents_of(pipe), mixed)

    set_rank(pipe, 2)
    cut = by_hand(kind, folder, (style, 0.5), (dial.truncate(2), 0.7))
    torch.testing.assert_close(latents_of(pipe), cut, **NEAR)
    assert (cut - mixed).abs().max() > 0.01
    pipe.disable_lora()
    torch.testing.assert_close(latents_of(pipe), base, rtol=0, atol=1e-4)
    pipe.enable_lora()
    pipe.delete_adapters("style")
    torch.testing.assert_close(latents_of(pipe), by_hand(kind, folder, (dial.truncate(2), 0.7)), **NEAR)
    pipe.unload_lora_weights()
    after = state(pipe)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    torch.testing.assert_close(latents_of(pipe), base, rtol=0, atol=1e-4)

    style.to_pipeline(pipe, "style")
    pipe.fuse_lora(lora_scale=0.6)
    fused = by_hand(kind, folder, (style, 0.6))
    torch.testing.assert_close(latents_of(pipe), fused, **NEAR)
    pipe.unfuse_lora()
    pipe.disable_lora()
    torch.testing.assert_close(latents_of(pipe), base, **NEAR)
    pipe.enable_lora()
    pipe.set_adapters(["style"])  # diffusers leaves the scale of a fusing in place
    pipe.fuse_lora(lora_scale=0.6)
    pipe.unload_lora_weights()
    torch.testing.assert_close(latents_of(pipe), fused, **NEAR)


WEIGHTS = {
    "one for a component": {"unet": 0.4, "text_encoder": 0.9},
    "parts of the U-Net": {"unet": {"down": 0.2, "mid": 0.5, "up": 0.9}},
    "blocks": {"unet": {"down": {"block_1": 0.1, "block_2": [0.3, 0.6]}, "up": {"block_1": [0.2, 0.4, 0.8]}}},
}


@pytest.mark.parametrize("kind", TEXT_TO_IMAGE)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_weights_by_component_and_block_are_those_of_diffusers(weights, kind, folder) -> None:
    given = WEIGHTS[weights]
    ours, stock = make(kind, folder), make(kind, folder)
    ours.load_lora_weights(file(folder, "style", kind), adapter_name="a")
    type(stock).load_lora_weights.stock(stock, str(file(folder, "style", kind, "-diffusers")), adapter_name="a")
    whole = latents_of(ours)
    torch.testing.assert_close(whole, latents_of(stock), **NEAR)
    for pipe in (ours, stock):
        pipe.set_adapters(["a"], [copy.deepcopy(given)])
    torch.testing.assert_close(latents_of(ours), latents_of(stock), **NEAR)
    assert (latents_of(ours) - whole).abs().max() > 0.01


@pytest.mark.parametrize("kind", TEXT_TO_IMAGE)
def test_the_scale_of_a_call(kind, folder) -> None:
    style, dial = both(folder, kind)
    pipe = make(kind, folder)
    pipe.load_lora_weights(file(folder, "style", kind), adapter_name="style")
    pipe.load_lora_weights(file(folder, "dial", kind), adapter_name="dial")
    pipe.set_adapters(["style", "dial"])
    set_rank(pipe, 2)
    wanted = by_hand(kind, folder, (style, 0.3), (dial.truncate(2), 0.3))
    torch.testing.assert_close(latents_of(pipe, cross_attention_kwargs={"scale": 0.3}), wanted, **NEAR)
    wanted = by_hand(kind, folder, (style, 1.0), (dial.truncate(2), 1.0))
    torch.testing.assert_close(latents_of(pipe), wanted, **NEAR)  # the scale was that of the one call


@pytest.mark.parametrize("kind", TEXT_TO_IMAGE)
@pytest.mark.parametrize("low", [True, False])
def test_loaded_deleted_and_loaded_again(kind, low, folder) -> None:
    style, dial = both(folder, kind)
    pipe = make(kind, folder)
    for name, one in (("style", style), ("dial", dial), ("style", style)):
        pipe.load_lora_weights(file(folder, name, kind), adapter_name="same", low_cpu_mem_usage=low)
        torch.testing.assert_close(latents_of(pipe), by_hand(kind, folder, (one, 1.0)), **NEAR)
        assert not any(parameter.device.type == "meta" for parameter in pipe.unet.parameters())
        pipe.delete_adapters("same")
    assert pipe.get_active_adapters() == []
    pipe.load_lora_weights(file(folder, "style", kind))
    pipe.load_lora_weights(file(folder, "dial", kind))
    assert pipe.get_list_adapters() == {part: ["default_0", "default_1"] for part in models(pipe)}


def offloaded(pipe, how) -> None:
    if how == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    else:
        pipe.enable_group_offload(
            onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
        )


@pytest.mark.parametrize("kind", TEXT_TO_IMAGE)
@pytest.mark.parametrize("how", ["model", pytest.param("group", marks=needs_groups)])
def test_offloaded_before_or_after(how, kind, folder, tmp_path) -> None:
    style, dial = both(folder, kind)
    pipe = make(kind, folder)
    pipe.load_lora_weights(file(folder, "style", kind), adapter_name="style")
    offloaded(pipe, how)
    torch.testing.assert_close(latents_of(pipe), by_hand(kind, folder, (style, 1.0)), **NEAR)
    pipe.load_lora_weights(file(folder, "dial", kind), adapter_name="dial")
    hooked = [one for one in pipe.unet.modules() if hasattr(one, "_hf_hook") or hasattr(one, "_diffusers_hook")]
    assert hooked
    pipe.set_adapters(["style", "dial"], [0.5, 0.7])
    torch.testing.assert_close(latents_of(pipe), by_hand(kind, folder, (style, 0.5), (dial, 0.7)), **NEAR)
    set_rank(pipe, 2)
    wanted = by_hand(kind, folder, (style, 0.5), (dial.truncate(2), 0.7))
    torch.testing.assert_close(latents_of(pipe), wanted, **NEAR)
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(file(folder, "dial", kind).read_bytes()[:9000])
    with pytest.raises(AdapterError, match="torn"):
        pipe.load_lora_weights(torn, adapter_name="torn")
    torch.testing.assert_close(latents_of(pipe), wanted, **NEAR)


@pytest.mark.parametrize("kind", TEXT_TO_IMAGE)
@pytest.mark.parametrize("prepared", [False, True], ids=["", "prepared"])
def test_saved_as_diffusers_saves(kind, prepared, folder, tmp_path) -> None:
    from peft import get_peft_model_state_dict

    _, dial = both(folder, kind)
    pipe = make(kind, folder)
    if prepared:
        pipe.enable_lora_hotswap(target_rank=8)
    pipe.load_lora_weights(file(folder, "dial", kind), adapter_name="default")
    wanted = latents_of(pipe)
    layers = {f"{part}_lora_layers": get_peft_model_state_dict(model) for part, model in models(pipe).items()}
    pipe.save_lora_weights(tmp_path, **layers)
    again = make(kind, folder)
    again.load_lora_weights(tmp_path)
    torch.testing.assert_close(latents_of(again), wanted, **NEAR)
    assert Adapter.load(tmp_path).dylora == dial.dylora
    stock = make(kind, folder)
    type(stock).load_lora_weights.stock(stock, str(tmp_path))
    torch.testing.assert_close(latents_of(stock), wanted, **NEAR)
