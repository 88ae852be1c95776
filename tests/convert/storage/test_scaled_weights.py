"""Models whose weights mean something else than their numbers: scaled fp8, and kinds that are refused."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_adapters.convert import Adapter, AdapterError, LowRank, ModuleName
from lora_adapters.convert.storage.scaled_weights import neighbours, requantised
from lora_adapters.convert.tools.extract import extract
from lora_adapters.convert.tools.merge import merge_into_model
from tests.convert.scripts import fails

UNET = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1"
TEXT = "cond_stage_model.model.transformer.resblocks.0.attn"
QUERY = ModuleName("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def numbers(*shape, seed=0, size=0.05):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size


def bits(tensor):
    return tensor.reshape(-1).view(torch.uint8).tolist()


def scaled(weight, dtype, rows=False):
    """An fp8 weight and its scale, the largest number at the end of the dtype's range."""
    scale = (weight.abs().amax(1, keepdim=True) if rows else weight.abs().max()) / torch.finfo(dtype).max
    return (weight / scale).to(dtype), scale


def model(folder, dtype=torch.float8_e4m3fn, name="scale_weight", rows=False, ndim=1, **more):
    """A file with two scaled weights, one of them touched by nobody, and a plain one."""
    weight, scale = scaled(numbers(16, 8), dtype, rows)
    other, other_scale = scaled(numbers(8, 8, seed=1), dtype)
    shape = scale.shape if rows and ndim == 2 else (scale.numel(),) if ndim else ()
    tensors = {
        f"{UNET}.to_q.weight": weight,
        f"{UNET}.to_q.{name}": scale.reshape(shape),
        f"{UNET}.to_q.scale_input": torch.tensor(0.5),
        f"{UNET}.to_k.weight": other,
        f"{UNET}.to_k.{name}": other_scale.reshape(1),
        f"{UNET}.to_v.weight": numbers(8, 8, seed=2).half(),
        "scaled_fp8": torch.empty(2, dtype=dtype),
        **more,
    }
    save_file(tensors, folder / "in.safetensors", {"_quantization_metadata": "{}", "kept": "x"})
    return folder / "in.safetensors", (weight.float() * scale).double()


def adapter(size=0.05, module=QUERY, rows=16):
    return Adapter({module: LowRank(numbers(2, 8, seed=5, size=1.0), numbers(rows, 2, seed=6, size=size), 2.0)})


def meaning(tensors, key, name="scale_weight"):
    weight, scale = tensors[f"{key}.weight"].double(), tensors[f"{key}.{name}"].double()
    return weight * (scale.reshape(-1, 1) if scale.numel() > 1 else scale.reshape(()))


@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize("name", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize(("rows", "ndim"), [(False, 0), (False, 1), (True, 1), (True, 2)])
@pytest.mark.parametrize("size", [0.001, 0.05, 50.0])  # the last is beyond the range of the old scale
def test_merging_adds_to_what_a_scaled_weight_stands_for(dtype, name, rows, ndim, size, tmp_path):
    file, before = model(tmp_path, dtype, name, rows, ndim)
    one = adapter(size)
    after = load_file(one.merge_into(file, tmp_path / "out.safetensors"))
    source = load_file(file)
    assert after.keys() == source.keys()
    assert all(after[key].dtype == source[key].dtype for key in source)
    assert all(after[key].shape == source[key].shape for key in source)
    wanted = before + one.modules[QUERY].delta(torch.float64)
    found = meaning(after, f"{UNET}.to_q", name)
    # Half a step of the dtype for each number, or of its subnormal numbers at the scale that is written.
    step = torch.finfo(dtype).eps / 2 * wanted.abs()
    scale = after[f"{UNET}.to_q.{name}"].double().reshape(-1, 1)
    smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps / 2 * scale
    assert bool(((found - wanted).abs() <= torch.maximum(step, smallest) * 1.001).all())
    for key in source.keys() - {f"{UNET}.to_q.weight", f"{UNET}.to_q.{name}"}:
        assert bits(after[key]) == bits(source[key]), key


def test_an_adapter_without_effect_changes_no_bit(tmp_path):
    file, _ = model(tmp_path)
    out = adapter(0.0).merge_into(file, tmp_path / "out.safetensors")
    assert {key: bits(one) for key, one in load_file(out).items()} == {
        key: bits(one) for key, one in load_file(file).items()
    }


def test_a_scale_of_zero_and_a_narrow_scale():
    for scale in (torch.tensor(0.0), torch.tensor([1e-5]).half(), torch.tensor(1.0).bfloat16()):
        value = numbers(4, 4)
        weight, new = requantised(value, torch.float8_e4m3fn, scale, "a")
        assert (new.dtype, new.shape) == (scale.dtype, scale.shape)
        assert float((weight.double() * new.double() - value).norm() / value.norm()) < 0.05


def test_only_the_rows_that_overflow_get_another_scale():
    value = numbers(3, 64)
    weight, scale = scaled(value, torch.float8_e4m3fn, rows=True)
    value[1] *= 100
    new_weight, new = requantised(value, torch.float8_e4m3fn, scale, "a")
    assert torch.equal(new[[0, 2]], scale[[0, 2]])
    assert float(new[1]) == pytest.approx(100 * float(scale[1]), rel=1e-5)
    assert torch.equal(new_weight.float()[[0, 2]], weight.float()[[0, 2]])


def test_another_precision_makes_plain_weights_of_all(tmp_path):
    more = {f"{UNET}.to_q.comfy_quant": torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)}
    file, before = model(tmp_path, **more)
    one = adapter()
    out = merge_into_model(file, tmp_path / "out.safetensors", [one], [1.0], dtype=torch.bfloat16)
    after = load_file(out)
    assert sorted(after) == sorted(f"{UNET}.to_{part}.weight" for part in "qkv")
    wanted = before + one.modules[QUERY].delta(torch.float64)
    torch.testing.assert_close(after[f"{UNET}.to_q.weight"].double(), wanted, rtol=2**-8, atol=0)
    torch.testing.assert_close(
        after[f"{UNET}.to_k.weight"].double(), meaning(load_file(file), f"{UNET}.to_k"), rtol=2**-8, atol=0
    )
    with safe_open(out, "pt") as opened:
        assert opened.metadata() == {"kept": "x"}


