"""Saving in a narrower dtype: no small numbers are lost, and the error that is printed is that of the file."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_adapters.convert import Adapter, AdapterError, LowRank, ModuleName
from lora_adapters.convert.deltas.low_rank import add_up
from lora_adapters.convert.deltas.narrow_factors import balanced
from lora_adapters.convert.tools.merge import merge_into_model, weighted_sum
from tests.convert.scripts import run

PATH = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
QUERY, KEY = ModuleName("unet", f"{PATH}.to_q"), ModuleName("unet", f"{PATH}.to_k")
HALF = 2**-11  # the largest relative rounding of float16


def trained(seed, size, rank=128, alpha=1.0, dtype=torch.float16, conv=False):
    """An adapter as kohya's trainer leaves it: down as it was drawn, up small, alpha 1."""
    g = torch.Generator().manual_seed(seed)
    shape, ones = ((rank, 40, 3, 3), (1, 1)) if conv else ((rank, 320), ())
    down = (torch.rand(shape, generator=g) * 2 - 1) / 320**0.5
    up = torch.randn(64, rank, *ones, generator=g) * size
    return LowRank(down.to(dtype), up.to(dtype), alpha)


def distance(found, wanted):
    found, wanted = found.to(torch.float64), wanted.to(torch.float64)
    return float((found - wanted).norm() / wanted.norm())


def exact(parts):
    return sum(weight * one.delta(torch.float64) for one, weight in parts)


@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("ratios", [(0.5, 0.5), (0.8, -0.3), (1e-3, 1.0)])
@pytest.mark.parametrize("conv", [False, True])
def test_a_sum_in_float16_is_the_sum(size, ratios, conv, tmp_path):
    module = ModuleName("unet", "mid_block.resnets.0.conv1") if conv else QUERY
    ones = [trained(seed, size, conv=conv) for seed in (1, 2)]
    names = [str(Adapter({module: one}).save(tmp_path / f"{at}.safetensors")) for at, one in enumerate(ones)]
    total = weighted_sum({name: Adapter.load(name) for name in names}, ratios)
    back = Adapter.load(total.save(tmp_path / "a.safetensors", dtype=torch.float16)).modules[module]
    assert back.up.dtype == back.down.dtype == torch.float16
    assert distance(back.delta(torch.float64), exact(zip(ones, ratios, strict=True))) < 1.5 * HALF
    if ratios == (0.5, 0.5):
        assert distance(back.delta(torch.float64), exact(zip(ones, ratios, strict=True))) < 1e-12


