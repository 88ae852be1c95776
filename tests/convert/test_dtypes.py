"""Every reader with every mix of number types, against arithmetic in float64."""

import itertools

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_adapters.convert import Adapter, AdapterError, LowRank, ModuleName
from lora_adapters.convert.programs.info import as_text, facts
from lora_adapters.convert.storage.checkpoint import Checkpoint
from lora_adapters.convert.tools.extract import extract
from lora_adapters.convert.tools.merge import merge_into_model, weighted_sum

from .scripts import run

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip
KEY = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
MODULE = ModuleName("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
BUFFERS = {
    "cond_stage_model.transformer.position_ids": torch.arange(7)[None],
    "mask": torch.tensor([True, False]),
    "n": torch.tensor(3, dtype=torch.int8),
    "betas": torch.linspace(1e-4, 1e-2, 5, dtype=torch.float64),
    "empty": torch.zeros(0, 4, dtype=torch.bfloat16),
}


def numbers(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def model(path, dtype, seed):
    tensors = {KEY: numbers(12, 8, seed=seed).to(dtype), **BUFFERS}
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({"state_dict": tensors}, path)
    return path, tensors[KEY].double()


def adapter(path, dtype, seed):
    one = LowRank(numbers(2, 8, seed=seed).to(dtype), numbers(12, 2, seed=seed + 50).to(dtype), 1.0)
    return Adapter({MODULE: one}), one.delta(torch.float64)


@pytest.mark.parametrize(("base", "tuned"), itertools.product(DTYPES, DTYPES))
@pytest.mark.parametrize("endings", [("safetensors", "ckpt"), ("ckpt", "safetensors")])
def test_extraction(base, tuned, endings, tmp_path):
    first, old = model(tmp_path / f"a.{endings[0]}", base, 1)
    second, new = model(tmp_path / f"b.{endings[1]}", tuned, 2)
    found = extract(first, second, 8).adapter.modules[MODULE]
    torch.testing.assert_close(found.delta(torch.float64), new - old, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("of_model", "of_adapter"), itertools.product(DTYPES, DTYPES))
@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
@pytest.mark.parametrize("to", [None, torch.float32, torch.float16, torch.bfloat16])
def test_merging_into_a_model(of_model, of_adapter, ending, to, tmp_path):
    path, before = model(tmp_path / f"in.{ending}", of_model, 1)
    one, change = adapter(tmp_path, of_adapter, 3)
    out = merge_into_model(path, tmp_path / "out.safetensors", [one], [0.5], dtype=to)
    after = load_file(out)
    assert after[KEY].dtype == (to or of_model)
    wanted = before + 0.5 * change
    computed = 1e-15 if of_model == torch.float64 and to is None else 1e-7  # in float64, else in float32
    limit = max(torch.finfo(to or of_model).eps / 2, computed)
    assert float((after[KEY].double() - wanted).norm() / wanted.norm()) < limit
    for name, one_buffer in BUFFERS.items():
        kept = one_buffer if to is None or not one_buffer.is_floating_point() else one_buffer.to(to)
        assert after[name].dtype == kept.dtype
        assert torch.equal(after[name], kept), name


@pytest.mark.parametrize(("one", "other"), itertools.product(DTYPES, DTYPES))
def test_sums_and_reductions(one, other, tmp_path):
    (first, change), (second, more) = adapter(tmp_path, one, 1), adapter(tmp_path, other, 2)
    total = weighted_sum({"a": first, "b": second}, [0.5, -0.25])
    wanted = 0.5 * change - 0.25 * more
    for found in (total, total.svd(4), total.resize(4), first.scale(0.5) + second.scale(-0.25)):
        torch.testing.assert_close(found.modules[MODULE].delta(torch.float64), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("to", ["fp16", "bf16", "float"])
@pytest.mark.parametrize("program", ["convert", "resize", "svd-merge", "merge"])
def test_programs_on_files(dtype, to, program, tmp_path, capsys):
    one, change = adapter(tmp_path, dtype, 1)
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    pair = one.modules[MODULE]
    tensors = {
        f"{key}.lora_down.weight": pair.down,
        f"{key}.lora_up.weight": pair.up,
        f"{key}.alpha": torch.tensor(1.0),
    }
    source, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(tensors, source)
    assert MODULE.component in as_text(facts(Adapter.load(source), source))
    words = {
        "convert": ("convert", "--model", source, "--format", "diffusers"),
        "resize": ("resize", "--model", source, "--new_rank", 2),
        "svd-merge": ("svd-merge", "--models", source, "--new_rank", 2),
        "merge": ("merge", "--models", source),
    }[program]
    run(capsys, *words, "--save_to", out, "--save_precision", to)
    found = Adapter.load(out).modules[MODULE]
    limit = {"fp16": 2e-3, "bf16": 2e-2, "float": 1e-5}[to]
    # An alpha is folded at no less than float16, so that is what float8 and float16 files are converted with.
    limit = max(limit, 2e-3) if program == "convert" and dtype.itemsize <= 2 else limit
    limit = max(limit, 2e-2) if program == "convert" and dtype == torch.bfloat16 else limit
    assert float((found.delta(torch.float64) - change).norm() / change.norm()) < limit


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool])
def test_whole_numbers_are_no_weights(dtype, tmp_path):
    save_file({KEY: torch.ones(12, 8).to(dtype)}, tmp_path / "a.safetensors")
    other, _ = model(tmp_path / "b.safetensors", torch.float32, 1)
    one, _ = adapter(tmp_path, torch.float32, 1)
    for wrong in (
        lambda: extract(tmp_path / "a.safetensors", other, 2),
        lambda: extract(other, tmp_path / "a.safetensors", 2),
        lambda: one.merge_into(tmp_path / "a.safetensors", tmp_path / "out.safetensors"),
    ):
        with pytest.raises(AdapterError, match=rf"a.safetensors: {KEY} is {dtype}"):
            wrong()
    assert Checkpoint.open(tmp_path / "a.safetensors").weight(MODULE).dtype == dtype