@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_a_packed_weight_with_a_scale(ending, tmp_path):
    weight, scale = scaled(numbers(24, 8), torch.float8_e4m3fn)
    save_file(
        {
            f"{TEXT}.in_proj_weight": weight,
            f"{TEXT}.in_proj_weight_scale": scale,
            "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight": numbers(24, 8),
            f"{UNET}.to_q.weight": numbers(8, 8),
        },
        tmp_path / "in.safetensors",
    )
    module = ModuleName("text_encoder", "text_model.encoder.layers.0.self_attn.k_proj")
    one = adapter(module=module, rows=8)
    out = one.merge_into(tmp_path / "in.safetensors", tmp_path / f"out.{ending}")
    after = load_file(out) if ending == "safetensors" else torch.load(out, weights_only=True)["state_dict"]
    found = after[f"{TEXT}.in_proj_weight"].double() * after[f"{TEXT}.in_proj_weight_scale"].double()
    wanted = weight.double() * scale
    wanted[8:16] += one.modules[module].delta(torch.float64)
    assert float((found - wanted).norm() / wanted.norm()) < 0.03


@pytest.mark.parametrize("dtypes", [("scaled", "scaled"), ("scaled", "plain"), ("plain", "scaled")])
def test_extraction_reads_what_scaled_weights_stand_for(dtypes, tmp_path):
    files, values = [], []
    for at, kind in enumerate(dtypes):
        value = numbers(16, 8) + at * adapter().modules[QUERY].delta()
        weight, scale = scaled(value, torch.float8_e4m3fn)
        tensors = {f"{UNET}.to_q.weight": value.float()}
        if kind == "scaled":
            tensors = {f"{UNET}.to_q.weight": weight, f"{UNET}.to_q.scale_weight": scale}
            value = weight.float() * scale
        save_file(tensors, tmp_path / f"{at}.safetensors")
        files.append(tmp_path / f"{at}.safetensors")
        values.append(value)
    found = extract(*files, 8).adapter.modules[QUERY].delta()
    torch.testing.assert_close(found, values[1] - values[0], rtol=1e-4, atol=1e-5)