@pytest.mark.parametrize("format", ["kohya", "diffusers", "peft", "fold"])
@pytest.mark.parametrize("size", [1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("stored", [torch.float32, torch.float64, torch.float16])
def test_every_format_in_float16(format, size, stored, tmp_path):
    ones = {QUERY: trained(1, size, dtype=stored), KEY: trained(2, size * 8, alpha=2.0, dtype=stored)}
    path = tmp_path / ("a" if format == "peft" else "a.safetensors")
    fold = format == "fold"
    Adapter(ones).save(path, "kohya" if fold else format, dtype=torch.float16, fold_alpha=fold)
    back = Adapter.load(path)
    for module, one in ones.items():
        # Formats without an alpha of their own hold the scale in the factors, and 1e-7 / 128 is beyond float16 there.
        allowed = 1.5 * HALF if format != "diffusers" or size > 1e-6 else 30 * HALF
        assert distance(back.modules[module].delta(torch.float64), one.delta(torch.float64)) < allowed, module
    assert fold is False or len({one.alpha for one in back.modules.values()}) == 1


def test_all_alphas_change_by_the_same_factor():
    """Programs that take the alpha of one module for all still read the same changes."""
    one = {QUERY: trained(1, 1e-9, dtype=torch.float32), KEY: trained(2, 1.0, dtype=torch.float32)}
    narrow = Adapter(one).to(torch.float16).modules
    assert narrow[QUERY].alpha == narrow[KEY].alpha < 1
    for module in one:
        assert distance(narrow[module].delta(torch.float64), one[module].delta(torch.float64)) < 2 * HALF


def test_factors_that_lose_nothing_stay_as_they_are():
    one = trained(1, 0.02, dtype=torch.float32)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        narrow = Adapter({QUERY: one}).to(dtype).modules[QUERY]
        assert torch.equal(narrow.up, one.up.to(dtype))
        assert torch.equal(narrow.down, one.down.to(dtype))
        assert narrow.alpha == one.alpha


def test_a_large_factor_beside_a_small_one():
    one = LowRank(torch.full((2, 8), 3e5), torch.full((4, 2), 1e-4), 2.0)
    narrow = Adapter({QUERY: one}).to(torch.float16).modules[QUERY]
    assert distance(narrow.delta(torch.float64), one.delta(torch.float64)) < 2 * HALF
    with pytest.raises(AdapterError, match="too large for float16"):
        Adapter({QUERY: LowRank(torch.full((1, 8), 1e6), torch.full((4, 1), 1e6), 1.0)}).to(torch.float16)


def test_balancing_rounds_nothing():
    one = trained(3, 1e-6, dtype=torch.float32)
    down, up = balanced(one.down, one.up, 3)
    assert torch.equal((up.double() @ down.double()), (one.up.double() @ one.down.double()) * 2**6)
    assert float((down.abs().amax(1) / up.abs().amax(0)).log2().abs().max()) <= 1
    zero_down, zero_up = balanced(torch.zeros(2, 3), torch.ones(4, 2))
    assert not zero_down.any()
    assert torch.equal(zero_up, torch.ones(4, 2))


def test_the_prefix_of_a_dylora_stays_its_prefix():
    one = trained(1, 1e-6, dtype=torch.float32)
    narrow = Adapter({QUERY: one}).to(torch.float16).modules[QUERY]
    for rank in (1, 16, 64):
        assert (
            distance(narrow.truncated(rank).delta(torch.float64), one.truncated(rank).delta(torch.float64)) < 2 * HALF
        )


def test_equal_scales_of_a_sum_stay_in_alpha():
    ones = [trained(seed, 1e-3) for seed in (1, 2)]
    total = add_up([one.scaled(0.25) for one in ones])
    assert total.alpha == 0.25 * 2
    assert torch.equal(total.up.half(), torch.cat([one.up for one in ones], 1))


@pytest.mark.parametrize("program", ["svd-merge", "resize", "merge", "extract"])
@pytest.mark.parametrize("size", [1e-2, 1e-4])
@pytest.mark.parametrize("precision", ["fp16", "bf16", "float"])
@pytest.mark.parametrize("rank", [16, 64])
def test_the_error_printed_is_that_of_the_file(program, size, precision, rank, tmp_path, capsys):
    ones = [trained(seed, size, rank=32) for seed in (1, 2)]
    names = [str(Adapter({QUERY: one}).save(tmp_path / f"{at}.safetensors")) for at, one in enumerate(ones)]
    out, wanted = tmp_path / "a.safetensors", exact([(ones[0], 0.5), (ones[1], 0.25)])
    more = ("--save_to", out, "--save_precision", precision)
    if program == "resize":
        wanted = ones[0].delta(torch.float64)
        said = run(capsys, "resize", "--model", names[0], "--new_rank", rank, *more)
    elif program == "extract":
        key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
        base = torch.randn(64, 320, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        save_file({key: base}, tmp_path / "base.safetensors")
        save_file({key: base + wanted}, tmp_path / "tuned.safetensors")
        files = ("--model_org", tmp_path / "base.safetensors", "--model_tuned", tmp_path / "tuned.safetensors")
        said = run(capsys, "extract", *files, "--dim", rank, *more)
    else:
        said = run(capsys, program, "--models", *names, "--ratios", 0.5, 0.25, "--new_rank", rank, *more)
    printed = float(re.search(r"all (\S+)", said)[1])
    found = distance(Adapter.load(out).modules[QUERY].delta(torch.float64), wanted)
    assert printed == pytest.approx(found, rel=0.02, abs=2e-6)
    limit = {"fp16": 1.5 * HALF, "bf16": 12 * HALF, "float": 1e-5}[precision]
    assert rank == 16 or found < limit


@pytest.mark.parametrize("untouched", [True, False])
def test_a_model_in_a_narrower_dtype_has_no_new_infinite_numbers(untouched, tmp_path):
    key = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    module = ModuleName("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    big = torch.tensor([1.0, -1e6, float("inf")])
    tensors = {key: torch.ones(8, 8), "first_stage_model.x": big if untouched else big[[0, 2]], "n": torch.tensor(7)}
    save_file(tensors, tmp_path / "in.safetensors")
    adapter, out = Adapter({module: LowRank(torch.ones(1, 8), torch.ones(8, 1), 1.0)}), tmp_path / "out.safetensors"
    if untouched:
        with pytest.raises(AdapterError, match=r"first_stage_model\.x has values that are too large for torch.float16"):
            merge_into_model(tmp_path / "in.safetensors", out, [adapter], [1.0], dtype=torch.float16)
        assert not out.exists()
        merge_into_model(tmp_path / "in.safetensors", out, [adapter], [1.0], dtype=torch.bfloat16)
        return
    merge_into_model(tmp_path / "in.safetensors", out, [adapter], [1.0], dtype=torch.float16)
    assert torch.equal(load_file(out)["first_stage_model.x"], torch.tensor([1.0, float("inf")]).half())
