"""A transformer that is compiled follows ranks, weights and other adapters, and is not compiled anew for each."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from lora_adapters import Adapter, set_rank
from lora_adapters.convert.formats.metadata import DyLora
from lora_adapters.types.layers import layers

from .transformers import flux, pair, sd3

LAYERS = {
    flux: {
        "lora_unet_double_blocks_0_img_attn_qkv": (48, 16),
        "lora_unet_double_blocks_1_txt_attn_qkv": (48, 16),
        "lora_unet_double_blocks_1_img_mlp_2": (16, 64),
        "lora_unet_single_blocks_1_linear1": (112, 16),
    },
    sd3: {
        "lora_unet_joint_blocks_0_x_block_attn_qkv": (48, 16),
        "lora_unet_joint_blocks_1_context_block_mlp_fc1": (64, 16),
    },
}
FAMILY = {flux: "flux1", sd3: "sd3"}


@pytest.fixture(params=[flux, sd3], ids=["flux", "sd3"])
def make(request):
    torch._dynamo.reset()
    return request.param


def adapter(make, rank, seed):
    """An adapter in kohya's names, of layers that are fused there."""
    file = {}
    for number, (name, shape) in enumerate(LAYERS[make].items()):
        file |= pair(name, *shape, rank, rank / 2, 10 * seed + number)
    return Adapter.from_tensors(file, {"ss_base_model_version": FAMILY[make]})


def inputs(make):
    """What one call of the transformer takes."""
    draw = torch.Generator().manual_seed(0)
    given = {
        "encoder_hidden_states": torch.randn(1, 5, 12, generator=draw),
        "pooled_projections": torch.randn(1, 8, generator=draw),
        "timestep": torch.tensor([500.0]),
        "return_dict": False,
    }
    if make is sd3:
        return {**given, "hidden_states": torch.randn(1, 4, 4, 4, generator=draw)}
    sequence = {"hidden_states": torch.randn(1, 16, 4, generator=draw)}
    return {**given, **sequence, "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)}


def compiled(pipe):
    """Compile the pipeline's transformer; returns what counts the graphs."""
    counter = CompileCounter()
    pipe.transformer.compile(backend=counter)
    return counter


def drawn(pipe, given):
    """What the compiled transformer computes, which is what the same one computes as it is."""
    with torch.no_grad():
        found = pipe.transformer(**given)[0]
        torch.testing.assert_close(found, pipe.transformer.forward(**given)[0], rtol=1e-4, atol=1e-5)
    return found


def alone(make, change, given, weight=1.0):
    """What the change makes of the transformer without a compiler."""
    pipe = make()
    change.to_pipeline(pipe, "a")
    pipe.set_adapters(["a"], [weight])
    with torch.no_grad():
        return pipe.transformer(**given)[0]


def test_a_dylora_knows_its_widths_as_soon_as_it_is_loaded(make):
    pipe = make()
    adapter(make, 4, 1).as_dylora(DyLora(1)).to_pipeline(pipe, "a")
    found = [(layer.lora_variant["a"], layer) for _, layer in layers(pipe.transformer, "a")]
    assert found
    assert all(variant.gate_of_all(layer, "a").tolist() == [0.5] * 4 for variant, layer in found)


@pytest.mark.slow
def test_other_ranks_of_a_dylora(make):
    pipe, given, whole = make(), inputs(make), adapter(make, 4, 1).as_dylora(DyLora(1))
    whole.to_pipeline(pipe, "a")
    counter = compiled(pipe)
    drawn(pipe, given)
    assert counter.frame_count == 1
    for rank in (1, 3, 2, 4):
        set_rank(pipe, rank)
        wanted = alone(make, whole.truncate(rank), given)
        torch.testing.assert_close(drawn(pipe, given), wanted, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_other_weights(make):
    pipe, given = make(), inputs(make)
    for seed, name in enumerate("ab"):
        adapter(make, 4, seed).to_pipeline(pipe, name)
    counter, counts, seen = compiled(pipe), [], set()
    for weights in ((1, 1), (0.5, 0.2), (0.1, 2), (0.7, 0.3), (0.2, 0.9)):
        pipe.set_adapters(["a", "b"], list(weights))
        seen.add(round(drawn(pipe, given).sum().item(), 4))
        counts.append(counter.frame_count)
    assert len(seen) == 5
    assert counts[1:] == [counts[1]] * 4  # at first, numbers are constants to the compiler


@pytest.mark.slow
def test_other_adapters(make):
    pipe, given = make(), inputs(make)
    pipe.enable_lora_hotswap(target_rank=8)
    adapter(make, 4, 1).to_pipeline(pipe, "a")
    counter = compiled(pipe)
    drawn(pipe, given)
    before = counter.frame_count
    for rank, seed in ((8, 2), (2, 3)):
        change = adapter(make, rank, seed)
        pipe.load_lora_weights(change, adapter_name="a", hotswap=True)
        torch.testing.assert_close(drawn(pipe, given), alone(make, change, given), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == before