UINT8, INT8 = torch.ones(16, 4, dtype=torch.uint8), torch.ones(16, 8, dtype=torch.int8)
RECIPE = torch.tensor(list(json.dumps({"format": "nvfp4"}).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("tensors", "key", "kind"),
    [
        ({"weight": torch.ones(64, 1, dtype=torch.uint8), "weight.absmax": torch.ones(2),
          "weight.quant_map": torch.ones(16), "weight.quant_state.bitsandbytes__nf4": UINT8}, "weight.absmax",
         "bitsandbytes 4-bit"),
        ({"weight": INT8, "SCB": torch.ones(16), "weight_format": torch.tensor(0)}, "SCB", "bitsandbytes 8-bit"),
        ({"weight": INT8, "weight_scale": torch.ones(16, 1)}, "weight_scale", "integer"),
        ({"weight": INT8, "scale_weight": torch.ones(1)}, "scale_weight", "integer"),
        ({"weight": INT8}, "weight", "torch.int8"),
        ({"weight._data": INT8, "weight._scale": torch.ones(16, 1)}, "weight._data", "quanto"),
        ({"qweight": torch.ones(1, 16, dtype=torch.int32), "qzeros": torch.ones(1, dtype=torch.int32),
          "scales": torch.ones(1, 16)}, "qweight", "GPTQ"),
        ({"weight": UINT8, "weight_scale": torch.ones(16, 1).to(torch.float8_e4m3fn), "weight_scale_2": torch.ones(1)},
         "weight_scale_2", "4-bit"),
        ({"weight": UINT8, "weight_scale": torch.ones(1), "comfy_quant": RECIPE}, "comfy_quant", "nvfp4"),
        ({"weight": torch.ones(16, 8).to(FP8[0]), "weight_scale": torch.ones(16, 2)}, "weight_scale", "blocks"),
        ({"weight": torch.ones(16, 8).to(FP8[0]), "weight_scale": torch.ones(1, 8)}, "weight_scale", "columns"),
        ({"weight": torch.ones(16, 8).to(FP8[0]), "weight_scale": torch.tensor(float("nan"))}, "weight_scale", "NaN"),
        ({"weight": torch.ones(16, 8).to(FP8[0]), "weight_scale_inv": torch.ones(1, 1)}, "weight_scale_inv",
         "rescaled"),
        ({"weight": torch.ones(16, 8).half(), "weight_scale": torch.ones(1)}, "weight_scale", "rescaled"),
        ({"weight": torch.ones(16, 8), "weight_quantizer._amax": torch.ones(1)}, "weight_quantizer._amax", "rescaled"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("program", ["merge", "extract"])
def test_other_kinds_are_refused_by_key_and_kind(tensors, key, kind, program, capsys, tmp_path):
    plain = {f"{UNET}.to_k.weight": numbers(8, 8)}
    save_file({**plain, **{f"{UNET}.to_q.{name}": one for name, one in tensors.items()}}, tmp_path / "in.safetensors")
    save_file({**plain, f"{UNET}.to_q.weight": numbers(16, 8)}, tmp_path / "tuned.safetensors")
    out = tmp_path / "out.safetensors"
    if program == "merge":
        adapter().save(tmp_path / "a.safetensors")
        words = ("--sd_model", tmp_path / "in.safetensors", "--models", tmp_path / "a.safetensors")
    else:
        words = ("--model_org", tmp_path / "in.safetensors", "--model_tuned", tmp_path / "tuned.safetensors")
    said = fails(capsys, program, *words, "--save_to", out)
    assert f"{UNET}.to_q.{key}" in said, said
    assert kind in said, said
    assert not out.exists()


def test_quantised_parts_that_no_adapter_touches_stay(tmp_path, capsys):
    more = {f"{TEXT}.out_proj.weight": INT8, f"{TEXT}.out_proj.SCB": torch.ones(16)}
    file, _ = model(tmp_path, **more)
    after = load_file(adapter().merge_into(file, tmp_path / "out.safetensors"))
    assert torch.equal(after[f"{TEXT}.out_proj.weight"], INT8)
    adapter().save(tmp_path / "a.safetensors")
    words = ("merge", "--sd_model", file, "--models", tmp_path / "a.safetensors", "--save_precision", "bf16")
    said = fails(capsys, *words, "--save_to", tmp_path / "b.safetensors")
    assert f"{TEXT}.out_proj.SCB" in said


def test_a_scale_in_another_shard_is_refused(tmp_path):
    folder = tmp_path / "model" / "unet"
    folder.mkdir(parents=True)
    weight, scale = scaled(numbers(16, 8), torch.float8_e4m3fn)
    path = QUERY.path
    names = [f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    save_file({f"{path}.weight": weight}, folder / names[0])
    save_file({f"{path}.weight_scale": scale}, folder / names[1])
    table = {"weight_map": {f"{path}.weight": names[0], f"{path}.weight_scale": names[1]}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(table))
    with pytest.raises(AdapterError, match=r"to_q.weight is a scaled weight .*to_q.weight_scale"):
        adapter().merge_into(tmp_path / "model", tmp_path / "out")


def test_plain_models_have_no_such_neighbours():
    names = ("weight", "bias", "running_mean", "logit_scale", "position_ids", "norm.weight", "lora_A.weight")
    found = neighbours({f"{UNET}.to_q.{name}": numbers(4, 4) for name in names if name != "logit_scale"}
                       | {"cond_stage_model.model.logit_scale": torch.ones(1), "betas": torch.ones(3)})  # fmt: skip
    assert not found.scales
    assert not found.foreign
